"""OpenMind and other data sets of the SSL3D challenge: ``pretrain_data.json``.

The JSON is a tree of ``datasets`` → ``subjects`` → ``sessions`` → ``images``. An image has ``name``, ``modality``,
``image_path`` and ``associated_masks`` (``anatomy_mask``, ``anonymization_mask``). Paths begin with a variable:
``$nnssl_raw/Dataset745_OpenMind/…``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.contrasts import UNKNOWN, parse_contrast
from brainfound.data.sources.bids_files import SCANNER_COLUMNS
from brainfound.data.sources.covariates import clean_covariates
from brainfound.data.sources.file_names import SubjectNamer, UnusedFiles, natural_sort_key, read_scan_name, safe_join
from brainfound.data.sources.tables import SourceLayout, SourceTable, cohort_names, sort_by_session
from brainfound.errors import CohortError, UsageError

_FILE = "pretrain_data.json"
_MASKS = ("anatomy_mask", "anonymization_mask")
_MISSING = {"", "n/a", "na", "nan", "none", "null", "unknown"}
_NO_CONTRAST = {"", "mri", "mr", "image", "none", "unknown"}


def can_read(path: Path) -> bool:
    """Whether the path is a ``.json`` file, or a folder with ``pretrain_data.json``."""
    return (path.is_file() and path.suffix.lower() == ".json") or (path / _FILE).is_file()


def read(path: Path, work: Path | None = None) -> SourceTable:
    """Read the images of the tree that exist. Subjects are named ``<dataset>_<subject>``; the site is the data set."""
    file = path / _FILE if path.is_dir() else path
    tree = _load(file)
    unused: UnusedFiles = []
    namer = SubjectNamer()
    rows: list[dict[str, Any]] = []
    num_unnamed_masks = 0
    missing = f"listed in {file.name}, but not there"
    for dataset, subject, session, facts, image in _images(tree, file):
        scan = _resolve(image.get("image_path"), f"an image of {dataset}", file)
        if not scan.is_file():
            unused.append((scan, missing))
            continue
        listed = image.get("associated_masks")
        num_unnamed_masks += bool(listed) and not isinstance(listed, dict)
        listed = listed if isinstance(listed, dict) else {}
        masks = {column: _resolve(listed[column], "a mask", file) for column in _MASKS if listed.get(column)}
        unused += [(mask, missing) for mask in masks.values() if not mask.is_file()]
        rows.append(
            {"subject": namer(dataset, subject), "session": str(session), "contrast": _contrast(image, scan)}
            | {"path": str(scan), "site": dataset, "dataset": dataset, **facts}
            | {column: str(mask) for column, mask in masks.items() if mask.is_file()}
        )
    if not rows:
        what = "none of the images exists" if unused else "the JSON names no images"
        remedy = "Set the variable nnssl_raw to the root of the paths (export nnssl_raw=/data)"
        raise CohortError(what, where=file.name, got=f"{len(unused)} listed" if unused else None, remedy=remedy)
    sort_by_session(rows, natural_sort_key)
    notes: list[str] = []
    table = clean_covariates(pd.DataFrame(rows), file.name, notes)
    if unused:
        notes.append(f"{len(unused)} listed files are not there; if that is wrong, set the variable nnssl_raw")
    if num_unnamed_masks:
        notes.append(f"the masks of {num_unnamed_masks} images are not used: the index does not name their kind")
    columns = ("mask", *(column for column in _MASKS if column in table))
    return SourceTable(table, file.parent, LAYOUT.name, columns, notes, unused)


LAYOUT = SourceLayout("OpenMind", "pretrain_data.json (OpenMind)", can_read, read)


def _load(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CohortError(f"cannot be read as JSON: {error}", where=file.name, remedy="Get the file again") from error
    if not isinstance(tree, dict) or "datasets" not in tree:
        expected = "an object with datasets → subjects → sessions → images"
        remedy = "Give pretrain_data.json, a manifest or a folder"
        raise CohortError("not an index of images", where=file.name, expected=expected, remedy=remedy)
    return tree


def _children(node: dict[str, Any], key: str, identifier: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The children of a node with their names: an object keyed by name, or a list whose items hold `identifier`."""
    children = node.get(key) or {}
    if isinstance(children, list):
        children = dict(enumerate(children))
    if not isinstance(children, dict) or not all(isinstance(child, dict) for child in children.values()):
        raise CohortError(f"{key!r} is not a list of objects", where=file.name, remedy="Get the file again")
    for name, child in children.items():
        yield str(child.get(identifier) if child.get(identifier) is not None else name), child


def _images(tree: dict[str, Any], file: Path) -> Iterator[tuple[str, str, str, dict[str, Any], dict[str, Any]]]:
    """(dataset, subject, session, covariates, image) of every image."""
    for index, dataset in _children(tree, "datasets", "dataset_index", file):
        dataset_name = str(dataset.get("name") or index)
        for subject_id, subject in _children(dataset, "subjects", "subject_id", file):
            subject_facts = _covariates(subject.get("subject_info"))
            for session_id, session in _children(subject, "sessions", "session_id", file):
                facts = subject_facts | _covariates(session.get("session_info"))
                for _, image in _children(session, "images", "", file):
                    yield dataset_name, subject_id, session_id, facts | _scanner(image.get("image_info")), image


def _covariates(info: Any) -> dict[str, Any]:
    """Numbers, strings and booleans, under the names of cohort columns."""
    if not isinstance(info, dict):
        return {}
    plain = {str(name): value for name, value in info.items() if isinstance(value, str | int | float)}
    known = {name: value for name, value in plain.items() if str(value).strip().lower() not in _MISSING}
    names = cohort_names(known)
    facts = {names.get(column, column): value for column, value in known.items()}
    reserved = {"subject", "session", "contrast", "path", "site", "dataset", "mask", *_MASKS}
    return {column: value for column, value in facts.items() if column not in reserved}


def _scanner(info: Any) -> dict[str, Any]:
    known = info if isinstance(info, dict) else {}
    return {name: known[key] for key, name in SCANNER_COLUMNS.items() if isinstance(known.get(key), str | int | float)}


def _contrast(image: dict[str, Any], scan: Path) -> str:
    """The contrast given in the index, or that in the file name if the index gives none."""
    modality = str(image.get("modality") or "").strip()
    if modality.lower() in _NO_CONTRAST:
        return read_scan_name(scan).contrast
    try:
        return parse_contrast(modality)
    except UsageError:
        return UNKNOWN


def _resolve(text: Any, what: str, file: Path) -> Path:
    """Resolve a path of the index, relative to its variable if that is set, otherwise to the folder of the JSON."""
    if not isinstance(text, str) or not text.strip():
        raise CohortError(f"{what} has no path", where=file.name, remedy="Get the file again")
    root = file.parent
    variable = re.match(r"\$\{?(\w+)\}?/+", text)
    if variable is not None:
        text = text[variable.end() :]
        value = os.environ.get(variable.group(1))
        if value:
            root = Path(value)
        elif text.split("/")[0] == root.resolve().name:  # the JSON lies in $nnssl_raw/<dataset>/
            root = root.resolve().parent
    return safe_join(root, text, file, "a path")
