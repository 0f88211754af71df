"""Names and aliases of MRI contrasts.

Canonical names are BIDS suffixes (1.10, "Magnetic Resonance Imaging"), or names usual in the field: T1ce, ADC.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from brainfound.errors import UsageError, did_you_mean

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Contrast:
    """One contrast: canonical name, BIDS suffixes, and aliases in file names (lower case)."""

    name: str
    bids_suffixes: tuple[str, ...]
    aliases: tuple[str, ...]
    description: str


_T1CE_ALIASES = ("t1c", "t1ce", "t1gd", "t1post", "t1cw", "t1wce", "t1wc", "t1km")
_FLAIR_ALIASES = ("flair", "t2f", "t2flair", "flairw", "fl")
_TABLE = (
    Contrast("T1w", ("T1w", "UNIT1"), ("t1", "t1n", "t1w", "mprage", "spgr", "mp2rage", "unit1"), "T1-weighted"),
    Contrast("T1ce", ("T1ce",), _T1CE_ALIASES, "T1-weighted after a gadolinium contrast agent"),
    Contrast("T2w", ("T2w",), ("t2", "t2w"), "T2-weighted"),
    Contrast("FLAIR", ("FLAIR",), _FLAIR_ALIASES, "T2-weighted with fluid-attenuated inversion recovery"),
    Contrast("PDw", ("PDw",), ("pd", "pdw"), "proton-density-weighted"),
    Contrast("T2starw", ("T2starw", "T2star"), ("t2s", "t2star", "t2starw", "gre"), "T2*-weighted gradient echo"),
    Contrast("SWI", ("swi",), ("swi", "swan"), "susceptibility-weighted"),
    Contrast("DWI", ("dwi", "trace"), ("dwi", "dwib1000", "b1000", "trace"), "diffusion-weighted (b about 1000 s/mm2)"),
    Contrast("ADC", ("ADC", "adc"), ("adc", "md"), "apparent diffusion coefficient"),
    Contrast("MRA", ("angio",), ("mra", "tof", "angio"), "angiography"),
    Contrast(UNKNOWN, (), ("unknown", "scan"), "not identified"),
)

CONTRASTS: dict[str, Contrast] = {contrast.name: contrast for contrast in _TABLE}
_BY_ALIAS = {alias: c.name for c in _TABLE for alias in (c.name.lower(), *c.aliases)}


def parse_contrast(text: str) -> str:
    """The canonical name of a contrast, from any known spelling; UsageError suggests the nearest one.

    >>> parse_contrast("t1gd"), parse_contrast("DWI_b1000"), parse_contrast("t2*")
    ('T1ce', 'DWI', 'T2starw')
    """
    name = _BY_ALIAS.get(re.sub(r"[^a-z0-9*]", "", text.lower()).replace("t2*", "t2star"))
    if name is None:
        remedy = did_you_mean(text, [*_BY_ALIAS, *CONTRASTS])
        if not remedy.startswith("Did"):  # nothing is close: list the names without aliases
            remedy = did_you_mean(text, set(CONTRASTS) - {UNKNOWN})
        raise UsageError(f"unknown contrast {text!r}", remedy=remedy)
    return name


def parse_contrasts(names: str | Iterable[str]) -> tuple[str, ...]:
    """Canonical names from a list or comma-separated text; validates recipe fields, and therefore raises ValueError."""
    if not isinstance(names, Iterable):
        raise ValueError("contrasts must be a list of names")
    try:
        return tuple(parse_contrast(str(name)) for name in (names.split(",") if isinstance(names, str) else names))
    except UsageError as error:
        raise ValueError(str(error)) from None
