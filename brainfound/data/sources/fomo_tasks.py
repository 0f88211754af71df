"""Fine-tuning tasks of FOMO25 (``fomo-task1/preprocessed``, ``…/labels``) and FOMO26 (``Task_1/Task_1/…``).

Each task folder holds ``preprocessed/sub_X/ses_Y/<sequence>.nii.gz`` and labels, per session or per subject:
``labels/sub_X/[ses_Y/]label.txt`` (or ``labels.txt``) or ``seg.nii.gz``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.contrasts import UNKNOWN
from brainfound.data.sources.covariates import MAX_AGE_YEARS, clean_covariates
from brainfound.data.sources.file_names import UnusedFiles, iter_images, parse_filename, read_scan_name, subfolders
from brainfound.data.sources.tables import SourceLayout, SourceTable
from brainfound.errors import CohortError

_AGE_TASK = "3"
_TASK = re.compile(r"task[_-]?(\d+)$", re.IGNORECASE)
_LABEL_FILES = ("label.txt", "labels.txt")
_SEGMENTATIONS = ("seg.nii.gz", "seg.nii", "label.nii.gz", "labels.nii.gz")


def can_read(path: Path) -> bool:
    """Whether the path is a task folder, its ``preprocessed``, or a folder of task folders."""
    return path.is_dir() and bool(_tasks(path))


def read(path: Path, work: Path | None = None) -> SourceTable:
    """Read the sessions with their labels.

    A segmentation becomes ``mask``; the number in a text file becomes ``label``, or ``age_years`` in task 3. Ages are
    decimal numbers and never rounded. Different tasks have different people, so with several tasks the subjects' names
    begin with the task.
    """
    unused: UnusedFiles = []
    rows: list[dict[str, Any]] = []
    tasks = _tasks(path)
    num_unlabelled = 0
    for folder in tasks:
        number = _task_number(folder)
        prefix = (f"task{number}_" if number else f"{folder.name}_") if len(tasks) > 1 else ""
        images = folder / "preprocessed"
        for subject in subfolders(images if images.is_dir() else folder, "sub_*"):
            sessions = subfolders(subject, "ses_*")
            loose = iter_images(subject, unused, without=sessions) if sessions else ()
            unused += [(file, "not in the folder of a session") for file in loose if file.name not in _SEGMENTATIONS]
            for session in sessions or [subject]:
                name = session.name if sessions else "ses_1"
                labels = _labels(folder, subject.name, name, session, is_age=number == _AGE_TASK)
                scans = _scans(session, unused)
                num_unlabelled += bool(scans) and not labels
                rows += [{"subject": prefix + subject.name, "session": name, **scan, **labels} for scan in scans]
    if not rows:
        expected = "preprocessed/sub_X/ses_1/flair.nii.gz and the like"
        remedy = "Unpack the task here"
        raise CohortError("no images of a known contrast", where=path.name, expected=expected, remedy=remedy)
    table = pd.DataFrame(rows)
    if "label" in table and not table["label"].isna().any():
        are_integers = all(float(value).is_integer() for value in table["label"])
        table["label"] = table["label"].astype(int if are_integers else float)
    source = f"{LAYOUT.name} {_task_number(tasks[0])}".strip() if len(tasks) == 1 else f"{LAYOUT.name}s"
    notes = [f"{num_unlabelled} sessions have no label"] if num_unlabelled else []
    table = clean_covariates(table, "labels", notes)
    return SourceTable(table, path, source, notes=notes, unused=unused)


LAYOUT = SourceLayout("FOMO task", "preprocessed/sub_*/ses_*/ with labels/ (FOMO25, FOMO26)", can_read, read)


def _tasks(path: Path) -> list[Path]:
    if path.name == "preprocessed" and any(path.glob("sub_*")):
        return [path.parent]
    if _is_task(path):
        return [path]
    tasks: list[Path] = []
    for child in subfolders(path, "*"):
        if _is_task(child):
            tasks.append(child)
        elif _TASK.search(child.name):
            tasks += [inner for inner in subfolders(child, "*") if _is_task(inner)]
    return tasks


def _is_task(path: Path) -> bool:
    named = _TASK.search(path.name) is not None and any(path.glob("sub_*"))
    return named or any(child.is_dir() for child in (path / "preprocessed").glob("sub_*"))


def _task_number(task: Path) -> str:
    names = (task.name, task.resolve().name, task.resolve().parent.name)
    return next((match.group(1) for name in names if (match := _TASK.search(name))), "")


def _scans(session: Path, unused: UnusedFiles) -> list[dict[str, Any]]:
    scans = []
    for file in iter_images(session, unused):
        if file.name in _SEGMENTATIONS:
            continue
        contrast = read_scan_name(file).contrast
        if parse_filename(file).label_column:
            unused.append((file, "a label map that is not named seg.nii.gz"))
        elif contrast == UNKNOWN:
            unused.append((file, "no known contrast in the name"))
        else:
            scans.append({"contrast": contrast, "path": str(file)})
    return scans


def _labels(task: Path, subject: str, session: str, images: Path, *, is_age: bool) -> dict[str, Any]:
    """Labels of a session: those in its folder, else those of the subject, else those next to the images."""
    for folder in (task / "labels" / subject / session, task / "labels" / subject, images):
        labels: dict[str, Any] = {}
        for name in _SEGMENTATIONS:
            if (folder / name).is_file():
                labels.setdefault("mask", str(folder / name))
        for name in _LABEL_FILES:
            if (folder / name).is_file():
                labels.setdefault("age_years" if is_age else "label", _read_number(folder / name, task, is_age=is_age))
        if labels:
            return labels
    return {}


def _read_number(file: Path, task: Path, *, is_age: bool) -> float:
    """The only number of a label file; an age must be between 0 and 150."""
    where = file.relative_to(task)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CohortError(f"the label cannot be read ({error})", where=where, remedy="Get it again") from error
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (is_age and not 0 <= value <= MAX_AGE_YEARS):
        raise CohortError(
            "the label is not one number",
            where=where,
            got=repr(" ".join(text.split())[:40]),
            expected="an age in years" if is_age else "a number",
            remedy="Get the file again or correct it",
        )
    return value
