"""Quality of each scan in a stack: geometry, foreground, intensities, and whether the skull was stripped.

Axis legend: X left → right, Y posterior → anterior, Z inferior → superior.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from brainfound.data.reading.scan import Scan

SkullState = Literal["stripped", "head", "unclear"]

MAX_BRAIN_ML = 2200.0
"""Adult brains have 1,000 to 1,800 ml; a larger foreground is not a brain alone."""
MIN_HEAD_ML = 2400.0
"""Whole adult heads have 3,000 ml and more; volumes between the two limits are unclear."""
MIN_CUT_FACE_SHARE = 0.15
"""A face of the volume cuts the head or brain if it shows more than this share of the largest cross-section. A brain in
a tight crop shows a small cap: about 3 % per mm outside of the face."""


@dataclass(frozen=True)
class ScanQuality:
    """Measurements of one scan of a stack.

    Attributes:
        file: its file name.
        orientation: axis codes of the stored array, such as ``LPS``.
        shape, spacing_mm, dtype: of the stored array, along its own axes.
        foreground_ml: volume of the head or brain.
        skull: see `skull_state`.
        intensity_low, intensity_high: the values that became the lowest and the highest pixel value.
        minimum, maximum: over all voxels.
        overlap: share of the reference scan's foreground inside the field of view; 1 for the reference.
        cropped: share of the scan's foreground outside of the stack.
        num_slices: slices of the stack.
        notes: remarks for a person.
    """

    contrast: str
    file: str
    orientation: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    dtype: str
    foreground_ml: float
    skull: SkullState
    intensity_low: float
    intensity_high: float
    minimum: float
    maximum: float
    overlap: float
    cropped: float
    num_slices: int
    notes: tuple[str, ...] = ()

    def to_row(self) -> dict[str, Any]:
        """Plain values for a table: sizes joined by ``x``, notes by ``; ``, numbers to four digits."""
        row: dict[str, Any] = asdict(self)
        row["shape"] = "x".join(map(str, self.shape))
        row["spacing_mm"] = "x".join(f"{s:.4g}" for s in self.spacing_mm)
        row["notes"] = "; ".join(self.notes)
        return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def skull_state(scan: Scan, inside: Bool[np.ndarray, "X Y Z"], foreground_ml: float) -> SkullState:
    """Whether a scan shows a brain alone or a whole head, from the volume of its foreground.

    A stripped brain lies on one exact background value, has at most `MAX_BRAIN_ML`, and ends within the volume.
    More than `MIN_HEAD_ML` is a head. A slab, an infant's head with its neck, or a brain in noise is ``unclear``.
    """
    if foreground_ml > MIN_HEAD_ML:
        return "head"
    outside = scan.data[::3, ::3, ::3][~inside[::3, ::3, ::3]]
    exact = outside.size > 0 and outside.min() == outside.max()
    return "stripped" if exact and foreground_ml <= MAX_BRAIN_ML and not _is_cut(inside) else "unclear"


def _is_cut(inside: Bool[np.ndarray, "X Y Z"]) -> bool:
    """Whether a face of the volume cuts the foreground; every third voxel of a cross-section is enough."""
    for axis in range(3):
        planes = np.moveaxis(inside, axis, 0)[:, ::3, ::3]
        areas = np.count_nonzero(planes, axis=(1, 2))
        if max(areas[0], areas[-1]) > MIN_CUT_FACE_SHARE * areas.max():
            return True
    return False
