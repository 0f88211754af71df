"""Names of BIDS files: entities, suffix, and what they say of contrast and order (BIDS 1.10)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

from brainfound.contrasts import CONTRASTS, UNKNOWN, parse_contrast
from brainfound.data.sources.folders import in_order, stem
from brainfound.errors import UsageError

_SUFFIXES = {suffix for contrast in CONTRASTS.values() for suffix in contrast.bids_suffixes}
_NOT_CHOICES = {"sub", "ses", "part", "ce"}
_BRAIN = re.compile(r"(?:^|_)(?:label|desc)-(?:brain|head)", re.IGNORECASE)
_TISSUE = re.compile(r"(?:^|_)(?:label|desc)-(?:ribbon|GM|WM|CSF|SCGM|CGM)(?:_|$)")


@dataclass(frozen=True)
class BidsName:
    """``sub-01_ses-a_run-2_T1w`` in parts."""

    entities: dict[str, str]
    suffix: str

    @classmethod
    def of(cls, path: PurePath) -> BidsName:
        """The parts of a file's name; parts without a hyphen before the suffix are passed over.

        >>> BidsName.of(PurePath("sub-01_run-2_T1w.nii.gz"))
        BidsName(entities={'sub': '01', 'run': '2'}, suffix='T1w')
        """
        *before, suffix = stem(path).split("_")
        pairs = (part.split("-", 1) for part in before if "-" in part)
        return cls({key: value for key, value in pairs}, suffix)

    @property
    def order(self) -> tuple:
        """Of several scans of one contrast the first is used: that with the fewest entities (so the scanner's own
        grid before ``space-…``, the plain before the reconstructed), then by echo, run and name."""
        choices = {key: value for key, value in self.entities.items() if key not in _NOT_CHOICES}
        number = [in_order(choices.get(key, "")) for key in ("echo", "run")]
        return ("space" in choices, len(choices), *number, in_order(sorted(choices.items())))


def contrast_of(name: BidsName) -> tuple[str, str]:
    """Contrast, and if it is unknown the reason why the file is no scan.

    Only the suffix counts: ``sub-01_T1w_defacemask`` is no T1w. A suffix in small letters (``t1``) is understood.
    """
    part = name.entities.get("part", "mag")
    if part != "mag":
        return UNKNOWN, f"not a magnitude image (part-{part})"
    if "inv" in name.entities:
        return UNKNOWN, "one inversion of an MP2RAGE"
    suffix = name.suffix
    if suffix not in _SUFFIXES:
        try:
            contrast = parse_contrast(suffix) if re.fullmatch(r"[A-Za-z][A-Za-z0-9]*", suffix) else UNKNOWN
        except UsageError:
            contrast = UNKNOWN
        if contrast == UNKNOWN:
            return UNKNOWN, f"no known contrast ({suffix})" if name.entities else "no known contrast in the name"
    else:
        contrast = next(known.name for known in CONTRASTS.values() if suffix in known.bids_suffixes)
    enhanced = name.entities.get("ce", "none") != "none"
    return ("T1ce" if contrast == "T1w" and enhanced else contrast), ""


def mask_column(path: PurePath) -> str | None:
    """The cohort column of a label map: ``mask`` (of a lesion), ``brain_mask``, ``dseg``; None if it is none.

    >>> mask_column(PurePath("sub-01_label-lesion_mask.nii.gz")), mask_column(PurePath("sub-01_desc-brain_mask.nii"))
    ('mask', 'brain_mask')
    """
    name = stem(path)
    if name.endswith(("_dseg", "-dseg")):
        return "dseg"
    if re.search(r"[_-](brainmask|skull-?stripped_mask)$", name):
        return "brain_mask"
    if "sub" not in BidsName.of(path).entities:  # deface_mask.nii.gz in a folder beside its scan
        return None
    if name.endswith(("_mask", "_roi")) and "_task-" not in name and not _TISSUE.search(name):
        return "brain_mask" if _BRAIN.search(name) else "mask"
    if name.endswith("_defacemask"):
        return "deface_mask"
    return None
