"""Scans given on the command line or in Python → a session, with the contrast of each file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from brainfound.contrasts import UNKNOWN, parse_contrast
from brainfound.data.cohort import Session
from brainfound.data.reading.archives import require_given
from brainfound.data.reading.image_names import stem
from brainfound.data.sources.bids_files import BidsName
from brainfound.data.sources.file_names import FileName, parse_filename
from brainfound.errors import UsageError


def parse_inputs(inputs: Iterable[str]) -> tuple[list[Path], dict[str, Path]]:
    """``FILE`` and ``CONTRAST=FILE`` arguments → paths, and paths by contrast."""
    paths: list[Path] = []
    contrast_paths: dict[str, Path] = {}
    for text in inputs:
        name, equals, path = text.partition("=")
        if equals and Path(name).name == name and not Path(text).exists():
            contrast = parse_contrast(name)
            if contrast in contrast_paths:
                raise UsageError(
                    f"two scans of {contrast}", got=f"{contrast_paths[contrast]} and {path}", remedy="Give one"
                )
            contrast_paths[contrast] = Path(path)
        else:
            paths.append(Path(text))
    return paths, contrast_paths


def session_from_scans(
    paths: Sequence[str | Path],
    contrast_paths: Mapping[str, str | Path],
    contrasts: Sequence[str],
    *,
    allow_others: bool = False,
) -> tuple[Session, list[str]]:
    """Group files into one session; returns it with notes on what the file names do not state.

    Subject and session are those of BIDS names, else empty.

    Args:
        paths: scans whose file names state their contrast. A single file that does not is taken for the model's only
            remaining contrast.
        contrast_paths: scans by contrast, in any spelling.
        contrasts: contrasts that the model reads.
        allow_others: accept scans of other contrasts.

    Raises:
        UsageError: a contrast or a file is given twice, a contrast is not one of the model's, or does not follow from
            the name.
        ScanError: a file does not exist.
    """
    given = [Path(path) for path in (*paths, *contrast_paths.values())]
    for file in given:
        require_given(file)
    scans: dict[str, Path] = {}
    notes = []
    for name, path in contrast_paths.items():
        contrast, named = parse_contrast(name), parse_filename(Path(path))
        _add(scans, contrast, Path(path), None if allow_others else contrasts)
        if named.contrast != contrast and not named.is_silent:
            suggested = named.reason if named.contrast == UNKNOWN else named.contrast
            notes.append(f"{Path(path).name} was given as {contrast}, but the file name suggests {suggested}")
    for path in map(Path, paths):
        named = parse_filename(path)
        contrast = named.contrast
        if contrast == UNKNOWN:
            contrast = _only_remaining_contrast(path, named, scans, contrasts, alone=len(paths) == 1)
            if len(contrasts) > 1:
                why = "the file name does not state the contrast, and no other one was left"
                notes.append(f"{path.name} was read as {contrast}: {why}")
        _add(scans, contrast, path, None if allow_others else contrasts)
    if not scans:
        raise UsageError("no scan was given", expected=", ".join(contrasts))
    return Session(
        _stated(given, "sub", notes), _stated(given, "ses", notes).removeprefix("ses-"), scans, {}, {}
    ), notes


def _stated(files: Sequence[Path], entity: str, notes: list[str]) -> str:
    """What the BIDS names of files state, such as ``sub-01``; empty, with a note, where they contradict each other."""
    names = [BidsName.parse(file).entities for file in files if file.name.startswith("sub-")]
    stated = sorted({f"{entity}-{name[entity]}" for name in names if name.get(entity)})
    if len(stated) > 1:
        what = {"sub": "subjects", "ses": "sessions"}[entity]
        notes.append(f"the names of the files state {len(stated)} different {what}")
    return stated[0] if len(stated) == 1 else ""


def _only_remaining_contrast(
    path: Path, named: FileName, scans: Mapping[str, Path], contrasts: Sequence[str], alone: bool
) -> str:
    left = [name for name in contrasts if name not in scans]
    if alone and len(left) == 1 and named.is_silent:
        return left[0]
    raise _no_contrast_error(path, named, left or contrasts)


def _no_contrast_error(file: Path, named: FileName, contrasts: Sequence[str]) -> UsageError:
    """The error for a file, given as a scan, whose name states no contrast, and for one that names a label map."""
    if named.label_column:
        scan = re.sub(r"(_label-[^_]+)?_(mask|dseg)$", "", stem(file))
        return UsageError(
            "this is a label map by its name, not a scan",
            where=file.name,
            expected=f"a scan: {', '.join(contrasts)}",
            remedy=f"Give the scan that it was drawn on, such as {scan}_{contrasts[0]}.nii.gz",
        )
    return UsageError(
        "the file name does not state the contrast",
        where=file.name,
        got=None if named.is_silent else named.reason,
        expected=", ".join(contrasts),
        remedy=f"Name the contrast: {contrasts[-1]}={file.name}",
    )


def _add(scans: dict[str, Path], contrast: str, path: Path, contrasts: Sequence[str] | None) -> None:
    if contrasts is not None and contrast not in contrasts:
        raise UsageError(
            f"the model was not trained with {contrast}",
            where=path.name,
            expected=", ".join(contrasts),
            remedy="Leave this scan out, or use a model that knows it",
        )
    if contrast in scans:
        raise UsageError(f"two scans of {contrast}", got=f"{scans[contrast].name} and {path.name}", remedy="Give one")
    for other, file in scans.items():
        if file.resolve() == path.resolve():
            raise UsageError(
                f"the same file is given as {other} and as {contrast}", where=path.name, remedy="Give it once"
            )
    scans[contrast] = path
