"""From scans to a stack, by one object that training and prediction share.

Axis legend: X left → right, Y posterior → anterior, Z inferior → superior (a scan in RAS);
S slices, C contrasts, H rows, W columns (a stack).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from brainfound.contrasts import parse_contrast
from brainfound.data.foreground import bounding_box, foreground
from brainfound.data.grids import resample, resample_labels, smooth_before_downsampling
from brainfound.data.scan import Scan
from brainfound.data.stack import Stack
from brainfound.errors import ModelError, ScanError, UsageError
from brainfound.recipes import Recipe, validate

FILE_NAME = "preprocessing.json"


class Preprocessing(Recipe):
    """How scans become a stack. Saved with every store, checkpoint and bundle."""

    contrasts: tuple[str, ...] = ("T1w", "T2w", "FLAIR")
    """The contrasts, one per channel, in this order. The first one that a session has is its reference scan."""

    spacing_mm: tuple[float | None, float | None, float | None] = (1.0, 1.0, 1.0)
    """Voxel size along x, y and z after resampling; null keeps the reference scan's own (in z: the acquired slices)."""

    size: tuple[int, int] = (224, 224)
    """Rows and columns after centre cropping or padding around the foreground."""

    percentiles: tuple[float, float] = Field(default=(0.5, 99.5))
    """Foreground percentiles of each scan that become 0 and 255."""

    min_overlap: float = Field(default=0.2, ge=0, le=1)
    """A scan whose field of view covers less than this share of the reference scan's foreground is refused."""

    min_slices: int = Field(default=1, ge=1)
    """A session with fewer slices inside the foreground is refused."""

    @field_validator("contrasts", mode="before")
    @classmethod
    def _known_contrasts(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        try:
            names = tuple(parse_contrast(str(name)) for name in names)
        except UsageError as error:
            # As a ValueError it reaches the user with the recipe and key around it.
            raise ValueError(str(error)) from None
        if not names or len(set(names)) != len(names):
            raise ValueError("contrasts must be one or more different names")
        return names

    @field_validator("spacing_mm")
    @classmethod
    def _positive_spacing(cls, value: tuple[float | None, ...]) -> tuple[float | None, ...]:
        if any(s is not None and not 0.1 <= s <= 20 for s in value):
            raise ValueError("spacing_mm must lie between 0.1 and 20 mm, or be null")
        return value

    @field_validator("size")
    @classmethod
    def _positive_size(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 8 or max(value) > 2048:
            raise ValueError("size must lie between 8 and 2048 pixels")
        return value

    @field_validator("percentiles")
    @classmethod
    def _ordered_percentiles(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 100:
            raise ValueError("percentiles must rise within 0 to 100")
        return value

    def save(self, folder: str | Path) -> Path:
        """Write ``preprocessing.json`` into a folder."""
        path = Path(folder) / FILE_NAME
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Preprocessing:
        """Read ``preprocessing.json`` from a folder.

        Raises:
            ModelError: if the file is missing or is not valid JSON.
            RecipeError: if a key or value is refused.
        """
        path = Path(folder) / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(
                f"{FILE_NAME} is missing",
                where=folder,
                remedy="Without the preprocessing a model cannot be used safely; export it again",
            ) from None
        except ValueError as error:
            raise ModelError(f"not valid JSON: {error}", where=path, remedy="Export the model again") from None
        return validate(cls, content, where=str(path))

    def reference_contrast(self, available: Mapping[str, Any]) -> str:
        """The contrast whose scan gives a session its grid: the first of `contrasts` that is there."""
        for contrast in self.contrasts:
            if contrast in available:
                return contrast
        raise ScanError(
            "the session has none of the wanted contrasts",
            got=", ".join(sorted(available)) or "none",
            expected=", ".join(self.contrasts),
            remedy="Choose other contrasts, for example --set contrasts=[T1w]",
        )

    def apply(
        self,
        scans: Mapping[str, Scan],
        mask: Scan | None = None,
        *,
        covariates: Mapping[str, Any] | None = None,
        subject: str = "",
        session: str = "",
        refused: dict[str, ScanError] | None = None,
    ) -> Stack:
        """Bring the scans of one session onto one grid.

        Args:
            scans: contrast → scan; contrasts that are not wanted are ignored.
            mask: label map in the same world space as the scans.
            covariates, subject, session: carried along.
            refused: if given, a scan (not the reference) or mask that cannot be used is recorded here under its
                contrast (``"mask"`` for the mask) and treated as absent; otherwise it raises.

        Raises:
            ScanError: no wanted contrast is there, too few slices, or a scan that does not overlap the reference.
        """
        reference = scans[self.reference_contrast(scans)]
        inside = foreground(reference)
        to_scan, grid = self._grid_of(reference, inside)
        affine = reference.affine @ to_scan
        if grid[0] < self.min_slices:
            raise ScanError(
                "too few slices inside the foreground",
                got=grid[0],
                expected=f"at least {self.min_slices}",
                remedy="Lower min_slices or leave the session out",
            )
        pixels = np.zeros((grid[0], len(self.contrasts), *grid[1:]), dtype=np.uint8)
        present = np.zeros(len(self.contrasts), dtype=bool)
        for channel, contrast in enumerate(self.contrasts):
            scan = scans.get(contrast)
            if scan is None:
                continue
            try:
                self._require_overlap(scan, reference, inside)
                pixels[:, channel] = self._channel(scan, affine, grid, inside if scan is reference else None)
            except ScanError as error:
                if refused is None or scan is reference:
                    raise
                refused[contrast] = error
                continue
            present[channel] = True
        return Stack(
            pixels=pixels,
            contrasts=self.contrasts,
            present=present,
            positions_mm=_positions_mm(grid[0], float(np.linalg.norm(affine[:3, 0]))),
            affine=affine,
            native_shape=reference.native_shape,
            native_affine=reference.native_affine,
            mask=self._mask(mask, reference, inside, affine, grid, refused),
            covariates=dict(covariates or {}),
            subject=subject,
            session=session,
        )

    def _grid_of(self, scan: Scan, inside: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
        """The stack's grid: ``(4, 4)`` (slice, row, column) → index in the scan, and its shape (S, H, W)."""
        (x0, x1), (y0, y1), (z0, z1) = bounding_box(inside)
        step = np.array(
            [1.0 if s is None else s / own for s, own in zip(self.spacing_mm, scan.spacing_mm, strict=True)]
        )
        # A header's 2.0000002 mm is 2 mm: such a scan keeps its own voxels as well.
        step = np.where(np.abs(step - 1) < 1e-4, 1.0, step)
        height, width = self.size
        num_slices = max(round((z1 - z0) / step[2]) + 1, 1) if step[2] != 1 else z1 - z0 + 1
        # Where the spacing stays, rows and columns fall on the scan's own voxels, so nothing is interpolated.
        x_first = _first_index((x0 + x1) / 2, width, step[0])
        y_last = -_first_index(-(y0 + y1) / 2, height, step[1])
        z_first = (z0 + z1) / 2 - (num_slices - 1) / 2 * step[2]
        if step[2] == 1:
            z_first = z0
        to_scan = np.array(
            [
                [0.0, 0.0, step[0], x_first],
                [0.0, -step[1], 0.0, y_last],
                [step[2], 0.0, 0.0, z_first],
                [0.0, 0.0, 0.0, 1.0],
            ]
        )
        return to_scan, (num_slices, height, width)

    def _channel(
        self, scan: Scan, affine: np.ndarray, grid: tuple[int, int, int], inside: np.ndarray | None
    ) -> np.ndarray:
        """One scan as ``(S, H, W)`` uint8 on the stack's grid."""
        inside = foreground(scan) if inside is None else inside
        values = scan.data[inside]
        if values.size == 0:
            raise ScanError("no foreground found", remedy="Check that the scan shows a head or brain")
        low, high = np.percentile(values, self.percentiles)
        if not high > low:
            raise ScanError(
                "the foreground has one value only",
                got=f"percentiles {self.percentiles} both {low:g}",
                remedy="Check that the file is an image and not a mask",
            )
        scaled = (scan.data - np.float32(low)) * np.float32(255 / (high - low))
        np.clip(scaled, 0, 255, out=scaled)
        scaled[~inside] = 0
        to_scan = np.linalg.inv(scan.affine) @ affine
        # How far one step on the stack's grid reaches along each of the scan's axes, in its voxels.
        ratios = np.abs(to_scan[:3, :3]).max(axis=1)
        volume = resample(smooth_before_downsampling(scaled, ratios), to_scan, grid, order=1)
        return np.rint(volume).astype(np.uint8)

    def _mask(
        self,
        mask: Scan | None,
        reference: Scan,
        inside: np.ndarray,
        affine: np.ndarray,
        grid: tuple[int, int, int],
        refused: dict[str, ScanError] | None,
    ) -> np.ndarray | None:
        if mask is None:
            return None
        try:
            self._require_overlap(mask, reference, inside)
        except ScanError as error:
            if refused is None:
                raise
            refused["mask"] = error
            return None
        labels = mask.data.astype(np.uint8 if mask.data.max() <= 255 else np.uint16)
        return resample_labels(labels, np.linalg.inv(mask.affine) @ affine, grid)

    def _require_overlap(self, scan: Scan, reference: Scan, inside: np.ndarray) -> None:
        """Refuse a scan whose field of view misses the reference scan's foreground."""
        if scan is reference:
            return
        step = [max(n // 32, 1) for n in inside.shape]
        points = np.argwhere(inside[:: step[0], :: step[1], :: step[2]]) * step
        to_scan = np.linalg.inv(scan.affine) @ reference.affine
        mapped = points @ to_scan[:3, :3].T + to_scan[:3, 3]
        covered = ((mapped >= -0.5) & (mapped <= np.array(scan.data.shape) - 0.5)).all(axis=1)
        share = float(covered.mean()) if len(covered) else 0.0
        if share < self.min_overlap:
            raise ScanError(
                "the scan does not overlap the session's reference scan",
                got=f"{share:.0%} of its foreground covered",
                expected=f"at least {self.min_overlap:.0%}",
                remedy="Check that the files belong together and that their affines are right",
            )


def _first_index(centre: float, count: int, step: float) -> float:
    """Index of the first of ``count`` samples, ``step`` apart, centred on ``centre``."""
    first = centre - (count - 1) / 2 * step
    return float(np.floor(first)) if step == 1 else first


def _positions_mm(num_slices: int, spacing_mm: float) -> np.ndarray:
    return ((np.arange(num_slices) - (num_slices - 1) / 2) * spacing_mm).astype(np.float32)
