"""Tumour, infarct, multiple-sclerosis lesions, and the white-matter hyperintensities of age.

A lesion is a list of layers: a depth field on a coarse grid, the new tissue, and the share of each old tissue that it
replaces. Layers modify the tissue fractions of any anatomy, parametric or labelled. The lesion mask excludes the
hyperintensities of age, which healthy subjects have too.

Axes: X Y Z voxels, T tissues.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from brainfound.data.preprocessing.grids import bounding_box
from brainfound.phantom.anatomy import Ageing, Anatomy, MassEffect
from brainfound.phantom.geometry import (
    Grid,
    apply_matrices,
    cubic_matrix,
    inside_fraction,
    resampling_matrices,
    smooth_noise,
)
from brainfound.phantom.physics import PARENCHYMA, TISSUE_INDEX

DIAGNOSES = ("healthy", "tumour", "infarct", "ms")

_LESION_GRID_MM = 2.0
_ALL = dict.fromkeys(PARENCHYMA, 1.0)


@dataclass(frozen=True)
class LesionLayer:
    """One lesion tissue: depth on the lesion grid, share of each old tissue that it replaces, width of the border."""

    tissue: str
    depth_mm: np.ndarray
    replaces: Mapping[str, float]
    softness_mm: float = 1.0
    in_mask: bool = True


@dataclass
class Survey:
    """Tissue and distances in one head on a coarse grid, used to place lesions."""

    grid: Grid
    white: np.ndarray
    cerebrum: np.ndarray
    depth_mm: np.ndarray
    """Distance to the brain's surface, 0 outside."""
    ventricle_mm: np.ndarray
    """Distance to the ventricles, 0 inside."""

    @classmethod
    def measure(cls, anatomy: Anatomy) -> Survey:
        """Survey a head on its own (coarse) grid."""
        fractions = anatomy.fractions(slice(0, anatomy.grid.shape[0]))
        parenchyma = fractions[[TISSUE_INDEX[name] for name in PARENCHYMA]].sum(axis=0)
        ventricle = fractions[TISSUE_INDEX["ventricle"]] + fractions[TISSUE_INDEX["choroid_plexus"]]
        spacing = anatomy.grid.spacing_mm
        return cls(
            grid=anatomy.grid,
            white=fractions[TISSUE_INDEX["white_matter"]],
            cerebrum=fractions[[TISSUE_INDEX[name] for name in ("cortex", "white_matter")]].sum(axis=0),
            depth_mm=_distance(parenchyma + ventricle > 0.5, spacing),
            ventricle_mm=_distance(ventricle < 0.3, spacing),
        )

    def pick(self, rng: np.random.Generator, weight: np.ndarray) -> np.ndarray:
        """(3,) mm: a random point in a voxel drawn with probability proportional to `weight`."""
        total = np.cumsum(weight.ravel(), dtype=np.float64)
        chosen = int(np.searchsorted(total, rng.uniform(0, total[-1])))
        index = np.unravel_index(min(chosen, weight.size - 1), weight.shape)
        jitter = rng.uniform(-0.5, 0.5, 3)
        return np.array([self.grid.axis_mm(a)[i] + j * self.grid.spacing_mm[a]
                         for a, (i, j) in enumerate(zip(index, jitter, strict=True))])  # fmt: skip


@dataclass
class Pathology:
    """The lesions of one person, to be applied to tissue fractions."""

    grid: Grid
    layers: list[LesionLayer] = field(default_factory=list)
    mass_effect: MassEffect | None = None

    def apply(self, fractions: np.ndarray, target: Grid, rows: slice) -> np.ndarray:
        """Apply the lesions to (T, rows, Y, Z) fractions in place; return the lesion's share (rows, Y, Z)."""
        share = np.zeros(fractions.shape[1:], np.float32)
        for layer in self.layers:
            if (part := self._depth(layer, target, rows)) is None:
                continue
            box, depth = part
            alpha = inside_fraction(depth, max(layer.softness_mm, float(np.mean(target.spacing_mm))))
            added = np.zeros(alpha.shape, np.float32)
            for tissue, strength in layer.replaces.items():
                old = fractions[TISSUE_INDEX[tissue]][box]
                moved = old * (alpha * np.float32(strength))
                old -= moved
                added += moved
            fractions[TISSUE_INDEX[layer.tissue]][box] += added
            if layer.in_mask:
                share[box] += added
        return share

    def _depth(self, layer: LesionLayer, target: Grid, rows: slice) -> tuple[tuple[slice, ...], np.ndarray] | None:
        """The layer's depth on the part of `target` that it reaches, with that part's position in the slab."""
        is_reached = layer.depth_mm > -max(4.0, 2.0 * layer.softness_mm)
        if not is_reached.any():
            return None
        source, matrices, place = [], [], []
        for axis, reached in enumerate(bounding_box(is_reached)):
            low, high = max(reached.start - 2, 0), min(reached.stop + 2, layer.depth_mm.shape[axis])
            from_mm, to_mm = self.grid.axis_mm(axis)[low:high], target.axis_mm(axis)
            wanted = np.flatnonzero((to_mm >= from_mm[0]) & (to_mm <= from_mm[-1]))
            if axis == 0:
                wanted = wanted[(wanted >= rows.start) & (wanted < rows.stop)]
            if not len(wanted) or len(from_mm) < 2:
                return None
            source.append(slice(low, high))
            matrices.append(cubic_matrix(from_mm, to_mm[wanted]))
            start = int(wanted[0]) - (rows.start if axis == 0 else 0)
            place.append(slice(start, start + len(wanted)))
        return tuple(place), apply_matrices(layer.depth_mm[tuple(source)], matrices)


def draw_pathology(rng: np.random.Generator, diagnosis: str, survey: Survey, ageing: Ageing) -> Pathology:
    """Draw the lesions of one person: those of the diagnosis, and the hyperintensities of age.

    Sizes: tumour radius 10–25 mm with a necrotic core, an enhancing rim of 2–4 mm and oedema; infarct radius 8–20 mm;
    6–16 plaques of 2–8 mm, most of them at and perpendicular to the ventricle's wall, about one in six enhancing.
    """
    spacing = min(survey.grid.spacing_mm)
    pathology = Pathology(Grid.covering_head(spacing if spacing > 3.0 else _LESION_GRID_MM))
    if diagnosis != "healthy":
        {"tumour": _add_tumour, "infarct": _add_infarct, "ms": _add_plaques}[diagnosis](rng, survey, pathology)
    _add_hyperintensities(rng, survey, ageing, pathology)
    return pathology


def _add_tumour(rng: np.random.Generator, survey: Survey, pathology: Pathology) -> None:
    radius = float(rng.triangular(10.0, 13.0, 25.0))
    fits = (survey.white > 0.7) & (survey.depth_mm > min(0.75 * radius, 14.0))
    center = survey.pick(rng, fits.astype(np.float32) + 1e-9 * survey.white)
    noise = smooth_noise(rng, pathology.grid, 13.0)[0]
    x, y, z = pathology.grid.offsets_mm(center)
    distance = np.sqrt(x * x + y * y + z * z) * (1 + 0.09 * smooth_noise(rng, pathology.grid, 30.0)[0])
    outer = radius * (1 + 0.10 * noise) - distance
    rim = float(rng.uniform(2.0, 4.0))
    inner = outer - rim * (1 + 0.25 * smooth_noise(rng, pathology.grid, 9.0)[0])
    oedema = outer + float(rng.uniform(6.0, 14.0)) * (1 + 0.45 * smooth_noise(rng, pathology.grid, 18.0)[0])
    replaces = {**_ALL, "ventricle": 1.0, "csf": 0.85, "choroid_plexus": 1.0}
    # Vasogenic oedema spreads through white matter and spares the cortex.
    spread = {"white_matter": 0.92, "cerebellar_white": 0.92, "brain_stem": 0.5, "cortex": 0.15}
    pathology.layers += [
        LesionLayer("necrosis", inner, replaces, 1.5),
        LesionLayer("enhancing_tumour", outer, replaces),
        LesionLayer("oedema", oedema, spread, 5.0),
    ]
    x_mm, y_mm, z_mm = center.tolist()
    pathology.mass_effect = MassEffect((x_mm, y_mm, z_mm), 0.22 * radius, 1.25 * radius)


def _add_infarct(rng: np.random.Generator, survey: Survey, pathology: Pathology) -> None:
    radius = float(rng.uniform(8.0, 20.0))
    # The territory of an arterial branch: from the deep white matter out to the cortex.
    near = (survey.cerebrum > 0.8) & (survey.depth_mm > 4.0) & (survey.depth_mm < 18.0)
    center = survey.pick(rng, near.astype(np.float32) + 1e-9 * survey.cerebrum)
    outward = center - np.array([np.sign(center[0]) * 12.0, -16.0, 10.0])
    outward /= np.linalg.norm(outward) + 1e-6
    x, y, z = pathology.grid.offsets_mm(center)
    along = np.float32(outward[0]) * x + np.float32(outward[1]) * y + np.float32(outward[2]) * z
    across = np.sqrt(np.maximum(x * x + y * y + z * z - along**2, 0.0))
    widening = np.clip(1 + 0.35 * along / radius, 0.55, 1.4)  # a wedge with its base at the cortex
    distance = np.sqrt((along / 1.15) ** 2 + (across / (0.9 * widening)) ** 2)
    rough = 0.16 * smooth_noise(rng, pathology.grid, 16.0)[0] + 0.12 * smooth_noise(rng, pathology.grid, 7.0)[0]
    depth = radius * (1 + rough) - distance
    same_side = (np.sign(center[0]) * pathology.grid.axis_mm(0)).astype(np.float32)[:, None, None]
    pathology.layers.append(LesionLayer("infarct", np.minimum(depth, same_side), {**_ALL, "brain_stem": 0.0}, 1.5))


def _add_plaques(rng: np.random.Generator, survey: Survey, pathology: Pathology) -> None:
    white = (survey.white > 0.8).astype(np.float32)
    near_ventricle = white * ((survey.ventricle_mm > 1.0) & (survey.ventricle_mm < 11.0))
    below_cortex = white * ((survey.depth_mm > 4.0) & (survey.depth_mm < 8.0) & (survey.ventricle_mm < 45))
    away = np.gradient(ndimage.gaussian_filter(survey.ventricle_mm, 1.0))
    plaques = np.full(pathology.grid.shape, -30.0, np.float32)
    active = plaques.copy()
    for number in range(int(rng.integers(6, 17))):
        periventricular = number == 0 or rng.random() < 0.75
        center = survey.pick(rng, (near_ventricle if periventricular else below_cortex) + 1e-9 * survey.white)
        index = tuple(
            int(np.clip(np.rint((c - survey.grid.axis_mm(a)[0]) / survey.grid.spacing_mm[a]), 0, n - 1))
            for a, (c, n) in enumerate(zip(center, survey.grid.shape, strict=True))
        )
        axis = np.array([component[index] for component in away])
        axis = axis / np.linalg.norm(axis) if np.linalg.norm(axis) > 1e-3 else np.array([0.0, 0.0, 1.0])
        radius = float(rng.uniform(1.6, 4.0))
        stretch = float(rng.uniform(1.3, 2.0)) if periventricular else 1.0
        box, offset = _neighbourhood(pathology.grid, center, 2.5 * stretch * radius + 6.0)
        along = np.tensordot(axis.astype(np.float32), offset, 1)
        across_sq = np.maximum(np.sum(offset**2, axis=0) - along**2, 0.0)
        depth = radius - np.sqrt((along / stretch) ** 2 + across_sq)
        into = active if number > 0 and rng.random() < 1 / 6 else plaques
        into[box] = np.maximum(into[box], depth)
    replaces = {"white_matter": 1.0, "cortex": 0.4, "deep_grey": 0.6}
    for tissue, depth in (("active_plaque", active), ("plaque", plaques)):
        pathology.layers.append(LesionLayer(tissue, depth, replaces, 1.5))


def _add_hyperintensities(rng: np.random.Generator, survey: Survey, ageing: Ageing, pathology: Pathology) -> None:
    """Add caps and bands around the ventricles, thicker at the horns, and scattered deep spots; all grow with age."""
    noise = smooth_noise(rng, pathology.grid, 14.0)[0]
    centers = [survey.pick(rng, (survey.white > 0.9) * (survey.ventricle_mm > 8.0) + 1e-9 * survey.white)
               for _ in range(ageing.num_deep_hyperintensities)]  # fmt: skip
    radii = rng.uniform(1.0, 2.4, len(centers))
    if not ageing.has_hyperintensities:
        return
    distance = apply_matrices(survey.ventricle_mm, resampling_matrices(survey.grid, pathology.grid))
    y_mm = pathology.grid.axis_mm(1)[None, :, None]
    horns = 0.55 + 1.0 * np.exp(-0.5 * ((y_mm - 30) / 12) ** 2) + 0.9 * np.exp(-0.5 * ((y_mm + 45) / 14) ** 2)
    depth = ageing.hyperintensity_mm * horns.astype(np.float32) * (1 + 0.6 * noise) - distance
    for center, radius in zip(centers, radii, strict=True):
        box, offset = _neighbourhood(pathology.grid, center, 8.0)
        depth[box] = np.maximum(depth[box], radius - np.sqrt(np.sum(offset**2, axis=0)))
    replaces = {"white_matter": 1.0, "cerebellar_white": 1.0}
    pathology.layers.append(LesionLayer("hyperintensity", depth, replaces, 3.0, in_mask=False))


def _neighbourhood(grid: Grid, center: np.ndarray, reach_mm: float) -> tuple[tuple[slice, ...], np.ndarray]:
    """The box of a grid around a point, and (3, …) offsets from the point in it."""
    box, axes = [], []
    for axis in range(3):
        position = grid.axis_mm(axis)
        near = np.flatnonzero(np.abs(position - center[axis]) <= max(reach_mm, grid.spacing_mm[axis]))
        box.append(slice(int(near[0]), int(near[-1]) + 1))
        axes.append((position[box[-1]] - center[axis]).astype(np.float32))
    return tuple(box), np.stack(np.meshgrid(*axes, indexing="ij"))


def _distance(mask: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Distance (mm) from every voxel of the mask to the nearest voxel outside it."""
    return ndimage.distance_transform_edt(mask, sampling=spacing_mm).astype(np.float32)
