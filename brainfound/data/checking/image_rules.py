"""The rules of `brainfound check` that look at the image: noise, inverted values, cuts, order of slices, position.

The thresholds lie between what 114 real scans of several sites show and what faults of each kind give; none is tuned to
a file. A rule with two limits is sure beyond the first (✗) and doubtful beyond the second (!).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Num

from brainfound.data.checking.contract import InputContract
from brainfound.data.checking.mean_stack import compare
from brainfound.data.checking.rules import MAX_CROPPED_SHARE, Finding, Level
from brainfound.data.preprocessing.grids import faces
from brainfound.data.preprocessing.stack import ScanQuality
from brainfound.data.reading.scan import Scan

NOISE_LAG_MM = 3.0
"""Distance of the voxels that are compared; an interpolation reaches less far, structures of a head further."""
MIN_NEIGHBOUR_CORRELATION = (0.1, 0.2)
"""Below: noise, perhaps noise. Pure noise has 0.00; the flattest of 114 real scans has 0.31."""
MAX_DARKER_THAN_AIR = (0.9, 0.7)
"""Shares of the middle that are darker than the faces of the volume; above: inverted, perhaps. Real scans have 0.01,
values around 0 in a brain on 0 have about 0.5."""
MAX_CUT_SHARE = (0.5, 0.25)
"""The outermost cross-section over the largest; above: half a head, perhaps. In whole heads left, right, front and back
have up to 0.15."""
MAX_CUT_ABOVE = (0.8, 0.65)
"""The same above, where thick slices stop below the vertex: real ones have up to 0.57."""
MAX_CUT_BELOW = (0.85, 0.7)
"""The same below: a neck, or slices that start at the skull base, have any share. It counts only in brains, and where
the stack is lower than `LOW_STACK` times the lowest in training."""
LOW_STACK = 0.75
CUT_MM = 2.0
"""Thickness of the outermost cross-section."""
MIN_ORDER_RATIO = (0.85, 0.95)
"""A short way through all slices over the way in the given order; below: shuffled, perhaps. The least of 114 real scans
is 0.99; shuffled slices have about 0.5, even before odd ones 0.6 to 0.93."""
MIN_SLICES_FOR_ORDER = 8
TURNED_MARGIN = (0.1, 0.05)
"""How much more alike in another orientation; above: turned, perhaps. Upright real scans are at least 0.007 more alike
as they are (390 comparisons within and between cohorts); turned by 90° or mirrored they exceed 0.05 in 98 of 100."""
INVERTED_MARGIN = (0.2, 0.05)
"""How much more alike with inverted values; above: inverted or another contrast. Real scans are 0.24 more alike as they
are, across cohorts and with or without the skull."""
MIN_LIKENESS = 0.35
"""Least correlation with the mean stack of the same contrast and skull state. In 220 real comparisons,
also across cohorts, 0.56 and more; thick slices of 117 mm, which miss part of the head, give 0.24."""


def picture_findings(scan: Scan, quality: ScanQuality) -> list[Finding]:
    """Does the image show structures on a dark background, with its slices in order?"""
    return [finding for finding in (noise(scan, quality), inversion(scan), slice_order(scan, quality)) if finding]


def noise(scan: Scan, quality: ScanQuality) -> Finding | None:
    """Are neighbouring voxels alike?"""
    known = [r for axis in range(3) if (r := _neighbour_correlation(scan, quality, axis)) is not None]
    if not known:
        return None
    level = _level(-max(known), (-MIN_NEIGHBOUR_CORRELATION[0], -MIN_NEIGHBOUR_CORRELATION[1]))
    message = f"voxels {NOISE_LAG_MM:g} mm apart are hardly alike (correlation {max(known):.2f}), as in noise"
    return level and Finding("intensity", level, message, "Look at it: brainfound check --png")


def inversion(scan: Scan) -> Finding | None:
    """Is the air darker than the head?"""
    data = scan.data
    outermost = np.concatenate([plane[::2, ::2].ravel() for plane in faces(data)])
    middle = data[tuple(slice(n // 4, max(n - n // 4, n // 4 + 1)) for n in data.shape)][::2, ::2, ::2]
    share = float((middle < np.median(outermost)).mean())
    level = _level(share, MAX_DARKER_THAN_AIR)
    message = f"{share:.0%} of the middle are darker than the faces of the volume: the grey values are inverted"
    return level and Finding("intensity", level, message, "Give the image as acquired, with dark air")


def slice_order(scan: Scan, quality: ScanQuality) -> Finding | None:
    """Do slices follow each other along each axis?"""
    ratio = min(_order_ratio(scan.data, quality.intensity_low, axis) for axis in range(3))
    level = _level(-ratio, (-MIN_ORDER_RATIO[0], -MIN_ORDER_RATIO[1]))
    message = "slices are less like their neighbours than like others: they seem shuffled or interleaved"
    return level and Finding("position", level, message, "Convert again from DICOM, sorted by position")


def cut_finding(
    pixels: Num[np.ndarray, "S H W"], spacing_mm: Float[np.ndarray, "3"], quality: ScanQuality, contract: InputContract
) -> Finding | None:
    """Does the head or brain of the reference scan end in a large flat face?"""
    shares = _end_shares(pixels, spacing_mm)
    is_low = contract.num_slices is not None and len(pixels) < LOW_STACK * contract.num_slices[0]
    limits = {"below": MAX_CUT_BELOW, "above": MAX_CUT_ABOVE}
    worst: tuple[Level, str] | None = None
    for side, share in shares.items():
        if side == "below" and not (is_low or contract.skull.get(quality.contrast) == "stripped"):
            continue
        if side not in limits and quality.cropped > MAX_CROPPED_SHARE:
            continue  # the edge of the model's pixels, see `field_of_view_findings`
        level = _level(share, limits.get(side, MAX_CUT_SHARE))
        if level and (worst is None or (level, worst[0]) == ("fail", "warn")):
            worst = level, side
    if worst is None:
        return None
    level, side = worst
    message = f"the head or brain is cut off {side}: the outermost section has {shares[side]:.0%} of the largest one"
    return Finding("field", level, message, "Give the whole head")


def position_findings(
    pixels: Num[np.ndarray, "S H W"], spacing_mm: Float[np.ndarray, "3"], quality: ScanQuality, contract: InputContract
) -> list[Finding]:
    """Does the scan lie as the mean of the training scans of its contrast, with the same grey values?"""
    if not contract.is_measured:
        return []
    contrast = quality.contrast
    mean = contract.mean_stack.get(contrast)
    if mean is None:
        message = f"not compared with the training: the model holds no average of its {contrast} scans"
        return [Finding("position", "note", message, "An average takes at least three training scans of a contrast")]
    likeness = compare(pixels, spacing_mm, mean)
    if likeness is None:
        return [Finding("position", "note", f"not compared with the training: the {contrast} scan has no contours")]
    level = _level(likeness.turned - likeness.upright, TURNED_MARGIN)
    if level:
        message = "upside down, pitched or otherwise turned, compared with the mean of the training scans"
        return [Finding("position", level, message, "Look at it: brainfound check --png; then mend the header")]
    level = _level(likeness.inverted - likeness.inner, INVERTED_MARGIN)
    if level:
        message = f"bright where the training scans of {contrast} are dark: inverted, or another contrast"
        return [Finding("position", level, message, "Check the contrast, and that the values are as acquired")]
    trained = contract.skull.get(contrast, "unknown")
    if max(likeness.upright, likeness.turned) < MIN_LIKENESS and quality.skull == trained:
        message = f"hardly like the mean of the training scans (correlation {likeness.upright:.2f})"
        return [Finding("position", "warn", message, "Look at it: brainfound check --png")]
    return [Finding("position", "ok")]


def _level(value: float, limits: tuple[float, float]) -> Level | None:
    """``fail`` above the first limit, ``warn`` above the second."""
    sure, doubtful = limits
    return "fail" if value > sure else "warn" if value > doubtful else None


def _neighbour_correlation(scan: Scan, quality: ScanQuality, axis: int) -> float | None:
    """The correlation of foreground voxels `NOISE_LAG_MM` apart along an axis; None with too few of them."""
    lag = max(1, round(NOISE_LAG_MM / float(scan.spacing_mm[axis])))
    data = np.moveaxis(scan.data, axis, 0)
    if len(data) <= lag:
        return None
    first, second = (_thin(part, 64) for part in (data[:-lag], data[lag:]))
    both = (first > quality.intensity_low) & (second > quality.intensity_low)
    if np.count_nonzero(both) < 100:
        return None
    a, b = first[both], second[both]
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else None


def _thin(data: Num[np.ndarray, "n a b"], count: int) -> Num[np.ndarray, "n a b"]:
    """About ``count`` columns along each of the last two axes."""
    return data[:, :: max(data.shape[1] // count, 1), :: max(data.shape[2] // count, 1)]


def _order_ratio(data: Float[np.ndarray, "X Y Z"], low: float, axis: int) -> float:
    """The length of a greedy way through the slices over that in the given order, at most 1.

    Slices are as far apart as the root of 1 − their correlation. A slice may not follow its mirror image, since the
    two halves of a head are alike.
    """
    slices = _thin(np.moveaxis(data, axis, 0), 32).reshape(data.shape[axis], -1).astype(np.float32)
    areas = np.count_nonzero(slices > low, axis=1)
    slices = slices[areas > 0.3 * areas.max()]
    count = len(slices)
    if count < MIN_SLICES_FOR_ORDER:
        return 1.0
    slices -= slices.mean(axis=1, keepdims=True)
    slices /= np.linalg.norm(slices, axis=1, keepdims=True) + 1e-9
    distance = np.sqrt(np.clip(1 - slices @ slices.T, 0, None))
    given = float(np.diag(distance, 1).sum())
    here, there = np.indices(distance.shape)
    mirrored = (np.abs(here + there - (count - 1)) <= count // 8) & (np.abs(here - there) > 2)
    distance[mirrored] = distance.max()
    starts = range(0, count, max(count // 8, 1))
    return min(1.0, min(_greedy_length(distance, start) for start in starts) / given) if given > 0 else 1.0


def _greedy_length(distance: Float[np.ndarray, "n n"], start: int) -> float:
    left = np.ones(len(distance), dtype=bool)
    left[start], here, length = False, start, 0.0
    for _ in range(len(distance) - 1):
        steps = np.where(left, distance[here], np.inf)
        here = int(steps.argmin())
        left[here] = False
        length += float(steps[here])
    return length


def _end_shares(pixels: Num[np.ndarray, "S H W"], spacing_mm: Float[np.ndarray, "3"]) -> dict[str, float]:
    """By side, the cross-section of the outermost `CUT_MM` of the foreground over the largest cross-section."""
    inside = pixels > 0
    shares = {}
    for axis, names in enumerate((("below", "above"), ("in front", "behind"), ("on the left", "on the right"))):
        areas = np.count_nonzero(_thin(np.moveaxis(inside, axis, 0), 64), axis=(1, 2))
        places = np.flatnonzero(areas > 0.01 * areas.max()) if areas.any() else np.array([0])
        areas = areas[places[0] : places[-1] + 1]
        width = max(1, round(CUT_MM / float(spacing_mm[axis])))
        for name, end in zip(names, (areas[:width], areas[-width:]), strict=True):
            shares[name] = float(end.mean() / max(areas.max(), 1))
    return shares
