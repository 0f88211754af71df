"""The rules of `brainfound check` for scans and sessions: one function per question.

A rule returns a finding: ``ok``; ``note`` (nothing is wrong); ``warn`` (a person should look); ``fail`` (not what
the model is for). It returns None if the model's contract does not cover its question.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from brainfound.data.checking.contract import InputContract, missing_contrast_note
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import ScanQuality
from brainfound.data.reading.scan import Scan, labels_in

Level = Literal["ok", "note", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warn", "fail")
LEVEL_SYMBOLS: dict[Level | None, str] = {"ok": "✓", "note": "·", "warn": "!", "fail": "✗", None: ""}

SCAN_CHECKS = ("contrast", "file", "orientation", "spacing", "intensity", "skull", "field", "position", "overlap")
SESSION_CHECKS = ("slices", "age")

MAX_SPACING_RATIO = 1.5
"""Longest voxel edge over the longest one in training."""
MAX_GRID_SPACING_RATIO = 3.0
"""For a model without a contract: longest voxel edge over that of the stack's grid."""
FEW_VALUES = 40
"""Fewer different values are a coarse quantisation."""
MAX_CLIPPED_SHARE = 0.02
"""Share of the foreground at the highest value; robust scaling in other tools clips at most 0.5 to 1 %."""
MAX_NEGATIVE_SHARE = 0.2
"""Share of the foreground's upper end; a minimum further below 0 is not the ringing of an interpolation."""
MAX_OUT_OF_RANGE_SHARE = 0.05
"""Share of the foreground outside of a contrast's fixed range."""
MIN_OVERLAP_SHARE, MAX_CROPPED_SHARE = 0.9, 0.02
"""Shares of the foreground: inside the field of view; outside of the stack."""
FOREGROUND_ML = (300.0, 7000.0)
"""Plausible volumes of a brain or head, including a newborn's, for a model without a contract."""
FOREGROUND_SLACK, SLICES_SLACK = 1.6, 1.33
"""Accepted factors beyond the extremes of training, for volumes and numbers of slices."""
SURE_FOREGROUND_SLACK, SURE_SLICES_SLACK = 3.0, 3.0
"""Factors beyond which nothing but a wrong scale or a part of a head remains: a newborn's head has a third of the
volume of a small adult's."""
SURE_FOREGROUND_ML = (FOREGROUND_ML[0] / 2, FOREGROUND_ML[1] * 2)
"""Volumes that no head has, for a model without a contract."""


@dataclass(frozen=True)
class Finding:
    """The result of one rule."""

    check: str
    level: Level
    message: str = ""
    remedy: str = ""


def worst_level(findings: Sequence[Finding]) -> Level:
    """The gravest level; ``ok`` without findings."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def orientation_findings(scan: Scan) -> list[Finding]:
    """Is the orientation in the header complete and consistent?"""
    notes = scan.notes if scan.header is None else scan.header.notes
    if not notes:
        return [Finding("orientation", "ok")]
    remedy = "Compare left and right with a viewer and the scanner's images; convert again from DICOM if in doubt"
    return [Finding("orientation", "warn", note, remedy) for note in notes]


def spacing_finding(quality: ScanQuality, contract: InputContract) -> Finding | None:
    """Are the voxels about as fine as in training?"""
    longest = max(quality.spacing_mm)
    if contract.is_measured:
        most = contract.coarsest_mm.get(quality.contrast)
        if most is None:
            return None
        limit, what = MAX_SPACING_RATIO * most, f"the coarsest training scan of {quality.contrast} had {most:.3g} mm"
    else:
        fixed = [spacing for spacing in contract.spacing_mm if spacing is not None]
        if not fixed:
            return None
        limit, what = MAX_GRID_SPACING_RATIO * max(fixed), f"the model's grid has {max(fixed):g} mm"
    if longest <= limit:
        return Finding("spacing", "ok")
    remedy = "Expect worse answers; use a finer scan where there is one, or a model that learnt from such scans"
    return Finding("spacing", "warn", f"voxels are up to {longest:.3g} mm long; {what}", remedy)


def contrast_finding(contrast: str, contract: InputContract) -> Finding:
    """Did the model see this contrast in training?"""
    if not contract.is_measured or contrast in contract.coarsest_mm:
        return Finding("contrast", "ok")
    message = f"no training session had {contrast}: the model never learnt to read it"
    return Finding("contrast", "warn", message, "Leave this contrast out")


def missing_contrast_findings(contrasts: Collection[str], contract: InputContract) -> list[Finding]:
    """Are all contrasts present that training never lacked?"""
    absent = [contrast for contrast in contract.never_absent if contrast not in contrasts]
    remedy = "Give it, or use a model trained with contrast dropout"
    return [Finding("contrast", "warn", missing_contrast_note(contrast), remedy) for contrast in absent]


def intensity_findings(
    scan: Scan, quality: ScanQuality, contract: InputContract, preprocessing: Preprocessing
) -> list[Finding]:
    """Is it an image, with plausible values?"""
    values = scan.data[::2, ::2, ::2].ravel()
    different = np.unique(values)
    if labels_in(scan) != "no":
        message = f"only {len(different)} different values, as in a mask or label map"
        return [Finding("intensity", "fail", message, "Give the image from which the mask was drawn")]
    findings: list[Finding] = []

    def add(level: Level, message: str, remedy: str = "") -> None:
        findings.append(Finding("intensity", level, message, remedy))

    for note in scan.notes[len(scan.header.notes) :] if scan.header else ():
        add("warn", note, "Look at the scan, or export it again")
    if len(different) < FEW_VALUES:
        message = f"only {len(different)} different values: too coarsely quantised"
        add("warn", message, "Export the scan again with 12 or 16 bits")
    foreground = int(np.count_nonzero(values > quality.intensity_low))
    at_top = int(np.count_nonzero(values == quality.maximum)) / max(foreground, 1)
    if at_top > MAX_CLIPPED_SHARE:
        message = f"{at_top:.0%} of the foreground has the highest value, {quality.maximum:g}: it was clipped"
        add("warn", message, "Use the scan as it was before it was windowed or rescaled")
    low = quality.minimum
    if low < 0 and low < -MAX_NEGATIVE_SHARE * abs(quality.intensity_high):
        message = f"values down to {low:g}: magnitude images are not negative"
        add("warn", message, "Check that it is no CT, phase image or z-scored copy")
    elif low < 0 and contract.negative_values is False:
        add("note", f"small negative values down to {low:g}, which no training scan had")
    if quality.contrast in preprocessing.ranges:
        low, high = preprocessing.ranges[quality.contrast]
        nonzero = values[values != 0]
        share = float(((nonzero < low) | (nonzero > high)).mean()) if nonzero.size else 0.0
        if share > MAX_OUT_OF_RANGE_SHARE:
            message = f"{share:.0%} of the voxels lie outside of {low:g} to {high:g}, the model's fixed range"
            add("fail" if share > 0.5 else "warn", message, "Check the unit of the map")
    return findings or [Finding("intensity", "ok")]


def skull_finding(quality: ScanQuality, contract: InputContract) -> Finding | None:
    """Is the skull stripped or present, as in the training scans of this contrast?"""
    trained = contract.skull.get(quality.contrast, "unknown")
    if trained in ("mixed", "unknown"):
        return None
    if quality.skull == trained:
        return Finding("skull", "ok")
    names = {"stripped": "skull-stripped brains", "head": "whole heads"}
    if quality.skull == "unclear":
        message = f"cannot tell whether this is a whole head; the model learnt from {names[trained]}"
        return Finding("skull", "warn", message, "Look at it: brainfound check --png")
    message = f"{names[quality.skull]} here, but the model learnt from {names[trained]}"
    if trained == "head":
        return Finding("skull", "fail", message, "Give the scans as acquired, before skull-stripping")
    hooks = " ".join(f"--hook {name}" for name in contract.hooks) or "--hook synthstrip"
    return Finding("skull", "fail", message, f"Strip the skulls first, as in: brainfound prepare … {hooks}")


def field_of_view_findings(quality: ScanQuality, contract: InputContract) -> list[Finding]:
    """Is a whole head or brain in the scan, and does it fit into the stack?"""
    (low, high), (least, most) = FOREGROUND_ML, SURE_FOREGROUND_ML
    if contract.foreground_ml is not None:
        smallest, largest = contract.foreground_ml
        low, high = smallest / FOREGROUND_SLACK, largest * FOREGROUND_SLACK
        least, most = smallest / SURE_FOREGROUND_SLACK, largest * SURE_FOREGROUND_SLACK
    findings = []
    if not low <= quality.foreground_ml <= high:
        message = f"the head or brain has {quality.foreground_ml:.0f} ml; {low:.0f} to {high:.0f} were expected"
        remedy = "Check the voxel size, and that the whole head is in the field of view"
        level: Level = "warn" if least <= quality.foreground_ml <= most else "fail"
        findings.append(Finding("field", level, message, remedy))
    if quality.cropped > MAX_CROPPED_SHARE:
        rows, columns = contract.size
        message = f"{quality.cropped:.0%} of the head or brain falls outside of the model's {rows} × {columns} pixels"
        remedy = "Check the position of the head; for a new model choose a larger size"
        findings.append(Finding("field", "warn", message, remedy))
    return findings or [Finding("field", "ok")]


def overlap_finding(quality: ScanQuality) -> Finding:
    """Does the field of view cover the foreground of the session's reference scan?"""
    if quality.overlap >= MIN_OVERLAP_SHARE:
        return Finding("overlap", "ok")
    message = f"covers {quality.overlap:.0%} of what the session's reference scan shows"
    return Finding("overlap", "warn", message, "Check that the scans belong together; what is not covered stays black")


def slices_finding(num_slices: int, contract: InputContract) -> Finding | None:
    """Does the stack have about as many slices as in training?"""
    if contract.num_slices is None:
        return None
    fewest, most = contract.num_slices
    if fewest / SLICES_SLACK <= num_slices <= most * SLICES_SLACK:
        return Finding("slices", "ok")
    message = f"{num_slices} slices; training stacks had {fewest} to {most}"
    surely = not fewest / SURE_SLICES_SLACK <= num_slices <= most * SURE_SLICES_SLACK
    remedy = "Check that the scan shows the whole head, and its spacing along z"
    return Finding("slices", "fail" if surely else "warn", message, remedy)


def age_finding(age_years: Any, contract: InputContract) -> Finding | None:
    """Is the age within the range of training?"""
    if contract.age_years is None:
        return None
    youngest, oldest = contract.age_years
    try:
        age = float(age_years)
    except (TypeError, ValueError):  # also None
        age = math.nan
    if math.isnan(age):
        return Finding("age", "note", f"the age is not known; the model saw {youngest:g} to {oldest:g} years")
    if youngest <= age <= oldest:
        return Finding("age", "ok")
    message = f"{age:g} years; the model saw {youngest:g} to {oldest:g}"
    return Finding("age", "warn", message, "Do not trust answers beyond the ages that the model saw")
