"""Geometry of the phantom: grids in millimetres, interpolation between them, smooth random fields, shapes and sulci.

Interpolation and averaging use one small matrix per axis, which is exact for axis-aligned grids and fast.

Shapes are depth fields (positive inside, negative outside, in mm near the surface). A depth divided by the voxel size
gives the fraction of a voxel that lies inside, so edges have partial volume. Depths combine by smooth minimum
(intersection) and maximum (union). `points` are (3, …) coordinates in mm.

A sulcus is a sheet: the zero surface of band-limited noise g, at the distance |g|/|∇g| to first order. The noise is
evaluated on a shell around the hemisphere's centre, so it is constant along the radial direction and the sheets run
inward from the surface, as sulci do.

Axes: X Y Z voxels along right, anterior, superior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy.interpolate import BSpline, CubicSpline

from brainfound.data.preprocessing.grids import bounding_box

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


_GYRAL_WAVELENGTH_MM = 20.0
_NUM_WAVES = 40
_CHUNK = 8192
_HEMISPHERE_CENTER_MM = (26.0, -16.0, 10.0)
_SHELL_RADII_MM = (42.0, 82.0, 60.0)
_MEDIAL_RADIUS_MM = 28.0


def ellipsoid(points: np.ndarray, center: Sequence[float], radii: Sequence[float], boxy: bool = False) -> np.ndarray:
    """Depth of an ellipsoid, or if `boxy` a superellipsoid of exponent 2.5, to first order: (1 − F)/|∇F|."""
    scaled = [np.abs((points[axis] - np.float32(center[axis])) * np.float32(1 / radii[axis])) for axis in range(3)]
    powers = [s * np.sqrt(s) for s in scaled] if boxy else scaled  # s^(k−1)
    total = scaled[0] * powers[0] + scaled[1] * powers[1] + scaled[2] * powers[2] + np.float32(1e-6)
    level = total ** np.float32(0.4) if boxy else np.sqrt(total)
    steep = [power * np.float32(1 / radius) for power, radius in zip(powers, radii, strict=True)]
    slope = np.sqrt(steep[0] * steep[0] + steep[1] * steep[1] + steep[2] * steep[2])
    # F = total^(1/k), so |∇F| = slope · F / total.
    return ((1 - level) * total / (slope * level + np.float32(1e-4) * total)).astype(np.float32, copy=False)


def tube(points: np.ndarray, path: Sequence[Sequence[float]], radii: Sequence[float]) -> np.ndarray:
    """Depth of a chain of tapered capsules through the points of `path` (mm), with a radius at each."""
    segments = []
    for start, end, first, last in zip(path[:-1], path[1:], radii[:-1], radii[1:], strict=True):
        along = np.subtract(end, start)
        offset = [points[axis] - np.float32(start[axis]) for axis in range(3)]
        direction = (along / float(along @ along)).astype(np.float32)
        position = offset[0] * direction[0] + offset[1] * direction[1] + offset[2] * direction[2]
        position = np.clip(position, 0.0, 1.0, out=position)
        miss = [o - position * np.float32(a) for o, a in zip(offset, along, strict=True)]
        distance = np.sqrt(miss[0] * miss[0] + miss[1] * miss[1] + miss[2] * miss[2])
        segments.append((first + (last - first) * position - distance).astype(np.float32, copy=False))
    return reduce(lambda depth, segment: smooth_union(depth, segment, 1.0), segments)


def smooth_intersection(first: np.ndarray, second: np.ndarray, blend_mm: float = 0.0) -> np.ndarray:
    """Intersection; `blend_mm` rounds the edge (polynomial smooth minimum)."""
    smaller = np.minimum(first, second)
    if blend_mm <= 0:
        return smaller
    overlap = np.maximum(blend_mm - np.abs(first - second), 0) / blend_mm
    return smaller - overlap**2 * (blend_mm / 4)


def smooth_union(first: np.ndarray, second: np.ndarray, blend_mm: float = 0.0) -> np.ndarray:
    """Union; `blend_mm` fillets the joint."""
    return -smooth_intersection(-first, -second, blend_mm)


def smoothstep(values: np.ndarray, start: float, end: float) -> np.ndarray:
    """Smooth step from 0 at `start` to 1 at `end`."""
    t = np.clip((values - start) / (end - start), 0, 1)
    return t * t * (3 - 2 * t)


def inside_fraction(depth_mm: np.ndarray, voxel_mm: float) -> np.ndarray:
    """The fraction of a voxel of width `voxel_mm` that lies inside, for a depth at its centre."""
    fraction = depth_mm * np.float32(1 / voxel_mm)
    fraction += 0.5
    return np.clip(fraction, 0.0, 1.0, out=fraction)


def cerebrum_fields(points: np.ndarray, depth_noise: np.ndarray) -> dict[str, np.ndarray]:
    """Depth below the cerebrum's hull, distances to the fissures, depth of sulci and callosum, all in mm."""
    mirrored = np.stack([np.abs(points[0]), points[1], points[2]])
    fissure, callosum = _midline(points)
    center = ellipsoid(mirrored, (16, -8, 4), (24, 44, 24))
    # Sulci reach 10–24 mm and stay out of the core that holds the nuclei and ventricles.
    sulcal_depth = np.clip(16.0 + 5.5 * depth_noise, 4.0, 26.0) * smoothstep(-center, -8.0, 2.0)
    sulcal_depth = sulcal_depth * (0.6 + 0.4 * smoothstep(mirrored[0], 8.0, 30.0))  # medial sulci are shallow
    return {
        "brain": _outline(mirrored),
        "fissure": fissure,
        "callosum": callosum,
        "sulcal_depth": sulcal_depth,
        "sylvian": _sylvian_fissure(mirrored),
    }


def _outline(p: np.ndarray) -> np.ndarray:
    """The cerebrum's hull: vault, temporal lobes, flat frontal base, roof over the cerebellum."""
    vault = ellipsoid(p, (0, -17, 13), (67, 87, 62), boxy=True)
    base = np.where(
        p[1] > -25, p[2] + 20 - 0.10 * (p[1] - 20), p[2] + 24.5 + 0.30 * (p[1] + 25) - 0.16 * (40 - p[0])
    ).astype(np.float32)
    upper = smooth_intersection(vault, base, 12.0)
    temporal = ellipsoid(p, (45, -14, -20), (22, 44, 25), boxy=True)
    inferior = ellipsoid(p, (42, -46, -12), (20, 36, 16))
    lobes = smooth_union(temporal, inferior, 10.0)
    core = ellipsoid(p, (0, -14, -2), (24, 26, 17))
    return smooth_union(smooth_union(upper, lobes, 5.0), core, 4.0)


def _midline(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the interhemispheric fissure, and depth of the corpus callosum that floors it."""
    outer = ellipsoid(points * np.array([0, 1, 1], np.float32)[:, None, None, None], (0, -6, 1), (1e3, 38, 27))
    below = smoothstep(-points[2], 2.0, 12.0) * smoothstep(-np.abs(points[1] + 8), -40, -25)
    floor = np.maximum(outer, 40.0 * below - 20.0)
    fissure = np.hypot(points[0], np.maximum(floor, 0.0))
    band = smooth_intersection(outer, 6.5 - outer)
    callosum = smooth_intersection(smooth_intersection(band, 13.0 - np.abs(points[0])), points[2] + 2.0, 3.0)
    return fissure.astype(np.float32), callosum.astype(np.float32)


def _sylvian_fissure(p: np.ndarray) -> np.ndarray:
    """Distance to the lateral fissure: a slanted sheet that opens into a vertical one over the insula."""
    slant = p[2] + 4.0 + 0.42 * (p[1] + 2)
    beyond = np.maximum(np.maximum(p[1] - 24, -44 - p[1]), 0)
    sheet = np.sqrt((0.92 * slant) ** 2 + np.maximum(37.0 - p[0], 0) ** 2 + beyond**2)
    insula_beyond = np.maximum(np.maximum(p[1] - 22, -28 - p[1]), 0)
    insula = np.sqrt(
        (p[0] - 37.5 + 0.06 * np.abs(p[1])) ** 2 + np.maximum(np.abs(slant) - 11, 0) ** 2 + insula_beyond**2
    )
    return np.minimum(sheet, insula).astype(np.float32)


def sulcal_sheets(rng: np.random.Generator, grid: Grid, points: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Signed distance (mm, first order) to the nearest sulcal sheet."""
    box = bounding_box(brain > -6.0)
    p = points[(slice(None), *box)]
    center = np.asarray(_HEMISPHERE_CENTER_MM, np.float32)[:, None, None, None]
    radii = np.asarray(_SHELL_RADII_MM, np.float32)[:, None, None, None]
    side = np.where(p[0] < 0, np.float32(-1), np.float32(1))
    offset = p - center
    offset[0] = p[0] - side * center[0, 0]
    # The medial wall is nearer to the centre than the lateral surface.
    radius_x = np.where(side * offset[0] < 0, np.float32(_MEDIAL_RADIUS_MM), radii[0])
    radii = np.stack([radius_x, *(np.broadcast_to(radius, radius_x.shape) for radius in radii[1:])])
    scaled = offset / radii
    on_shell = radii * scaled / np.sqrt(np.sum(scaled**2, axis=0) + 0.02)
    on_shell += 0.35 * (offset - on_shell)  # not quite radial, or the sheets would crowd at the core
    on_shell[0] += side * 200.0  # the two hemispheres fold independently
    # Waves of one length in random directions: their zero surfaces lie half a wavelength apart.
    directions = rng.standard_normal((_NUM_WAVES, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = _GYRAL_WAVELENGTH_MM * np.exp(0.13 * rng.standard_normal(_NUM_WAVES))
    vectors = (2 * np.pi * directions / lengths[:, None]).astype(np.float32)
    phases = rng.uniform(0, 2 * np.pi, _NUM_WAVES).astype(np.float32)
    flat = on_shell.reshape(3, -1)
    noise = np.zeros(flat.shape[1], np.float32)
    for start in range(0, len(noise), _CHUNK):
        waves = vectors @ flat[:, start : start + _CHUNK] + phases[:, None]
        noise[start : start + _CHUNK] = np.cos(waves, out=waves).sum(axis=0)
    noise = noise.reshape(p.shape[1:])
    gradient = np.gradient(noise, *grid.spacing_mm)
    # At the midplane the two hemispheres' noise meet; the fissure lies there anyway.
    steep = np.sqrt(sum(g**2 for g in gradient) + 0.15**2)
    distance = np.clip(noise / steep, -12.0, 12.0)
    whole = np.full(grid.shape, 12.0, np.float32)
    whole[box] = distance
    return whole
