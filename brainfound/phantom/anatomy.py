"""A head built from shapes (cortex, white matter, ventricles, nuclei, skull, scalp), and its ageing.

Structures are depth fields (`geometry`) in head coordinates (mm, RAS, origin near the anterior commissure). They are
evaluated on a coarse grid after a smooth individual warp, interpolated by cubic splines, and composed front to back
into tissue fractions. A cortical ribbon of even thickness follows every surface that touches cerebrospinal fluid.

Ageing: ventricles enlarge at an accelerating rate (Scahill et al. 2003, Arch Neurol 60:989); the cortex thins from
middle age on (Salat et al. 2004, Cereb Cortex 14:721); iron in pallidum and putamen shortens T2 (Hallgren and Sourander
1958, J Neurochem 3:41). The rates are round numbers in the range of such studies, with variation between subjects.

Axes: X Y Z voxels, T tissues (`physics.TISSUES`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import numpy as np

from brainfound.data.preprocessing.grids import bounding_box
from brainfound.phantom.geometry import (
    Grid,
    apply_to_planes,
    cerebrum_fields,
    ellipsoid,
    inside_fraction,
    resampling_matrices,
    smooth_intersection,
    smooth_noise,
    smooth_union,
    smoothstep,
    sulcal_sheets,
    tube,
)
from brainfound.phantom.physics import TISSUE_INDEX, TISSUES

_COARSE_MM = 2.0
_COARSE_ROWS = 6
_REFERENCE_VENTRICLES_ML = 18.0  # volume of the ventricles at ventricle scale 1
_FAR_MM = -30.0
_TOP_OF_FACE_MM = 24.0
_WARP_MM = 2.1


@dataclass(frozen=True)
class Ageing:
    """The age-dependent quantities of one subject."""

    ventricle_volume_ml: float
    """Lateral and third ventricles together."""
    cortical_thickness_mm: float
    sulcal_half_width_mm: float
    brain_shrinkage_mm: float
    """Additional distance between the brain's surface and the skull."""
    hyperintensity_mm: float
    """Thickness of the periventricular white-matter hyperintensity."""
    num_deep_hyperintensities: int
    iron: float
    """Iron in the basal ganglia relative to a 20-year-old."""

    @property
    def has_hyperintensities(self) -> bool:
        return self.hyperintensity_mm >= 0.3


def draw_ageing(rng: np.random.Generator, age_years: float) -> Ageing:
    """Draw the ageing of one subject.

    Ventricles grow by about 1 % a year to 60 and 3.5 % after; the cortex thins by 0.35 % a year from 2.75 mm at 20.
    """
    adult = age_years - 20.0
    late = max(age_years - 60.0, 0.0)
    old = max(age_years - 45.0, 0.0)
    return Ageing(
        ventricle_volume_ml=float(16.0 * np.exp(0.01 * min(adult, 40.0) + 0.035 * late + 0.16 * rng.standard_normal())),
        cortical_thickness_mm=float(2.75 * (1 - 0.0035 * adult) * np.exp(0.03 * rng.standard_normal())),
        sulcal_half_width_mm=float((0.35 + 0.006 * adult + 0.010 * late) * np.exp(0.15 * rng.standard_normal())),
        brain_shrinkage_mm=float(max(0.018 * adult + 0.03 * late + 0.25 * rng.standard_normal(), 0.0)),
        hyperintensity_mm=float(0.085 * old * np.exp(0.4 * rng.standard_normal())),
        num_deep_hyperintensities=int(rng.poisson(0.22 * old)),
        iron=float((1 + 0.008 * adult) * np.exp(0.04 * rng.standard_normal())),
    )


class Anatomy(Protocol):
    """A simulated head: the share of every tissue in every voxel of `grid`."""

    grid: Grid

    def fractions(self, rows: slice) -> np.ndarray:
        """(T, rows, Y, Z) float32 tissue fractions, summing to 1, of some planes along the first axis."""
        ...


@dataclass(frozen=True)
class MassEffect:
    """Tissue pushed away from a growing lesion: `shift_mm` at its rim, fading over `reach_mm`."""

    center_mm: tuple[float, float, float]
    shift_mm: float
    reach_mm: float

    def displacement(self, grid: Grid) -> list[np.ndarray]:
        """Three (X, Y, Z) components in mm: from each voxel to the origin of its tissue."""
        offset = grid.offsets_mm(self.center_mm)
        distance_sq = (offset[0] ** 2 + offset[1] ** 2 + offset[2] ** 2) / np.float32(self.reach_mm**2)
        # The displacement is largest, shift_mm, at the reach, and the map stays invertible.
        strength = np.float32(-self.shift_mm / self.reach_mm) * np.exp(0.5 - 0.5 * distance_sq)
        return [component * strength for component in offset]


def subject_coordinates(
    rng: np.random.Generator, grid: Grid, size: float, mass_effect: MassEffect | None
) -> np.ndarray:
    """(3, X, Y, Z) template coordinates of every voxel: size, proportions, tilt, warp and mass effect of one person."""
    x, y, z = grid.offsets_mm()
    proportions = (size * np.exp(0.018 * rng.standard_normal(3))).astype(np.float32)
    angles = np.radians(2.0) * rng.standard_normal(3)
    points = smooth_noise(rng, grid, 55.0, 3)
    points *= np.float32(_WARP_MM)
    points += np.float32(0.3 * _WARP_MM) * smooth_noise(rng, grid, 28.0, 3)
    turn = rotation_matrix(angles).astype(np.float32) / proportions[:, None]
    for axis in range(3):
        points[axis] += turn[axis, 0] * x + turn[axis, 1] * y + turn[axis, 2] * z
    if mass_effect is not None:
        for axis, component in enumerate(mass_effect.displacement(grid)):
            points[axis] += component
    return points


def rotation_matrix(angles_rad: np.ndarray) -> np.ndarray:
    """(3, 3) rotation about x, then y, then z."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(angles_rad), np.sin(angles_rad)
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


class ParametricHead:
    """One person's head built from shapes, on `grid`.

    `seed` defines the person, who is the same on every grid; `size` is linear, relative to the template.
    """

    def __init__(
        self, seed: list[int], grid: Grid, ageing: Ageing, size: float = 1.0, mass_effect: MassEffect | None = None
    ) -> None:
        self.grid = grid
        self.ageing = ageing
        coarse = Grid.covering_head(_COARSE_MM) if min(grid.spacing_mm) < _COARSE_MM else grid
        rng = np.random.default_rng(seed)
        points = subject_coordinates(rng, coarse, size, mass_effect)
        ventricle_scale = (ageing.ventricle_volume_ml / (_REFERENCE_VENTRICLES_ML * size**3)) ** (1 / 1.6)
        folded = points + 1.3 * smooth_noise(rng, coarse, 20.0, 3)  # no fissure is straight
        noise = _draw_noise(rng, coarse)
        # A few planes at a time keep the intermediate results in the processor's cache.
        self._names: list[str] = []
        for start in range(0, coarse.shape[0], _COARSE_ROWS):
            rows = slice(start, start + _COARSE_ROWS)
            fields = _depth_fields(points[:, rows], folded[:, rows], noise[:, rows], ventricle_scale)
            if not self._names:
                self._names = [*fields, "sulcus"]
                self._stack = np.empty((len(self._names), *coarse.shape), np.float32)
            for row, name in enumerate(fields):
                self._stack[row, rows] = fields[name]
        brain = self._stack[self._names.index("brain")]
        self._stack[-1] = sulcal_sheets(rng, coarse, folded, brain)
        brain -= ageing.brain_shrinkage_mm
        self._matrices = resampling_matrices(coarse, grid)

    def fractions(self, rows: slice) -> np.ndarray:
        depth = dict(zip(self._names, apply_to_planes(self._stack, self._matrices, rows), strict=True))
        layers = _Layers(depth["brain"].shape, float(np.mean(self.grid.spacing_mm)))
        layers.add("vessel", depth["sinus"])
        layers.add("choroid_plexus", smooth_intersection(depth["choroid"], depth["ventricle"]))
        for tissue in ("ventricle", "pallidum", "deep_grey", "brain_stem"):
            layers.add(tissue, depth[tissue])
        fluid = _distance_to_fluid(depth, self.ageing)
        # The commissure spans the fissure's floor without a cortical ribbon.
        layers.add("white_matter", smooth_union(fluid - self.ageing.cortical_thickness_mm, depth["callosum"]))
        layers.add("cortex", fluid)
        folia, cerebellum = depth["folia"], depth["cerebellum"]
        layers.add("cerebellar_white", cerebellum - 5.5 + 4.2 * folia, ceiling=inside_fraction(cerebellum, 1.0))
        crevice = smoothstep(-folia, 0.75, 1.0) * smoothstep(-cerebellum, -9.0, -2.0)
        layers.add("cerebellar_cortex", cerebellum, ceiling=1 - 0.55 * crevice)
        skull, thickness = depth["intracranial"], depth["skull_thickness"]
        layers.add("csf", skull)
        marrow = smooth_intersection(-skull - 1.8, skull + thickness - 1.8)
        layers.add("marrow", marrow, ceiling=0.85)
        layers.add("bone", skull + thickness)
        layers.add("air", depth["airway"])
        layers.add("csf", depth["eye"])
        scalp = depth["head"]
        layers.add("soft_tissue", smooth_intersection(scalp, 1.6 - scalp))
        layers.add("fat", smooth_intersection(scalp, smooth_union(depth["face_fat"], 5.2 - scalp)))
        layers.add("soft_tissue", scalp)
        layers.fractions[TISSUE_INDEX["air"]] += layers.left
        return layers.fractions


class _Layers:
    """Composes tissues front to back: each takes its share of what the previous ones left."""

    def __init__(self, shape: tuple[int, ...], voxel_mm: float) -> None:
        self.fractions = np.zeros((len(TISSUES), *shape), np.float32)
        self.left = np.ones(shape, np.float32)
        self.voxel_mm = voxel_mm

    def add(self, tissue: str, depth_mm: np.ndarray, ceiling: np.ndarray | float = 1.0) -> None:
        if float(depth_mm.max()) <= -0.5 * self.voxel_mm:
            return
        taken = inside_fraction(depth_mm, self.voxel_mm)
        taken *= self.left
        taken *= ceiling
        self.fractions[TISSUE_INDEX[tissue]] += taken
        self.left -= taken


def _distance_to_fluid(depth: dict[str, np.ndarray], ageing: Ageing) -> np.ndarray:
    """Distance inside the brain to the nearest fluid-covered surface: hull, fissures and sulcal walls."""
    surface = smooth_intersection(depth["brain"], depth["fissure"] - ageing.sulcal_half_width_mm * 0.6)
    below_floor = np.maximum(surface - depth["sulcal_depth"], 0.0)
    # Sulci gape at the surface and close toward the fundus.
    half_width = ageing.sulcal_half_width_mm * (0.75 + 1.0 * np.exp(-np.maximum(surface, 0.0) / 5.0))
    wall = np.sqrt(depth["sulcus"] ** 2 + below_floor**2) - half_width
    sylvian = depth["sylvian"] - 1.5 * ageing.sulcal_half_width_mm
    return smooth_intersection(smooth_intersection(surface, wall, 1.0), sylvian, 1.0)


def _draw_noise(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    """(4, X, Y, Z) smooth random fields of one head: skull, scalp, face, depth of the sulci."""
    skull, scalp, face = smooth_noise(rng, grid, 40.0, 3)
    face = face + 0.8 * smooth_noise(rng, grid, 9.0)[0]
    return np.stack([skull, scalp, face, smooth_noise(rng, grid, 22.0)[0]])


def _depth_fields(
    points: np.ndarray, folded: np.ndarray, noise: np.ndarray, ventricle_scale: float
) -> dict[str, np.ndarray]:
    """All depth fields except the sulcal sheets, at the given template coordinates."""
    mirrored = np.stack([np.abs(points[0]), points[1], points[2]])  # left and right differ by their warp
    skull_noise, scalp_noise, face_noise, sulcal_noise = noise
    fields = cerebrum_fields(folded, sulcal_noise)
    fields |= _deep_fields(mirrored, ventricle_scale)
    # Hindbrain and face lie below this plane.
    low = (slice(None), slice(None), slice(0, int(np.sum(points[2].min(axis=(0, 1)) < _TOP_OF_FACE_MM))))
    below = mirrored[(slice(None), *low)]
    for name, depth in (_hindbrain_fields(below) | _face_fields(below, face_noise[low])).items():
        fields[name] = _embed(depth, low, points.shape[1:])
    return fields | _head_fields(mirrored, fields, skull_noise, scalp_noise, face_noise)


def _deep_fields(points: np.ndarray, ventricle_scale: float) -> dict[str, np.ndarray]:
    """Ventricles, choroid plexus and the deep grey nuclei, evaluated in a box around them."""
    center, half = np.array([(0, -18, 2), (60, 85, 55)], np.float32)[:, :, None, None, None]
    is_near = (np.abs(points - center) < half).all(axis=0)
    if not is_near.any():
        far = np.full(points.shape[1:], _FAR_MM, np.float32)
        return dict.fromkeys(("ventricle", "choroid", "deep_grey", "pallidum"), far)
    box = bounding_box(is_near)
    p = points[(slice(None), *box)]
    s = ventricle_scale
    # Frontal horn, body, atrium; occipital and temporal horns leave the atrium.
    main_path = [(9.5, 30, 4), (9.0, 18, 12 + s), (9.5, 0, 17.5 + 1.5 * s), (13, -20, 18.5 + 2 * s), (22, -38, 13)]
    main = tube(p, main_path, [3.4 * s, 4.4 * s, 3.6 * s, 4.2 * s, 6.4 * s])
    occipital = tube(p, [(22, -38, 13), (24, -56, 8), (22, -72, 6)], [5.8 * s, 3.4 * s, 1.0 * s])
    temporal_path = [(23, -37, 10), (32, -30, -3), (34, -16, -14), (29, -5, -19)]
    temporal = tube(p, temporal_path, [4.6 * s, 2.0 * s, 2.1 * s, 1.4 * s])
    lateral = smooth_union(main, smooth_union(occipital, temporal, 2.0), 2.0)
    # The septum keeps the two bodies apart.
    lateral = smooth_intersection(lateral, p[0] - 1.0)
    third = ellipsoid(p, (0, -13, 1), (1.9 * s, 14, 11))
    aqueduct = tube(p, [(0, -28, 2), (0, -32, -12), (0, -42, -30)], [1.2, 1.0, 2.0])
    fourth = ellipsoid(p, (0, -43, -33), (6.5, 5.5, 9))
    caudate_head = ellipsoid(p, (12.5 + 3.5 * (s - 1), 13, 6), (5.2, 10.5, 9))
    tail_path = [(15 + 3 * (s - 1), 6, 14), (18 + 3 * (s - 1), -12, 21), (24, -28, 18)]
    caudate = smooth_union(caudate_head, tube(p, tail_path, [4.0, 2.8, 1.6]), 3.0)
    turned = p.copy()  # putamen and pallidum diverge backward
    turned[0] = p[0] + 0.18 * p[1]
    putamen = ellipsoid(turned, (26.5, 1, 1), (5.2, 16.5, 10.5), boxy=True)
    accumbens = ellipsoid(p, (10, 11, -5), (5, 5, 4))
    thalamus_points = p.copy()
    thalamus_points[0] = p[0] + 0.28 * (p[1] + 18)
    thalamus = smooth_intersection(ellipsoid(thalamus_points, (10.5, -18, 7), (9.0, 14, 9)), p[0] - 1.2)
    hippocampus = tube(p, [(22, -8, -19), (27, -16, -17), (30, -28, -10), (26, -37, -2)], [6.0, 5.0, 4.0, 2.6])
    named = {
        "ventricle": smooth_union(smooth_union(smooth_union(lateral, third, 1.0), aqueduct), fourth, 2.0),
        "choroid": tube(p, [(12, -16, 17), (20, -34, 13), (25, -36, 4)], [1.4, 2.6, 1.4]),
        "deep_grey": reduce(np.maximum, (caudate, putamen, accumbens, thalamus, hippocampus)),
        "pallidum": ellipsoid(turned, (18.8, -3, -1), (4.4, 9.5, 6.5)),
    }
    return {name: _embed(depth, box, points.shape[1:]) for name, depth in named.items()}


def _hindbrain_fields(p: np.ndarray) -> dict[str, np.ndarray]:
    """Brain stem and cerebellum; folia are waves around the fourth ventricle."""
    stem_path = [(0, -20, -6), (0, -25, -18), (0, -24, -31), (0, -36, -52), (0, -44, -76), (0, -48, -120)]
    stem = tube(p, stem_path, [13.0, 13.0, 14.5, 8.5, 6.5, 6.0])
    peduncle = tube(p, [(0, -26, -30), (18, -44, -34)], [9.0, 7.0])
    hemisphere = ellipsoid(p, (23, -65, -32), (29, 28, 25), boxy=True)
    vermis = ellipsoid(p, (0, -66, -25), (14, 24, 24))
    angle = np.arctan2(p[2] + 33, -(p[1] + 44))
    radius = np.hypot(p[2] + 33, p[1] + 44)
    return {
        "brain_stem": smooth_union(stem, peduncle, 4.0),
        "cerebellum": smooth_union(hemisphere, vermis, 6.0),
        "folia": np.cos(angle * 19 + 0.06 * radius + 0.05 * p[0]).astype(np.float32),
    }


def _head_fields(
    p: np.ndarray, fields: dict[str, np.ndarray], skull: np.ndarray, scalp: np.ndarray, face: np.ndarray
) -> dict[str, np.ndarray]:
    """Intracranial space, skull, venous sinus, scalp, face and neck from their noise; trims the brain to fit."""
    cerebrum = fields["brain"]
    # The tentorium is a film of fluid between cerebrum and cerebellum.
    fields["cerebellum"] = smooth_intersection(fields["cerebellum"], -cerebrum - 1.6)
    intracranial = smooth_union(smooth_union(cerebrum, fields["cerebellum"], 12.0), fields["brain_stem"], 6.0) + 2.3
    # The cranial cavity is convex: its base bridges the gaps between the lobes.
    cavity = ellipsoid(p, (0, -17, 6), (62, 80, 56), boxy=True)
    base = p[2] + 24 - 9 * smoothstep(p[1], 5, 30)
    intracranial = smooth_union(intracranial, smooth_intersection(cavity, base, 6.0), 4.0)
    skull_thickness = 6.3 + 0.9 * skull
    sinus_floor = np.where(p[1] < -60, 16.0, -14.0)
    sinus = smooth_intersection(4.2 - np.hypot(p[0] * 0.9, intracranial - 1.0), p[2] + sinus_floor, 2.0)
    fields["brain_stem"] = smooth_intersection(fields["brain_stem"], intracranial + 40 * smoothstep(-p[2], 40, 60))
    return {
        "intracranial": intracranial,
        "skull_thickness": skull_thickness,
        "head": smooth_union(intracranial + skull_thickness + 6.0 + 0.8 * scalp, fields.pop("face"), 16.0),
        "airway": smooth_intersection(fields["airway"], -intracranial - 3.0),
        "eye": smooth_intersection(fields["eye"], -intracranial - 1.0),
        "face_fat": smooth_union(fields.pop("orbit"), 3.0 * face - 1.5),
        "sinus": smooth_intersection(sinus, 25.0 - p[1] + 0.9 * p[2]),
    }


def _face_fields(points: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
    """Face and neck, airways with sinuses, eyes and orbits."""
    face = ellipsoid(points, (0, 28, -64), (60, 62, 66), boxy=True)
    nose = ellipsoid(points, (0, 88, -56), (11, 16, 17))
    neck = ellipsoid(points, (0, -34, -110), (58, 62, 90), boxy=True)
    cavity = smooth_intersection(ellipsoid(points, (0, 55, -55), (15, 30, 22)), 3.0 * noise + 1.5)
    throat = tube(points, [(0, 18, -62), (0, 2, -80), (0, -4, -110)], [7.0, 7.0, 8.0])
    sinus = ellipsoid(points, (30, 48, -64), (12, 15, 15))
    return {
        "face": smooth_union(smooth_union(face, neck, 16.0), nose, 10.0),
        "airway": smooth_union(cavity, smooth_union(throat, sinus, 1.0)),
        "eye": ellipsoid(points, (32, 62, -33), (12, 12, 12)),
        "orbit": ellipsoid(points, (29, 48, -33), (18, 28, 17)),
    }


def _embed(depth: np.ndarray, box: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    whole = np.full(shape, _FAR_MM, np.float32)
    whole[box] = np.maximum(depth, _FAR_MM)
    return whole
