"""The stack (a session as slices on one grid, with the way back to the reference scan) and the quality of its scans.

Axis legend: S slices (inferior → superior), C contrasts, H rows (anterior → posterior), W columns (left → right);
X left → right, Y posterior → anterior, Z inferior → superior (a scan in RAS).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import nibabel as nib
import numpy as np
from jaxtyping import Bool, Float, Num, UInt

from brainfound.data.preprocessing.grids import resample, resample_labels
from brainfound.data.reading.scan import Scan
from brainfound.errors import UsageError

SkullState = Literal["stripped", "head", "unclear"]

MAX_BRAIN_ML = 2200.0
"""Adult brains have 1,000 to 1,800 ml; a larger foreground is more than a brain."""
MIN_HEAD_ML = 2400.0
"""Whole adult heads have 3,000 ml and more; volumes between the two limits are unclear."""
MIN_CUT_FACE_SHARE = 0.15
"""A face of the volume cuts the head or brain if it shows more than this share of the largest cross-section. A brain in
a tight crop shows a small cap: about 3 % per mm outside of the face."""


def positions_mm(num_slices: int, spacing_mm: float) -> Float[np.ndarray, "S"]:
    """Position of each slice along the slice axis, 0 in the middle of the stack."""
    return ((np.arange(num_slices) - (num_slices - 1) / 2) * spacing_mm).astype(np.float32)


@dataclass(frozen=True)
class Stack:
    """A session's co-registered scans, prepared for the model.

    Attributes:
        pixels: ``(S, C, H, W)`` uint8, or uint16 with 16 bits. Row 0 is anterior, column 0 is the subject's left;
            0 is background.
        present: ``(C,)`` whether each contrast was scanned; absent channels hold zeros.
        affine: ``(4, 4)``, (slice, row, column) → millimetres in RAS+.
        native_shape, native_affine: of the reference scan as stored.
        native_header: its qform, sform and their codes, for the images of `to_native`; None if unknown, as for a stack
            of a store.
        mask: ``(S, H, W)`` label codes, or None.
        covariates: columns of the cohort (age_years, sex, site, diagnosis, …).
    """

    pixels: UInt[np.ndarray, "S C H W"]
    contrasts: tuple[str, ...]
    present: Bool[np.ndarray, "C"]
    positions_mm: Float[np.ndarray, "S"]
    affine: Float[np.ndarray, "4 4"]
    native_shape: tuple[int, int, int]
    native_affine: Float[np.ndarray, "4 4"]
    mask: Num[np.ndarray, "S H W"] | None = None
    covariates: dict[str, Any] = field(default_factory=dict)
    subject: str = ""
    session: str = ""
    native_header: nib.Nifti1Header | None = field(default=None, repr=False, compare=False)

    @property
    def grid(self) -> tuple[int, int, int]:
        slices, _, height, width = self.pixels.shape
        return (slices, height, width)

    @property
    def spacing_mm(self) -> Float[np.ndarray, "3"]:
        """Voxel size along slices, rows and columns in millimetres."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def present_contrasts(self) -> tuple[str, ...]:
        """The names of the contrasts that were scanned."""
        return tuple(name for name, is_present in zip(self.contrasts, self.present, strict=True) if is_present)

    def to_native(self, volume: Num[np.ndarray, "S H W"], order: int = 0) -> nib.Nifti1Image:
        """Bring a volume from the stack's grid to that of the session's reference scan; UsageError for another grid.

        Order 0 is for labels (each voxel takes the label with the largest trilinear membership), order 1 for trilinear
        interpolation of real values such as probabilities. Outside of the stack the result is 0.
        """
        volume, where = np.asarray(volume), "Stack.to_native"
        if volume.shape != self.grid:
            got, expected = f"shape {volume.shape}", f"{self.grid} (slices, rows, columns)"
            raise UsageError("the volume is not on the stack's grid", where=where, got=got, expected=expected)
        if order not in (0, 1):
            raise UsageError("unknown interpolation order", where=where, got=order, expected="0 or 1")
        if volume.dtype == bool:
            volume = volume.astype(np.uint8)
        to_stack = np.linalg.inv(self.affine) @ self.native_affine
        if order == 1:
            native = resample(volume.astype(np.float32, copy=False), to_stack, self.native_shape, order=1)
        elif np.issubdtype(volume.dtype, np.integer) and volume.size and volume.min() >= 0:
            native = resample_labels(volume, to_stack, self.native_shape)
        else:
            native = resample(volume, to_stack, self.native_shape, order=0)
        if native.dtype == np.int64:
            native = native.astype(np.int32)
        return self.native_image(native)

    def native_image(self, values: Num[np.ndarray, "X Y Z ..."]) -> nib.Nifti1Image:
        """An image of values on the reference scan's grid, with the qform, the sform and the codes of that scan."""
        image = nib.Nifti1Image(values, self.native_affine, self.native_header, dtype=values.dtype)
        image.header.set_xyzt_units("mm")
        return image

    def __repr__(self) -> str:
        slices, height, width = self.grid
        names = zip(self.contrasts, self.present, strict=True)
        contrasts = ", ".join(name if here else f"({name} absent)" for name, here in names)
        spacing = " × ".join(f"{s:.2f}" for s in self.spacing_mm)
        size = f"{self.pixels.nbytes / 2**20:.1f} MiB"
        return f"Stack({slices} slices of {height} × {width}, {contrasts}, spacing_mm={spacing}, {size})"


@dataclass(frozen=True)
class ScanQuality:
    """Measurements of one scan of a stack.

    Attributes:
        orientation: axis codes of the stored array, such as ``LPS``.
        shape, spacing_mm, dtype: of the stored array, along its own axes.
        foreground_ml: volume of the head or brain.
        intensity_low, intensity_high: the values that became the lowest and the highest pixel value.
        minimum, maximum: over all voxels.
        overlap: share of the reference scan's foreground inside the field of view; 1 for the reference.
        cropped: share of the scan's foreground outside of the stack.
        num_slices: slices of the stack.
        cut_mm: length of the head or neck that the field of view of the preprocessing cuts off below.
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
    cut_mm: float = 0.0
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
        areas = np.count_nonzero(np.moveaxis(inside, axis, 0)[:, ::3, ::3], axis=(1, 2))
        if max(areas[0], areas[-1]) > MIN_CUT_FACE_SHARE * areas.max():
            return True
    return False
