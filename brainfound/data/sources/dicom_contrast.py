"""The contrast of a converted DICOM series, from what dcm2niix writes beside it.

The rules, in this order; what none of them decides stays ``unknown``, since a wrong contrast is worse than none:

1. ``ImageType``: ADC is an ADC map, a trace is a DWI; phase, projections and other derived maps are unknown.
2. Words of ``SeriesDescription``, then of ``ProtocolName``. Localizers, functional, perfusion and other series that
   are no structural contrast are unknown; so is a text with words of two contrasts (FLAIR beside T2 and T1 beside
   FLAIR are one).
3. Times of the sequence, in seconds, only where all of them say the same: an inversion-prepared gradient echo with
   TI 0.6–1.3 and TE < 0.01 is T1w; a spin echo with TE ≥ 0.07 and TR ≥ 2 is T2w without an inversion and FLAIR with
   TI 1.5–3.
4. A T1w with a contrast agent in the header, or with a word for one (post, gd), is T1ce.
"""

from __future__ import annotations

import re
from typing import Any

from brainfound.contrasts import UNKNOWN

_DERIVED = {
    *("FA", "EADC", "EXP", "TENSOR", "COLFA", "PHASE", "P", "IMAGINARY", "REAL", "MIP", "MNIP", "MINIP", "MPR"),
    *("PROJECTION IMAGE", "CBF", "CBV", "MTT", "TTP", "TMAX", "RCBV", "RCBF", "T1 MAP", "T2 MAP", "LOCALIZER"),
}
_OTHER = re.compile(
    r"\b(?:loc|localizer|localiser|scout|survey|aahead|aascout|calib\w*|asset|shim|field ?map\w*|b0 ?map|bold|fmri|"
    r"resting|rest|asl|pasl|pcasl|perf\w*|dsc|dce|pwi|cbf|cbv|mtt|ttp|spectro\w*|svs|csi|mrs|fa|eadc|map|mapit|pha|phase|"
    r"mip|mnip|minip|projection|screen ?save|report|phoenix\w*|cine|dixon|mt)\b"
)
_WORDS = (
    ("FLAIR", r"flair|dark ?fluid|t2f"),
    ("ADC", r"adc|apparent diffusion"),
    ("DWI", r"dwi|tracew?|ep2d diff\w*|diffusion|resolve|b ?1000"),
    ("SWI", r"swi|swan|ven ?bold|suscept\w*"),
    ("MRA", r"tof|mra|angio\w*"),
    ("T2starw", r"t2 ?star|t2s|hemo\w*|t2 fl2d|t2 ?gre|gre t2"),
    ("PDw", r"pd|pdw|proton density"),
    ("T2w", r"t2|t2w"),
    ("T1w", r"t1|t1w|mprage|mp ?rage|mpr|spgr|fspgr|bravo|tfl|mpr ?age"),
)
_ENHANCED = re.compile(
    r"\b(?:post|gd|gad\w*|ce|km|contrast|enhanced|postcontrast|t1c|t1ce|t1gd)\b|\+ ?(?:c|gd|gad|km)\b"
)
_NOT_ENHANCED = re.compile(r"\b(?:pre|without|non|no|w ?o|ohne|nativ)\b")


def contrast_of_series(sidecar: dict[str, Any]) -> str:
    """The contrast that a sidecar of dcm2niix speaks for, or ``"unknown"``."""
    kinds = {str(kind).upper() for kind in _list(sidecar.get("ImageType"))}
    if "ADC" in kinds or "ADC_UNSPECIFIED" in kinds:
        return "ADC"
    if kinds & {"TRACE", "TRACEW"}:
        return "DWI"
    if kinds & _DERIVED:
        return UNKNOWN
    for key in ("SeriesDescription", "ProtocolName"):
        text = _plain(sidecar.get(key))
        if _OTHER.search(text):
            return UNKNOWN
        found = _contrast_in(text)
        if found is not None:
            return _with_agent(found, text, sidecar)
    return _with_agent(_contrast_of_times(sidecar), "", sidecar)


def _plain(text: Any) -> str:
    """Small letters, with blanks for what separates words."""
    words = str(text or "").lower().replace("t2*", "t2star").replace("w/o", "without")
    return " ".join(re.sub(r"[^a-z0-9+]+", " ", words).split())


def _contrast_in(text: str) -> str | None:
    """The contrast of a text; ``unknown`` if it speaks of two, None if of none."""
    found = [contrast for contrast, words in _WORDS if re.search(rf"\b(?:{words})\b", text)]
    if "T1w" not in found and re.search(r"\b(?:t1c|t1ce|t1gd)\b", text):
        found.append("T1w")
    if not found:
        return None
    if "FLAIR" in found and "T1w" in found:  # a T1-weighted FLAIR (General Electric) is T1-weighted
        return "T1w" if set(found) == {"FLAIR", "T1w"} and not re.search(r"\bt2\b", text) else UNKNOWN
    for stronger in ("FLAIR", "SWI", "T2starw"):
        if stronger in found and set(found) <= {stronger, "T2w", "T2starw"}:
            return stronger
    if set(found) == {"ADC", "DWI"}:
        return "ADC"
    return found[0] if len(found) == 1 else UNKNOWN


def _contrast_of_times(sidecar: dict[str, Any]) -> str:
    sequence = {
        word.upper() for value in _list(sidecar.get("ScanningSequence")) for word in re.split(r"\W+", str(value))
    }
    echo, repetition, inversion = (
        _seconds(sidecar.get(key)) for key in ("EchoTime", "RepetitionTime", "InversionTime")
    )
    if "EP" in sequence or echo is None:
        return UNKNOWN
    if "GR" in sequence and inversion is not None and 0.6 <= inversion <= 1.3 and echo < 0.01:
        return "T1w"
    if "SE" in sequence and "GR" not in sequence and echo >= 0.07 and repetition is not None and repetition >= 2:
        if inversion is None and "IR" not in sequence:
            return "T2w"
        if inversion is not None and 1.5 <= inversion <= 3 and repetition >= 4:
            return "FLAIR"
    return UNKNOWN


def _with_agent(contrast: str, text: str, sidecar: dict[str, Any]) -> str:
    if contrast != "T1w" or _NOT_ENHANCED.search(text):
        return contrast
    agent = any(sidecar.get(key) for key in ("ContrastBolusIngredient", "ContrastBolusAgent"))
    return "T1ce" if agent or _ENHANCED.search(text) else contrast


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _seconds(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None
