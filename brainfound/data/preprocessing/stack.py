"""The stack: a session as slices on one grid, with the way back to the reference scan's own grid.

Axis legend: S slices (inferior → superior), C contrasts, H rows (anterior → posterior), W columns (left → right).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Bool, Float, Num, UInt

from brainfound.data.preprocessing.grids import resample, resample_labels
from brainfound.errors import UsageError


def positions_mm(num_slices: int, spacing_mm: float) -> Float[np.ndarray, "S"]:
    """Position of each slice along the slice axis, 0 in the middle of the stack."""
    return ((np.arange(num_slices) - (num_slices - 1) / 2) * spacing_mm).astype(np.float32)


@dataclass(frozen=True)
class Stack:
    """A session's co-registered scans, prepared for the model.

    Attributes:
        pixels: ``(S, C, H, W)`` uint8, or uint16 with 16 bits. Row 0 is anterior, column 0 is the subject's left;
            0 is background.
        contrasts: the contrast of each channel.
        present: ``(C,)`` whether each contrast was scanned; absent channels hold zeros.
        positions_mm: ``(S,)``, see `positions_mm`.
        affine: ``(4, 4)``, (slice, row, column) → millimetres in RAS+.
        native_shape: shape of the reference scan as stored.
        native_affine: ``(4, 4)`` affine of the reference scan as stored.
        mask: ``(S, H, W)`` label codes, or None.
        covariates: columns of the cohort (age_years, sex, site, diagnosis, …).
        subject, session: identifiers.
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

    @property
    def grid(self) -> tuple[int, int, int]:
        """The stack's grid, ``(S, H, W)``."""
        slices, _, height, width = self.pixels.shape
        return (slices, height, width)

    @property
    def spacing_mm(self) -> Float[np.ndarray, "3"]:
        """Voxel size along slices, rows and columns in millimetres."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def to_native(self, volume: Num[np.ndarray, "S H W"], order: int = 0) -> nib.Nifti1Image:
        """Bring a volume on the stack's grid back to the grid and affine of the session's reference scan.

        Args:
            volume: ``(S, H, W)``: label codes, or real values such as probabilities.
            order: 0 for labels (each voxel takes the label with the largest trilinear membership),
                1 for trilinear interpolation of real values. Outside of the stack the result is 0.

        Raises:
            UsageError: the volume is not on the stack's grid.
        """
        volume = np.asarray(volume)
        if volume.shape != self.grid:
            raise UsageError(
                "the volume is not on the stack's grid",
                where="Stack.to_native",
                got=f"shape {volume.shape}",
                expected=f"{self.grid} (slices, rows, columns)",
            )
        if order not in (0, 1):
            raise UsageError("unknown interpolation order", where="Stack.to_native", got=order, expected="0 or 1")
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
        image = nib.Nifti1Image(native, self.native_affine)
        image.header.set_xyzt_units("mm")
        return image

    def __repr__(self) -> str:
        slices, _, height, width = self.pixels.shape
        shown = ", ".join(
            name if here else f"({name} absent)" for name, here in zip(self.contrasts, self.present, strict=True)
        )
        spacing = " × ".join(f"{s:.2f}" for s in self.spacing_mm)
        size = f"{self.pixels.nbytes / 2**20:.1f} MiB"
        return f"Stack({slices} slices of {height} × {width}, {shown}, spacing_mm={spacing}, {size})"
