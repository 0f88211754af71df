"""Which contrast each scan of one session is: said by a keyword, or by the name of the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from brainfound.contrasts import UNKNOWN, contrast_from_filename, parse_contrast
from brainfound.errors import ScanError, UsageError


def resolve_scans(
    paths: Sequence[str | Path],
    contrast_paths: Mapping[str, str | Path],
    contrasts: Sequence[str],
) -> tuple[dict[str, Path], list[str]]:
    """The scans of a session by contrast, and what a reader should know of their names.

    Args:
        paths: scans whose file names say their contrast. A single one whose name says nothing is taken for the
            model's contrast if only one is left.
        contrast_paths: scans by contrast, in any spelling.
        contrasts: those that the model reads.

    Raises:
        UsageError: a contrast is given twice, is not one of the model's, or cannot be told from the name.
        ScanError: a file is not there.
    """
    given = _ScanSet(contrasts)
    notes = []
    for name, path in contrast_paths.items():
        contrast, announced = parse_contrast(name), contrast_from_filename(path)
        given.add(contrast, Path(path))
        if announced not in (UNKNOWN, contrast):
            notes.append(f"{Path(path).name} was read as {contrast}, as asked, but its name says {announced}")
    for file in map(Path, paths):
        contrast = given.infer_contrast(file, alone=len(paths) == 1)
        given.add(contrast, file)
        if len(contrasts) > 1 and contrast_from_filename(file) == UNKNOWN:
            notes.append(f"{file.name} was read as {contrast}: its name does not say, and no other contrast was left")
    if not given.files:
        raise UsageError("no scan was given", where="predict", expected=", ".join(contrasts))
    return given.files, notes


class _ScanSet:
    def __init__(self, contrasts: Sequence[str]) -> None:
        self.contrasts = contrasts
        self.files: dict[str, Path] = {}

    def infer_contrast(self, path: Path, alone: bool) -> str:
        contrast = contrast_from_filename(path)
        if contrast != UNKNOWN:
            return contrast
        if not path.is_file():
            raise ScanError(
                "no such file", where=path, remedy="Check the path; scans are given as FILE or CONTRAST=FILE"
            )
        left = [name for name in self.contrasts if name not in self.files]
        if alone and len(left) == 1:
            return left[0]
        raise UsageError(
            "the contrast cannot be told from the file name",
            where=path.name,
            expected=", ".join(left or self.contrasts),
            remedy=f"Say it: {(left or self.contrasts)[-1]}={path.name}",
        )

    def add(self, contrast: str, path: Path) -> None:
        if contrast not in self.contrasts:
            raise UsageError(
                f"the model was not trained with {contrast}",
                where=path.name,
                expected=", ".join(self.contrasts),
                remedy="Leave this scan out, or use a model that knows it",
            )
        if contrast in self.files:
            raise UsageError(
                f"two scans of {contrast}", got=f"{self.files[contrast].name} and {path.name}", remedy="Give one"
            )
        for other, file in self.files.items():
            if file.resolve() == path.resolve():
                raise UsageError(
                    f"the same file is given as {other} and as {contrast}", where=path.name, remedy="Give it once"
                )
        self.files[contrast] = path


def parse_inputs(inputs: Iterable[str]) -> tuple[list[Path], dict[str, Path]]:
    """``FILE`` and ``CONTRAST=FILE`` arguments → paths, and paths by contrast."""
    paths: list[Path] = []
    named: dict[str, Path] = {}
    for text in inputs:
        name, equals, path = text.partition("=")
        if equals and not Path(text).exists():
            contrast = parse_contrast(name)
            if contrast in named:
                raise UsageError(f"two scans of {contrast}", got=f"{named[contrast]} and {path}", remedy="Give one")
            named[contrast] = Path(path)
        else:
            paths.append(Path(text))
    return paths, named
