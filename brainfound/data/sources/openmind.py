"""OpenMind and other sets of the SSL3D challenge: ``pretrain_data.json``.

The JSON is a tree: ``datasets`` → ``subjects`` → ``sessions`` → ``images``, each image with ``name``, ``modality``,
``image_path`` and ``associated_masks`` (``anatomy_mask``, ``anonymization_mask``). Paths begin with a variable,
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
from brainfound.data.cohort import Cohort
from brainfound.data.sources.bids_files import SCANNER_COLUMNS
from brainfound.data.sources.file_names import (
    SubjectNamer,
    UnusedFiles,
    natural_sort_key,
    safe_join,
    scan_contrast_from_filename,
)
from brainfound.data.sources.tables import known_names, parse_ages
from brainfound.errors import CohortError, UsageError

NAME = "OpenMind"
LAYOUT_HINT = "pretrain_data.json (OpenMind)"
_FILE = "pretrain_data.json"
_MASKS = ("anatomy_mask", "anonymization_mask")
_NOTHING = {"", "n/a", "na", "nan", "none", "null", "unknown"}
_NO_CONTRAST = {"", "mri", "mr", "image", "none", "unknown"}


def can_read(path: Path) -> bool:
    """A ``.json`` file, or a folder with ``pretrain_data.json``."""
    return (path.is_file() and path.suffix.lower() == ".json") or (path / _FILE).is_file()


def read(path: Path, work: Path | None = None) -> Cohort:
    """The images of the tree that are there; subjects are named ``<dataset>_<subject>`` and the site is the data set.

    Raises:
        CohortError: not that JSON, a path that leads out of its root, or not one image is there.
    """
    file = path / _FILE if path.is_dir() else path
    tree = _load(file)
    unused: UnusedFiles = []
    names = SubjectNamer()
    roots = _Roots(file)
    rows = []
    without_names = 0
    for dataset, subject, session, facts, image in _images(tree, file):
        scan = roots.resolve(image.get("image_path"), f"an image of {dataset}")
        if not scan.is_file():
            unused.append((scan, f"listed in {file.name}, but not there"))
            continue
        masks = image.get("associated_masks")
        named = {column: masks[column] for column in _MASKS if masks.get(column)} if isinstance(masks, dict) else {}
        without_names += bool(masks) and not isinstance(masks, dict)
        found = {column: roots.resolve(mask, "a mask") for column, mask in named.items()}
        for mask in [mask for mask in found.values() if not mask.is_file()]:
            unused.append((mask, f"listed in {file.name}, but not there"))
        rows.append(
            {"subject": names(dataset, subject), "session": str(session), "contrast": _contrast(image, scan)}
            | {"path": str(scan), "site": dataset, "dataset": dataset, **facts}
            | {column: str(mask) for column, mask in found.items() if mask.is_file()}
        )
    if not rows:
        raise CohortError(
            "not one of the images is there" if unused else "the JSON names no images",
            where=file.name,
            got=f"{len(unused)} listed" if unused else None,
            remedy="Set the variable nnssl_raw to the folder that the paths start at (export nnssl_raw=/data)",
        )
    rows.sort(
        key=lambda row: (
            natural_sort_key(row["subject"]),
            natural_sort_key(row["session"]),
            natural_sort_key(row["path"]),
        )
    )
    notes: list[str] = []
    table = parse_ages(pd.DataFrame(rows), file, notes)
    missing = sum("not there" in reason for _, reason in unused)
    if missing:
        notes.append(f"{missing} listed files are not there; if that is wrong, set the variable nnssl_raw")
    if without_names:
        notes.append(f"the masks of {without_names} images are not used: the index does not say what they are")
    columns = ("mask", *(column for column in _MASKS if column in table))
    return Cohort(table, file.parent, columns, source=NAME, notes=notes, unused=unused)


def _load(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CohortError(f"cannot be read as JSON: {error}", where=file.name, remedy="Get the file again") from error
    if not isinstance(tree, dict) or "datasets" not in tree:
        raise CohortError(
            "not an index of images",
            where=file.name,
            expected="an object with datasets → subjects → sessions → images",
            remedy="Give pretrain_data.json, a manifest or a folder",
        )
    return tree


def _children(node: dict[str, Any], key: str, identifier: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Named children, which are an object by name or a list with names inside."""
    children = node.get(key) or {}
    pairs = (
        children.items() if isinstance(children, dict) else enumerate(children) if isinstance(children, list) else None
    )
    if pairs is None or not all(isinstance(child, dict) for _, child in pairs):
        raise CohortError(f"{key!r} is not a list of objects", where=file.name, remedy="Get the file again")
    for name, child in children.items() if isinstance(children, dict) else enumerate(children):
        yield str(child.get(identifier) if child.get(identifier) is not None else name), child


def _images(tree: dict[str, Any], file: Path) -> Iterator[tuple[str, str, str, dict[str, Any], dict[str, Any]]]:
    """(dataset, subject, session, covariates, image) of every image."""
    for index, dataset in _children(tree, "datasets", "dataset_index", file):
        label = str(dataset.get("name") or index)
        for subject_id, subject in _children(dataset, "subjects", "subject_id", file):
            person = _facts(subject.get("subject_info"))
            for session_id, session in _children(subject, "sessions", "session_id", file):
                facts = person | _facts(session.get("session_info"))
                for _, image in _children(session, "images", "", file):
                    yield label, subject_id, session_id, facts | _scanner(image.get("image_info")), image


def _facts(info: Any) -> dict[str, Any]:
    """What is a number, a word or a truth value, under the names of cohort columns."""
    if not isinstance(info, dict):
        return {}
    plain = {str(k): v for k, v in info.items() if isinstance(v, str | int | float) and _says_something(v)}
    new = known_names(plain)
    known = {new.get(column, column): value for column, value in plain.items()}
    reserved = {"subject", "session", "contrast", "path", "site", "dataset", "mask", *_MASKS}
    return {column: value for column, value in known.items() if column not in reserved}


def _says_something(value: str | float) -> bool:
    return value.strip().lower() not in _NOTHING if isinstance(value, str) else value == value  # NaN is not itself


def _scanner(info: Any) -> dict[str, Any]:
    info = info if isinstance(info, dict) else {}
    return {
        column: info[key] for key, column in SCANNER_COLUMNS.items() if isinstance(info.get(key), str | int | float)
    }


def _contrast(image: dict[str, Any], scan: Path) -> str:
    """What the index says; the name of the file only where the index says nothing."""
    said = str(image.get("modality") or "").strip()
    if said.lower() in _NO_CONTRAST:
        return scan_contrast_from_filename(scan)
    try:
        return parse_contrast(said)
    except UsageError:
        return UNKNOWN


class _Roots:
    """Resolves paths of the index: at the variable if it is set, else at the folder of the JSON."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._folder = file.parent

    def resolve(self, text: Any, what: str) -> Path:
        if not isinstance(text, str) or not text.strip():
            raise CohortError(f"{what} has no path", where=self._file.name, remedy="Get the file again")
        variable = re.match(r"\$\{?(\w+)\}?/+", text)
        if variable is None:
            return safe_join(self._folder, text, self._file, "a path")
        rest = text[variable.end() :]
        value = os.environ.get(variable.group(1))
        if value:
            return safe_join(Path(value), rest, self._file, "a path")
        # The JSON lies in $nnssl_raw/<set>/, and its paths begin with that <set>.
        parent = self._folder.resolve()
        root = parent.parent if rest.split("/")[0] == parent.name else self._folder
        return safe_join(root, rest, self._file, "a path")
