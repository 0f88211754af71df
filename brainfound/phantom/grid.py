"""Regular grids in millimetres, separable interpolation between them, and smooth random fields.

Interpolation and averaging use one small matrix per axis, which is exact for axis-aligned grids and fast.

Axes: X Y Z voxels along right, anterior, superior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import BSpline, CubicSpline

# The field of view in head coordinates (mm, RAS, origin near the anterior commissure), down to the foramen magnum.
HEAD_CENTER_MM = (0.0, -17.0, 8.0)
HEAD_EXTENT_MM = (180.0, 216.0, 180.0)


@dataclass(frozen=True)
class Grid:
    """An axis-aligned grid: `shape` voxels of `spacing_mm`, centred at `center_mm` (RAS)."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    center_mm: tuple[float, float, float] = HEAD_CENTER_MM

    @classmethod
    def covering_head(cls, spacing_mm: float | Sequence[float], extent_mm: Sequence[float] = HEAD_EXTENT_MM) -> Grid:
        """A grid of the given spacing that covers the head."""
        dx, dy, dz = (spacing_mm,) * 3 if isinstance(spacing_mm, int | float) else spacing_mm
        nx, ny, nz = (max(round(extent / step), 4) for extent, step in zip(extent_mm, (dx, dy, dz), strict=True))
        return cls((nx, ny, nz), (float(dx), float(dy), float(dz)))

    def axis_mm(self, axis: int) -> np.ndarray:
        """Voxel centres along one axis, in mm."""
        index = np.arange(self.shape[axis], dtype=np.float64) - (self.shape[axis] - 1) / 2
        return index * self.spacing_mm[axis] + self.center_mm[axis]

    def offsets_mm(self, origin_mm: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0)) -> list[np.ndarray]:
        """Offsets from a point along x, y and z, float32, shaped (X, 1, 1), (1, Y, 1) and (1, 1, Z) to broadcast."""
        axes = ((self.axis_mm(a) - origin_mm[a]).astype(np.float32) for a in range(3))
        return list(np.meshgrid(*axes, indexing="ij", sparse=True))

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) voxel index → mm RAS."""
        affine = np.diag([*self.spacing_mm, 1.0])
        affine[:3, 3] = [self.axis_mm(axis)[0] for axis in range(3)]
        return affine


def cubic_matrix(source_mm: np.ndarray, target_mm: np.ndarray) -> np.ndarray:
    """(target, source) float32 matrix of cubic-spline interpolation along one axis."""
    spline = CubicSpline(source_mm, np.eye(len(source_mm)), bc_type="natural")
    return spline(np.clip(target_mm, source_mm[0], source_mm[-1])).astype(np.float32)


def acquisition_matrix(source: Grid, target: Grid, axis: int) -> np.ndarray:
    """(target, source) float32 matrix that averages the object over the target's voxels along one axis.

    The weights are the integral of linear interpolation over a rectangular voxel (slice) profile. Source voxels are
    already averages over their own width, so the profile's width is the difference of the two; on equal grids the
    matrix is the identity.
    """
    step = source.spacing_mm[axis]
    width = max(target.spacing_mm[axis] - step, 1e-3 * step) / step
    offset = (target.axis_mm(axis)[:, None] - source.axis_mm(axis)[None, :]) / step

    def hat_integral(x: np.ndarray) -> np.ndarray:
        x = np.clip(x, -1.0, 1.0)
        return np.where(x < 0, 0.5 * (1 + x) ** 2, 1 - 0.5 * (1 - x) ** 2)

    weights = (hat_integral(offset + width / 2) - hat_integral(offset - width / 2)) / width
    weights[np.abs(weights) < 1e-3] = 0.0
    return weights.astype(np.float32)


def apply_matrices(volume: np.ndarray, matrices: Sequence[np.ndarray | None]) -> np.ndarray:
    """Apply one matrix per spatial axis to (…, X, Y, Z); None leaves an axis unchanged."""
    lead = volume.shape[:-3]
    volume = volume.reshape(-1, *volume.shape[-3:])
    used = [(axis, matrix) for axis, matrix in enumerate(matrices) if matrix is not None]
    # The axis that shrinks most goes first, so that the later products are small.
    for axis, matrix in sorted(used, key=lambda item: item[1].shape[0] / item[1].shape[1]):
        fields, x, y, z = volume.shape
        if axis == 0:
            volume = np.matmul(matrix, volume.reshape(fields, x, y * z)).reshape(fields, len(matrix), y, z)
        elif axis == 1:
            volume = np.matmul(matrix, volume)
        else:
            volume = np.matmul(volume.reshape(-1, z), matrix.T).reshape(fields, x, y, len(matrix))
    return volume.reshape(*lead, *volume.shape[-3:])


def apply_to_planes(volume: np.ndarray, matrices: Sequence[np.ndarray | None], rows: slice) -> np.ndarray:
    """As `apply_matrices`, for some planes of the result along the first axis."""
    first, *others = matrices
    if first is None:
        return apply_matrices(volume[:, rows], [None, *others])
    return apply_matrices(volume, [first[rows], *others])


def resampling_matrices(source: Grid, target: Grid, kind: str = "cubic") -> list[np.ndarray | None]:
    """One matrix per axis from `source` to `target`; None for equal axes. `kind` is "cubic" or "acquisition"."""
    matrices: list[np.ndarray | None] = []
    for axis in range(3):
        from_mm, to_mm = source.axis_mm(axis), target.axis_mm(axis)
        if len(from_mm) == len(to_mm) and np.allclose(from_mm, to_mm, atol=1e-6):
            matrices.append(None)
        else:
            cubic = kind == "cubic"
            matrices.append(cubic_matrix(from_mm, to_mm) if cubic else acquisition_matrix(source, target, axis))
    return matrices


def smooth_noise(rng: np.random.Generator, grid: Grid, scale_mm: float, count: int = 1) -> np.ndarray:
    """(count, X, Y, Z) float32 smooth Gaussian fields of unit variance.

    Cubic B-splines on a random lattice of pitch `scale_mm`. The lattice covers the head for every grid, so a seed gives
    the same field at every resolution.
    """
    lattice_shape, matrices = [], []
    for axis in range(3):
        num_control = int(np.ceil(HEAD_EXTENT_MM[axis] * 1.3 / scale_mm)) + 3
        lattice_shape.append(num_control)
        position = (grid.axis_mm(axis) - HEAD_CENTER_MM[axis]) / scale_mm + (num_control + 3) / 2
        position = np.clip(position, 3, num_control - 1e-6)
        basis = BSpline.design_matrix(position, np.arange(num_control + 4.0), 3).toarray()
        basis /= np.linalg.norm(basis, axis=1, keepdims=True)
        matrices.append(basis.astype(np.float32))
    control = rng.standard_normal((count, *lattice_shape), dtype=np.float32)
    return apply_matrices(control, matrices)
