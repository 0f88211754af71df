"""The exceptions that users see.

Every message is one line: the fault, its place, the value received, the value expected, and one remedy. The command
line prints it and exits with the exception's code (3: some inputs were rejected, the others were processed).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

EXIT_FAILED, EXIT_USAGE, EXIT_SOME_REJECTED = 1, 2, 3


class BrainFoundError(Exception):
    """Base of every error that a user can fix.

    Args:
        what: the fault, without a full stop.
        where: the file, recipe key or argument.
        remedy: one thing that fixes it, as an imperative sentence.
        usage: whether the command is wrong as it is written: what it names is not there or is of another kind, or
            what it would write is there already. The exit code is then that of a `UsageError`.
    """

    exit_code = EXIT_FAILED

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        remedy: str | None = None,
        usage: bool = False,
    ) -> None:
        if usage:
            self.exit_code = EXIT_USAGE
        self.what = what
        self.where = None if where is None else str(where)
        self.got = None if got is None else str(got)
        self.expected = None if expected is None else str(expected)
        self.remedy = remedy
        super().__init__(self._one_line(self.fault if where is None else f"{self.where}: {self.fault}"))

    @property
    def fault(self) -> str:
        """The fault, with the value received and the value expected."""
        facts = {"got": self.got, "expected": self.expected}
        details = ", ".join(f"{word} {value}" for word, value in facts.items() if value is not None)
        return f"{self.what} ({details})" if details else self.what

    @property
    def reason(self) -> str:
        """The message without ``where``, for tables that have a column for it."""
        return self._one_line(self.fault)

    def _one_line(self, text: str) -> str:
        return " ".join((f"{text}. {self.remedy}" if self.remedy else text).split())


class UsageError(BrainFoundError):
    """The arguments of a command or call cannot work (exit code 2)."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe is unknown or malformed, or one of its keys or values is refused (exit code 2)."""


class ScanError(BrainFoundError):
    """One scan cannot be used; the others can."""


class RefusedInputError(ScanError):
    """A session is unfit for the model, and an answer was not wanted then (exit code 3)."""

    exit_code = EXIT_SOME_REJECTED


class CohortError(BrainFoundError):
    """A source folder or manifest cannot be read as a cohort."""


class StoreError(BrainFoundError):
    """A prepared store is missing or incomplete, or has another schema."""


class ModelError(BrainFoundError):
    """A checkpoint, bundle or backbone cannot be used as requested."""


class TrainingError(BrainFoundError):
    """Training cannot start, or stopped to protect the result."""


_MARKS = {
    "store.json": "a store",
    "recipe.yaml": "a run",
    "bundle.json": "a fine-tuned model",
    "summary.json": "an experiment or an evaluation",
    "config.json": "a model",
    "dataset_description.json": "a BIDS data set",
}
"""File in a folder → what the folder is."""
_WHOLE = ("store.json", "recipe.yaml", "bundle.json")
"""Marks of folders whose subfolders are nothing by themselves."""


def describe_path(path: str | Path) -> str | None:
    """What a path leads to, in words; None for a folder without a mark, such as a folder of scans."""
    path = Path(path)
    if path.is_file():
        return "a zip archive" if path.suffix.lower() == ".zip" else "a file"
    if marks := [kind for mark, kind in _MARKS.items() if (path / mark).is_file()]:
        return marks[0]
    for parent in list(path.absolute().parents)[:3]:
        if kinds := [_MARKS[mark] for mark in _WHOLE if (parent / mark).is_file()]:
            return f"a folder inside {kinds[0]}, {parent.name}"
    try:
        return None if any(path.iterdir()) else "an empty folder"
    except OSError:
        return None


def mistaken_for(path: str | Path, due: str) -> str:
    """The fault of a path that does not lead to what is due.

    >>> mistaken_for("/no/such/folder", "a store")
    'no such file or folder'
    """
    if not Path(path).exists():
        return "no such file or folder"
    kind = describe_path(path)
    return f"this is {kind}, not {due}" if kind else f"not {due}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the nearest known name, or lists the known names.

    >>> did_you_mean("flare", ["FLAIR", "T1w"])
    'Did you mean FLAIR?'
    """
    known = list(known)
    close = closest_name(name, known)
    return f"Did you mean {close}?" if close else f"Known names: {', '.join(sorted(known))}"


def closest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that a user most likely meant; None if no name is close.

    >>> closest_name("rollback", ["stop", "roll_back"])
    'roll_back'
    """
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    close += [k for k in lower if len(name) > 2 and k.startswith(name.lower())]
    return lower[close[0]] if close else None


def closest_folder(path: str | Path, fits: Callable[[Path], bool] = Path.is_dir) -> Path | None:
    """The existing folder that a user most likely meant by a path: parts that do not exist become the nearest names."""
    path = Path(path)
    found = Path(path.anchor)
    for parent, part in zip(path.parents[::-1], path.relative_to(found).parts, strict=True):
        wanted = fits if parent == path.parent else Path.is_dir
        if not (found / part).exists():
            try:
                names = [file.name for file in found.iterdir() if not file.name.startswith(".") and wanted(file)]
            except OSError:
                return None
            part = closest_name(part, names) or ""
        if not part:
            return None
        found /= part
    return found if fits(found) else None
