"""nnU-Net raw data sets (versions 1 and 2) and tasks of the Medical Segmentation Decathlon, which share a layout.

``dataset.json`` names the channels; ``imagesTr`` and ``imagesTs`` hold ``<case>_0000.nii.gz``, one file per channel
(nnU-Net), or ``<case>.nii.gz`` with a channel per volume (Decathlon); ``labelsTr`` holds ``<case>.nii.gz``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.contrasts import UNKNOWN
from brainfound.data.reading.archives import volume_path
from brainfound.data.reading.image_names import stem
from brainfound.data.sources.file_names import UnusedFiles, iter_images
from brainfound.data.sources.identifiers import parse_identifier
from brainfound.data.sources.persons import find_doubt
from brainfound.data.sources.tables import SourceLayout, SourceTable, read_json
from brainfound.data.sources.words import find_words, read_file_name
from brainfound.errors import CohortError

_IMAGES = {"imagesTr": "labelsTr", "imagesTs": "labelsTs"}
_CHANNEL = re.compile(r"(.+)_(\d{4})")


def can_read(path: Path) -> bool:
    """Whether a folder has a ``dataset.json`` that names channels, and ``imagesTr``."""
    return path.is_dir() and bool(_channels(read_json(path / "dataset.json"))) and (path / "imagesTr").is_dir()


def read(path: Path, work: Path | None = None) -> SourceTable:
    """Read all cases. Each case is a person, unless its name has a session (``p1_v2``)."""
    content = read_json(path / "dataset.json")
    channels = _channels(content)
    contrasts = [read_file_name([word for word, _, _ in find_words(name)]).contrast for name in channels]
    unused: UnusedFiles = []
    rows: list[dict[str, Any]] = []
    for folder, label_folder in _IMAGES.items():
        for file in iter_images(path / folder, unused):
            for number, case, scan in _scans_in(file, len(channels)):
                if number >= len(channels):
                    unused.append((file, f"a channel that dataset.json does not name ({number})"))
                elif contrasts[number] == UNKNOWN:
                    unused.append((file, f"no known contrast ({channels[number]} in dataset.json)"))
                else:
                    mask = path / label_folder / f"{case}{file.name[len(stem(file)) :]}"
                    row = {"contrast": contrasts[number], "path": str(scan), "folder": folder}
                    rows.append({"case": case, **row, "mask": str(mask) if mask.is_file() else None})
    if not rows:
        got = f"channels {', '.join(channels)}"
        remedy = "Name the channels after contrasts (T1w, FLAIR, …), or write a manifest"
        raise CohortError("no channel has a known contrast", where=path.name, got=got, remedy=remedy)
    table = pd.DataFrame(rows)
    folders = table.groupby("case")["folder"].nunique()
    if (folders > 1).any():
        what = "a case is in imagesTr and in imagesTs"
        raise CohortError(what, where=path.name, got=folders.idxmax(), remedy="Remove it from one of them")
    people = [parse_identifier(case) for case in table["case"]]
    table["subject"] = [person.subject for person in people]
    if doubt := find_doubt(people):
        remedy = "Write a manifest with subject, session, contrast, path"
        raise CohortError(f"two cases may be one person: {doubt[0]}", where=path.name, got=doubt[1], remedy=remedy)
    table["session"] = [person.session or "1" for person in people]
    notes = ["each case is taken as a person; write a manifest if one person has several"]
    if names := _label_names(content):
        notes.append(f"codes of the masks, by dataset.json: {names}")
    return SourceTable(table.drop(columns=["case", "folder"]), path, LAYOUT.name, notes=notes, unused=unused)


LAYOUT = SourceLayout("nnU-Net", "dataset.json with imagesTr/ and labelsTr/ (nnU-Net, Decathlon)", can_read, read)


def _channels(content: dict[str, Any]) -> list[str]:
    """The names of the channels in order: ``channel_names`` (version 2) or ``modality`` (version 1 and Decathlon)."""
    names = content.get("channel_names") or content.get("modality")
    if not isinstance(names, dict) or not all(str(number).isdecimal() for number in names):
        return []
    return [str(names[number]) for number in sorted(names, key=int)]


def _scans_in(file: Path, num_channels: int) -> list[tuple[int, str, Path]]:
    """(channel, case, path) of each channel that an image holds."""
    if match := _CHANNEL.fullmatch(stem(file)):
        return [(int(match.group(2)), match.group(1), file)]
    if num_channels == 1:
        return [(0, stem(file), file)]
    return [(number, stem(file), volume_path(file, number)) for number in range(num_channels)]


def _label_names(content: dict[str, Any]) -> str:
    """``1 edema, 2 tumour``; the two versions have codes as keys and as values."""
    labels = content.get("labels")
    pairs = labels.items() if isinstance(labels, dict) else ()
    both_ways = [way for one, two in pairs for way in ((str(one), str(two)), (str(two), str(one)))]
    named = {int(code): name for code, name in both_ways if code.isdecimal()}
    return ", ".join(f"{code} {name}" for code, name in sorted(named.items()) if code)
