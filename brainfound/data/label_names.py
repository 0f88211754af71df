"""Names of the codes of a label map: tables that programs ship, names as people write them, and the other side."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from brainfound.errors import UsageError, closest_name

_SIDE_WORDS = {"l": "r", "left": "right", "lh": "rh", "lt": "rt"}
_OTHER_SIDE = _SIDE_WORDS | {right: left for left, right in _SIDE_WORDS.items()}
_SAME_SIDE = {"l": "left", "lh": "left", "lt": "left", "r": "right", "rh": "right", "rt": "right"}
_NAME_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_LINE = re.compile(r"\s*(\d+)\s+(\S.*?)((?:\s+\d+){3,4})?\s*")
"""FreeSurfer: code, name, and red, green, blue (alpha)."""
_SNAP_LINE = re.compile(r"\s*(\d+)(?:\s+[\d.]+){6}\s+\"(.*)\"\s*")
"""ITK-SNAP: code, colour, visibility, and the name in quotes."""


def read_lookup_table(file: str | Path) -> dict[int, str]:
    """Read the names of label codes, code → name.

    Known are FreeSurfer's colour tables (``FreeSurferColorLUT.txt``), lines of a code and a name, ITK-SNAP's label
    descriptions, tables with a header (``.csv``, ``.tsv``: one column of whole numbers, and ``name`` or the last
    column), and the ``labels`` of an nnU-Net ``dataset.json``.

    Raises:
        UsageError: the file cannot be read, holds no names, or has two names for one code.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else "cannot be read as text"
        raise UsageError(f"lookup table: {why}", where=path, remedy="Give a table of label codes and names") from None
    pairs = _read_json(text) if path.suffix.lower() == ".json" else _read_table(text) or _read_lines(text)
    if not pairs:
        raise UsageError(
            "no label codes with names",
            where=path,
            expected="lines such as '17 Left-Hippocampus', or a .csv or .tsv with a column of codes and one of names",
        )
    names: dict[int, str] = {}
    for code, name in pairs:
        if names.setdefault(code, name) != name:
            got = f"{names[code]} and {name}"
            raise UsageError(f"two names for the code {code}", where=path, got=got, remedy="Leave one of them out")
    return names


def _read_json(text: str) -> list[tuple[int, str]]:
    try:
        labels = json.loads(text)
        labels = labels.get("labels", labels)
        pairs = [(value, name) if isinstance(value, int) else (name, value) for name, value in labels.items()]
        return [(int(code), str(name)) for code, name in pairs if not isinstance(name, list)]
    except (ValueError, TypeError, AttributeError):
        return []


def _read_table(text: str) -> list[tuple[int, str]]:
    """A table with a header; nothing for another text."""
    lines = [line for line in text.splitlines() if line.strip()]
    separator = next((mark for mark in ("\t", ",", ";") if lines and mark in lines[0]), None)
    if separator is None or len(lines) < 2:
        return []
    header, *rows = csv.reader(lines, delimiter=separator)
    rows = [row for row in rows if len(row) == len(header)]
    numbers = [k for k in range(len(header)) if rows and all(re.fullmatch(r"\d+", row[k].strip()) for row in rows)]
    words = [k for k in range(len(header)) if k not in numbers]
    if not numbers or not words:
        return []
    if re.fullmatch(r"\d+", header[numbers[0]].strip()):
        rows = [header, *rows]  # a table without a header
    named = next((k for k in words if header[k].strip().lower() in ("name", "structure", "region")), words[-1])
    return [(int(row[numbers[0]]), row[named].strip()) for row in rows]


def _read_lines(text: str) -> list[tuple[int, str]]:
    found = []
    for line in text.splitlines():
        match = _SNAP_LINE.fullmatch(line) or _LINE.fullmatch(line)
        if match and re.search("[A-Za-z]", match[2]):
            found.append((int(match[1]), match[2]))
    return found


def find_codes(name: str, table: Mapping[int, str], where: str) -> list[int]:
    """The codes of a structure, by its name in a lookup table, in any case, separators and order of words.

    UsageError: the table has no such name, or several codes are called so.

    >>> find_codes("hippocampus_left", {17: "Left-Hippocampus", 53: "Right-Hippocampus"}, "")
    [17]
    """
    exact = [code for code, known in table.items() if known == name]
    codes = exact or [code for code, known in table.items() if _key(known) == _key(name)]
    if len(codes) == 1:
        return codes
    if codes:
        got = f"{name}: the codes {', '.join(map(str, codes))}"
        raise UsageError("several codes have this name", where=where, got=got, remedy="Give the codes")
    close = closest_name(name, table.values())
    remedy = f"Did you mean {close}?" if close else "Give a name of the table, or the code"
    raise UsageError("the lookup table has no such name", where=where, got=name, remedy=remedy)


def _key(name: str) -> tuple[str, ...]:
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return tuple(sorted(_SAME_SIDE.get(word.lower(), word.lower()) for word in words))


def unique_names(codes: Sequence[int], table: Mapping[int, str]) -> list[str]:
    """A name for each code: that of the table, ``label 7`` for a code without one; the same names get their code."""
    names = [table.get(code, f"label {code}") for code in codes]
    return [name if names.count(name) == 1 else f"{name} {code}" for code, name in zip(codes, names, strict=True)]


def file_label(name: str) -> str:
    """A name as part of a BIDS file name, which has letters and digits only.

    >>> file_label("ventricle_left"), file_label("Left-Hippocampus"), file_label("core")
    ('ventricleLeft', 'LeftHippocampus', 'core')
    """
    first, *others = re.findall("[A-Za-z0-9]+", name)
    return first + "".join(word[:1].upper() + word[1:] for word in others)


def mirrored_channels(names: Sequence[str]) -> tuple[int, ...]:
    """For each label, the index of its mirror image: ``ventricleR`` of ``ventricleL``, or itself if it has no side.

    UsageError: a label names a side, and not exactly one label is its mirror image.
    """
    channels, known = [], set(names)
    for index, name in enumerate(names):
        words = {match.span() for match in _NAME_WORDS.finditer(name)}
        sides = {place for place in words if name[slice(*place)].lower() in _OTHER_SIDE}
        # "VL", "lventricle" and "ventricleleft" name a side only if the other side is there too.
        places = sides | {(0, 1), (len(name) - 1, len(name))}
        places |= {match.span() for match in re.finditer("left|right", name, re.IGNORECASE)}
        others = {_with_other_side(name, place) for place in places} & (known - {name})
        if len(others) > 1 or (sides and not others):
            what = (
                f"the label {name} names a side, and {'two labels are' if others else 'no label is'} its mirror image"
            )
            remedy = "Leave flips out, or give both sides names such as ventricleL and ventricleR"
            raise UsageError(what, where="flips", got=_list(names), remedy=remedy)
        channels.append(names.index(others.pop()) if others else index)
    return tuple(channels)


def has_sides(names: Sequence[str]) -> bool:
    """Whether a label names a side, with or without a label for the other side, also glued to another word."""
    if any(re.search("^(left|right)|(left|(?<!b)right)$", name, re.IGNORECASE) for name in names):
        return True
    try:
        return mirrored_channels(names) != tuple(range(len(names)))
    except UsageError:
        return True


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _with_other_side(name: str, place: tuple[int, int]) -> str:
    word = name[slice(*place)]
    other = _OTHER_SIDE.get(word.lower(), word)
    other = other.upper() if word.isupper() else other.capitalize() if word[:1].isupper() else other
    return name[: place[0]] + other + name[place[1] :]
