"""Heads from real anatomy: label volumes with FreeSurfer's numbering.

Each simulated head has its own smooth warp, and a displacement that opens or closes ventricles and sulci to match the
drawn age. Labels are sampled at eight points per voxel, so tissue borders have partial volume.

Codes: FreeSurfer's colour table, and for the head outside the brain those of SimNIBS charm (502 artery, 506 eyes, 507
other tissue, 508 muscle, 509 mucosa, 511 skin, 512 spinal cord, 514 vein, 515 compact bone, 516 spongy bone, 530 optic
nerve). Lesion codes (25, 57, 77–79) count as white matter: lesions follow from the drawn age and diagnosis.

Axes: X Y Z voxels, T tissues.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
from scipy import ndimage

from brainfound.data.preprocessing.grids import bounding_box
from brainfound.data.reading.image_names import holds_voxels
from brainfound.data.reading.scan import load_scan
from brainfound.errors import CohortError, ScanError
from brainfound.phantom.anatomy import Ageing, MassEffect, subject_coordinates
from brainfound.phantom.geometry import Grid, apply_to_planes, resampling_matrices
from brainfound.phantom.physics import PARENCHYMA, TISSUE_INDEX, TISSUES

TISSUE_LABELS: dict[str, tuple[int, ...]] = {
    "air": (0,),
    "csf": (24, 506),
    "ventricle": (4, 5, 14, 15, 43, 44, 72),
    "choroid_plexus": (31, 63, 136, 137, 163, 164),
    "cortex": (3, 42, 17, 53, 18, 54, *range(1000, 1036), *range(2000, 2036)),
    "white_matter": (2, 41, 25, 57, 77, 78, 79, 85, 530, *range(251, 256), *range(3000, 3036), *range(4000, 4036),
                     5001, 5002),
    "deep_grey": (10, 49, 11, 50, 12, 51, 26, 58, 28, 60),
    "pallidum": (13, 52),
    "cerebellar_cortex": (8, 47),
    "cerebellar_white": (7, 46),
    "brain_stem": (16, 512),
    "vessel": (30, 62, 502, 514),
    "bone": (165, 259, 515),
    "marrow": (516,),
    "fat": (511,),
    "soft_tissue": (258, 507, 508, 509),
}  # fmt: skip
_BRAIN_CENTER_MM = (0.0, -21.0, 6.0)  # in head coordinates; the brain of a label map is moved there
_COARSE_MM = 3.0
_LARGEST_DILATION_MM = 5.0


@dataclass(frozen=True)
class LabelMap:
    """One label volume as tissues, with the displacement fields that open ventricles and sulci."""

    tissue: np.ndarray
    """(X, Y, Z) uint8 index into `physics.TISSUES`, RAS, with one voxel of air around it."""
    to_voxel: np.ndarray
    """(4, 4) head coordinates (mm) → voxel index of `tissue`."""
    ventricle_ml: float
    ventricle_displacement: np.ndarray
    """(3, X, Y, Z) on the coarse grid: displacement (mm) that adds one millilitre, to first order."""
    sulcus_displacement: np.ndarray
    """(3, X, Y, Z) on the coarse grid: displacement of about 1 mm at the sulcal walls."""


def find_label_maps(folder: Path) -> list[Path]:
    """The label volumes of a folder, sorted; a CohortError if the folder is missing or holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        remedy = "Give a folder of FreeSurfer-numbered label volumes with --label-maps, or leave the option out"
        raise CohortError("no such folder of label maps", where=folder, remedy=remedy, usage=True)
    paths = sorted(path for path in folder.iterdir() if holds_voxels(path))
    if not paths:
        expected = "NIfTI or MGH files"
        remedy = "Point --label-maps to the folder that holds the volumes themselves"
        raise CohortError("no label volume found", where=folder, expected=expected, remedy=remedy, usage=True)
    return paths


@lru_cache(maxsize=4)
def read_label_map(path: Path) -> LabelMap:
    """Read a volume; a CohortError if it cannot be read, has unknown codes, or lacks cortex or white matter."""
    try:
        image = load_scan(path, labels=True)
    except ScanError as error:
        what = f"the label volume cannot be used: {error.what}"
        remedy = "Replace or remove the file"
        raise CohortError(what, where=path, got=error.got, expected=error.expected, remedy=remedy) from error
    tissue = _fill_sulci_with_csf(_labels_to_tissue(image.data, path))
    box = bounding_box(np.isin(tissue, [TISSUE_INDEX[name] for name in PARENCHYMA]))
    tissue = np.pad(tissue, 1)
    center = image.affine @ [*((extent.start + extent.stop - 1) / 2 for extent in box), 1.0]
    from_head = np.eye(4)
    from_head[:3, 3] = center[:3] - _BRAIN_CENTER_MM
    to_voxel = np.linalg.inv(image.affine) @ from_head
    to_voxel[:3, 3] += 1.0  # the voxel of padding
    grid = Grid.covering_head(_COARSE_MM)
    x, y, z = grid.offsets_mm()
    points = np.stack([to_voxel[a, 0] * x + to_voxel[a, 1] * y + to_voxel[a, 2] * z + to_voxel[a, 3] for a in range(3)])
    share = _tissue_share(tissue, points.astype(np.float32), _COARSE_MM / _voxel_mm(to_voxel))
    voxel_ml = float(np.prod(grid.spacing_mm)) / 1000
    ventricle = share[TISSUE_INDEX["ventricle"]] + share[TISSUE_INDEX["choroid_plexus"]]
    pull = np.stack(np.gradient(ndimage.gaussian_filter(ventricle, 5.0 / _COARSE_MM), *grid.spacing_mm))
    # Sampling at p + k∇v instead of p adds k∫∇v·∇v to the volume, to first order.
    gain_ml = float(np.sum(pull**2)) * voxel_ml
    sulcus = np.stack(np.gradient(ndimage.gaussian_filter(share[TISSUE_INDEX["csf"]], 0.8), *grid.spacing_mm))
    return LabelMap(
        tissue=tissue,
        to_voxel=to_voxel,
        ventricle_ml=float(ventricle.sum()) * voxel_ml,
        ventricle_displacement=pull / max(gain_ml, 1e-6),
        sulcus_displacement=sulcus * (1 / max(float(np.percentile(np.abs(sulcus).max(axis=0), 98)), 1e-6)),
    )


def _labels_to_tissue(labels: np.ndarray, path: Path) -> np.ndarray:
    known = {code: TISSUE_INDEX[name] for name, codes in TISSUE_LABELS.items() for code in codes}
    rounded = np.rint(labels).astype(np.int32)
    codes = np.unique(rounded)
    if unknown := [str(code) for code in codes if int(code) not in known]:
        got, remedy = ", ".join(unknown[:8]), "Renumber these labels, or set them to 0"
        raise CohortError("unknown label codes", where=path, got=got, expected="FreeSurfer numbering", remedy=remedy)
    white = {2, 41, *range(3000, 3036), *range(4000, 4036)}
    cortex = {3, 42, *range(1000, 1036), *range(2000, 2036)}
    if white.isdisjoint(codes.tolist()) or cortex.isdisjoint(codes.tolist()):
        text = "no usable labels: cerebral cortex or white matter is missing"
        got, expected = f"codes {', '.join(map(str, codes[:8].tolist()))}", "2, 3, 41, 42 and others"
        remedy = "Give anatomical segmentations with FreeSurfer's numbering"
        raise CohortError(text, where=path, got=got, expected=expected, remedy=remedy)
    table = np.zeros(int(codes.max()) + 1, np.uint8)
    for code in codes:
        table[code] = known[int(code)]
    return table[rounded]


def _fill_sulci_with_csf(tissue: np.ndarray) -> np.ndarray:
    """In a map without cerebrospinal fluid (a skull-stripped one), turn air near the brain into fluid."""
    csf, air = TISSUE_INDEX["csf"], TISSUE_INDEX["air"]
    if (tissue == csf).any():
        return tissue
    near = ndimage.binary_closing(np.pad(tissue != air, 6), iterations=5)[6:-6, 6:-6, 6:-6]
    return np.where(near & (tissue == air), np.uint8(csf), tissue)


def _voxel_mm(to_voxel: np.ndarray) -> float:
    return float(1 / np.cbrt(abs(np.linalg.det(to_voxel[:3, :3]))))


def _tissue_share(tissue: np.ndarray, points: np.ndarray, width: float) -> np.ndarray:
    """(T, …) shares of each tissue in cubes of `width` voxels (at least one) around `points` (3, …) in voxels."""
    share = np.zeros((len(TISSUES), points[0].size), np.float32)
    order = np.arange(points[0].size)
    strides = (tissue.shape[1] * tissue.shape[2], tissue.shape[2], 1)
    step = 0.25 * max(width, 1.0)
    lines = [
        [np.clip(np.rint(axis.ravel() + s * step), 0, size - 1).astype(np.int32) * stride for s in (-1, 1)]
        for axis, size, stride in zip(points, tissue.shape, strides, strict=True)
    ]
    flat_tissue = tissue.ravel()
    for x, y, z in product(*lines):
        share[flat_tissue[x + y + z], order] += np.float32(0.125)
    return share.reshape(len(TISSUES), *points.shape[1:])


class LabelledHead:
    """One person's head made from a label map, on `grid`; arguments as for `ParametricHead`."""

    def __init__(
        self,
        seed: list[int],
        grid: Grid,
        ageing: Ageing,
        label_map: LabelMap,
        size: float = 1.0,
        mass_effect: MassEffect | None = None,
    ) -> None:
        self.grid = grid
        self._tissue = label_map.tissue
        coarse = Grid.covering_head(_COARSE_MM)
        points = subject_coordinates(np.random.default_rng(seed), coarse, size, mass_effect)
        index = np.stack([(points[a] - coarse.axis_mm(a)[0]) / coarse.spacing_mm[a] for a in range(3)])
        wanted_ml = ageing.ventricle_volume_ml / size**3 - label_map.ventricle_ml
        opening = label_map.ventricle_displacement * wanted_ml
        length = np.sqrt(np.sum(opening**2, axis=0)) + 1e-6
        opening = opening * (_LARGEST_DILATION_MM * np.tanh(length / _LARGEST_DILATION_MM) / length)
        # Each wall moves by half of the change in width; 0.65 mm is the half width in middle age.
        opening += label_map.sulcus_displacement * float(np.clip(0.8 * (ageing.sulcal_half_width_mm - 0.65), -0.5, 0.8))
        moved = np.stack([ndimage.map_coordinates(component, index, order=1, mode="nearest") for component in opening])
        to_voxel = label_map.to_voxel
        voxels = np.tensordot(to_voxel[:3, :3], points + moved, 1) + to_voxel[:3, 3, None, None, None]
        self._voxels = voxels.astype(np.float32)
        self._matrices = resampling_matrices(coarse, grid)
        self._width = float(np.mean(grid.spacing_mm)) / _voxel_mm(to_voxel)

    def fractions(self, rows: slice) -> np.ndarray:
        return _tissue_share(self._tissue, apply_to_planes(self._voxels, self._matrices, rows), self._width)
