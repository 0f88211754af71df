"""The exceptions that users see.

Every message is one line that says what is wrong, where, what came, what was expected and one thing
that fixes it. The command line prints that line and ends with the exception's exit code:
0 done, 1 failed, 2 bad usage or recipe, 3 some inputs were rejected (the rest was done).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SOME_REJECTED = 3


class BrainFoundError(Exception):
    """Base of every error that is the input's or the user's to fix.

    Args:
        what: what is wrong, without a full stop.
        where: the file, recipe key or argument it concerns.
        got: what came.
        expected: what was expected.
        remedy: one thing that fixes it, as an imperative sentence.
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
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.got = None if got is None else str(got)
        self.expected = None if expected is None else str(expected)
        self.remedy = remedy
        super().__init__(self._one_line())

    @property
    def reason(self) -> str:
        """The line without where: for tables that say that in a column of its own."""
        return self._one_line(with_where=False)

    def _one_line(self, with_where: bool = True) -> str:
        text = f"{self.where}: {self.what}" if with_where and self.where is not None else self.what
        facts = [
            f"{word} {value}" for word, value in (("got", self.got), ("expected", self.expected)) if value is not None
        ]
        if facts:
            text += f" ({', '.join(facts)})"
        if self.remedy:
            text += f". {self.remedy}"
        return " ".join(text.split())

    def __reduce__(self):
        # Keyword-only arguments do not survive the default pickling between worker processes.
        return (_rebuild, (type(self), self.what, self.where, self.got, self.expected, self.remedy))


def _rebuild(kind, what, where, got, expected, remedy):
    return kind(what, where=where, got=got, expected=expected, remedy=remedy)


class UsageError(BrainFoundError):
    """A command or a call was given arguments that cannot work (exit code 2)."""

    exit_code = EXIT_USAGE


class RecipeError(UsageError):
    """A recipe is unknown, malformed, or has a key or a value that is refused (exit code 2)."""


class ScanError(BrainFoundError):
    """One scan cannot be used; the others go on."""


class CohortError(BrainFoundError):
    """A source folder or manifest cannot be read as a cohort."""


class StoreError(BrainFoundError):
    """A prepared store is missing, incomplete or of another schema."""


class ModelError(BrainFoundError):
    """A checkpoint, bundle or backbone cannot be used as asked."""


class TrainingError(BrainFoundError):
    """Training cannot start, or was stopped to protect the result."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the nearest known name, or lists the known names.

    >>> did_you_mean("flare", ["FLAIR", "T1w"])
    'Did you mean FLAIR?'
    """
    known = list(known)
    close = closest_name(name, known)
    return f"Did you mean {close}?" if close else f"Known names: {', '.join(sorted(known))}"


def closest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that a user most likely meant; None if none is near.

    >>> closest_name("rollback", ["stop", "roll_back"])
    'roll_back'
    """
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    close += [k for k in lower if len(name) > 2 and k.startswith(name.lower())]
    return lower[close[0]] if close else None
