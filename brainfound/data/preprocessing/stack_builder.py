"""Building a stack scan by scan, with no more than one scan in memory.

Axis legend: X left → right, Y posterior → anterior, Z inferior → superior (a scan in RAS);
S slices, C contrasts, H rows, W columns (a stack).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Bool, Num

from brainfound.data.preprocessing.foreground import bounding_box, foreground
from brainfound.data.preprocessing.grids import resample, resample_labels, shift, smooth_before_downsampling
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import ScanQuality, Stack, positions_mm, skull_state
from brainfound.data.reading.orientation import axis_codes
from brainfound.data.reading.scan import Scan
from brainfound.errors import ScanError

_POINTS_PER_AXIS = 32
_MIN_LABELS_IN_HEAD = 0.8
"""Smallest share of a cropped map's labels inside the head; of a randomly placed map it is about half."""
_NOTE_CROPPED_SHARE = 0.01
_NOTE_SPACING_RATIO = 3.0


class StackBuilder:
    """Build a stack: the reference scan defines the grid; further scans and a mask are added one by one.

    A ``file`` is the name of a scan in the quality table and notes. ScanError: the reference scan cannot be used.
    """

    def __init__(self, preprocessing: Preprocessing, contrast: str, reference: Scan, file: str = "") -> None:
        self.preprocessing = preprocessing
        inside = foreground(reference)
        to_scan, self.grid = compute_stack_grid(preprocessing, reference, inside)
        if self.grid[0] < preprocessing.min_slices:
            expected, remedy = f"at least {preprocessing.min_slices}", "Lower min_slices or leave the session out"
            raise ScanError("too few slices inside the foreground", got=self.grid[0], expected=expected, remedy=remedy)
        self.affine = reference.affine @ to_scan
        self.native_shape, self.native_affine = reference.native_shape, reference.native_affine
        self._points_mm = _foreground_points(reference, inside)
        self._inside, self._reference_affine = inside, reference.affine
        slices, height, width = self.grid
        self._pixels = np.zeros((slices, len(preprocessing.contrasts), height, width), dtype=preprocessing.pixel_dtype)
        self._present = np.zeros(len(preprocessing.contrasts), dtype=bool)
        self._mask: np.ndarray | None = None
        self.quality: list[ScanQuality] = []
        self._add(contrast, reference, inside, overlap=1.0, file=file)

    def add(self, contrast: str, scan: Scan, file: str = "") -> None:
        """Bring a further scan onto the grid; ScanError if it does not overlap the reference, or has no foreground."""
        overlap, least = self._covered_share(scan), self.preprocessing.min_overlap
        if overlap < least:
            raise _no_overlap("the scan", f"{overlap:.0%} of its foreground covered", f"at least {least:.0%}")
        self._add(contrast, scan, foreground(scan), overlap, file)

    def add_mask(self, mask: Scan, file: str = "") -> None:
        """Bring a label map in the same world space onto the grid.

        A map that is cropped around its labels is accepted if they lie in the foreground. Everything outside of its
        field of view is background; if that cuts off part of the head, the reference scan gets a note.
        ScanError: it does not overlap the reference scan.
        """
        covered, least = self._covered_share(mask), self.preprocessing.min_overlap
        if covered < least:
            inside_share = self._share_in_foreground(mask)
            if not inside_share >= _MIN_LABELS_IN_HEAD:
                inside = "no label" if np.isnan(inside_share) else f"{inside_share:.0%} of the labels in it"
                got = f"{covered:.0%} of its foreground covered, and {inside}"
                expected = f"at least {least:.0%}, or {_MIN_LABELS_IN_HEAD:.0%} of the labels in it"
                raise _no_overlap("the mask", got, expected)
        labels = mask.data.astype(np.uint8 if mask.data.max() <= 255 else np.uint16)
        affine = mask.affine
        if 1 - covered > _NOTE_CROPPED_SHARE:
            name = f"the mask {file}" if file else "the mask"
            note = f"{name} covers {covered:.0%} of the foreground; what lies outside of it counts as background"
            self.quality[0] = replace(self.quality[0], notes=(*self.quality[0].notes, note))
            # With a margin, labels at the faces of the map end as in a larger map.
            labels, affine = np.pad(labels, 1), affine @ shift(-1)
        self._mask = resample_labels(labels, np.linalg.inv(affine) @ self.affine, self.grid)

    def channel(self, contrast: str) -> Num[np.ndarray, "S H W"]:
        """The pixels of one contrast, as far as it was added."""
        return self._pixels[:, self.preprocessing.contrasts.index(contrast)]

    def build(self, covariates: Mapping[str, Any] | None = None, subject: str = "", session: str = "") -> Stack:
        """The stack of all scans that were added."""
        return Stack(
            pixels=self._pixels,
            contrasts=self.preprocessing.contrasts,
            present=self._present,
            positions_mm=positions_mm(self.grid[0], float(np.linalg.norm(self.affine[:3, 0]))),
            affine=self.affine,
            native_shape=self.native_shape,
            native_affine=self.native_affine,
            mask=self._mask,
            covariates=dict(covariates or {}),
            subject=subject,
            session=session,
        )

    def _add(self, contrast: str, scan: Scan, inside: Bool[np.ndarray, "X Y Z"], overlap: float, file: str) -> None:
        channel = self.preprocessing.contrasts.index(contrast)
        low, high = self._intensity_range(contrast, scan, inside)
        to_scan = np.linalg.inv(scan.affine) @ self.affine
        box = _needed_box(to_scan, self.grid, scan.data.shape)
        top = self.preprocessing.max_pixel_value
        # Background is 0; voxels outside of the box cannot reach the stack.
        scaled = scan.data[box] - np.float32(low)
        scaled *= np.float32(top / (high - low))
        np.clip(scaled, 0, top, out=scaled)
        scaled *= inside[box]
        to_scan[:3, 3] -= [part.start for part in box]
        # The length of one step on the stack's grid along each axis of the scan, in voxels of the scan.
        ratios = np.abs(to_scan[:3, :3]).max(axis=1)
        volume = resample(smooth_before_downsampling(scaled, ratios), to_scan, self.grid, order=1)
        del scaled
        np.rint(volume, out=volume)
        if not volume.any():
            expected = "a volume thicker than the stack's spacing, with values above the lowest"
            remedy = "Check its affine, and spacing_mm and ranges of the preprocessing"
            raise ScanError("nothing of the scan reaches the stack", expected=expected, remedy=remedy)
        self._pixels[:, channel] = volume
        self._present[channel] = True
        self.quality.append(self._measure_quality(contrast, scan, inside, (low, high), overlap, file))

    def _intensity_range(self, contrast: str, scan: Scan, inside: np.ndarray) -> tuple[float, float]:
        # Volumes are stored with x first: transposed, they and the mask are contiguous.
        values = scan.data.T[inside.T]
        if values.size == 0:
            raise ScanError("no foreground found", remedy="Check that the scan shows a head or brain")
        fixed = self.preprocessing.ranges.get(contrast)
        if fixed is not None:
            return fixed
        percentiles = self.preprocessing.percentiles
        low, high = two_percentiles(values, percentiles)
        if not high > low:
            got, remedy = f"percentiles {percentiles} both {low:g}", "Check that the file is an image and not a mask"
            raise ScanError("the foreground has one value only", got=got, remedy=remedy)
        return low, high

    def _covered_share(self, scan: Scan) -> float:
        """The share of the reference scan's foreground inside of a scan's field of view."""
        return _share_within(self._points_mm, scan.affine, scan.data.shape)

    def _share_in_foreground(self, mask: Scan) -> float:
        """The share of a map's labelled voxels inside the reference scan's foreground; nan without labels."""
        points = np.argwhere(mask.data)
        if not len(points):
            return float("nan")
        voxels = np.rint(_apply(np.linalg.inv(self._reference_affine) @ mask.affine, points)).astype(int)
        within = ((voxels >= 0) & (voxels < self._inside.shape)).all(axis=1)
        return float(self._inside[tuple(voxels[within].T)].sum() / len(points))

    def _measure_quality(
        self, contrast: str, scan: Scan, inside: np.ndarray, intensities: tuple[float, float], overlap: float, file: str
    ) -> ScanQuality:
        millilitres = float(np.count_nonzero(inside) * np.abs(np.linalg.det(scan.affine[:3, :3])) / 1000)
        cropped = 1 - _share_within(_foreground_points(scan, inside), self.affine, self.grid)
        notes = list(scan.notes)
        if cropped > _NOTE_CROPPED_SHARE:
            notes.append(f"{cropped:.0%} of the foreground is outside of the stack")
        coarser = float((scan.spacing_mm / np.linalg.norm(self.affine[:3, [2, 1, 0]], axis=0)).max())
        if coarser >= _NOTE_SPACING_RATIO:
            notes.append(f"voxels up to {coarser:.1f} times as long as the stack's: its slices are interpolated")
        x_mm, y_mm, z_mm = (float(length) for length in np.linalg.norm(scan.native_affine[:3, :3], axis=0))
        return ScanQuality(
            contrast=contrast,
            file=file,
            orientation=axis_codes(scan.native_affine),
            shape=scan.native_shape,
            spacing_mm=(x_mm, y_mm, z_mm),
            dtype=scan.header.dtype if scan.header else str(scan.data.dtype),
            foreground_ml=millilitres,
            skull=skull_state(scan, inside, millilitres),
            intensity_low=intensities[0],
            intensity_high=intensities[1],
            minimum=float(scan.data.min()),
            maximum=float(scan.data.max()),
            overlap=overlap,
            cropped=cropped,
            num_slices=self.grid[0],
            notes=tuple(notes),
        )


def compute_stack_grid(
    preprocessing: Preprocessing, scan: Scan, inside: Bool[np.ndarray, "X Y Z"]
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The grid of a stack around the foreground of its reference scan, and the grid's shape ``(S, H, W)``.

    The grid is an affine ``(4, 4)``, (slice, row, column) → index in the scan.
    """
    (x0, x1), (y0, y1), (z0, z1) = bounding_box(inside)
    wanted = zip(preprocessing.spacing_mm, scan.spacing_mm, strict=True)
    step = np.array([1.0 if spacing is None else spacing / own for spacing, own in wanted])
    # 2.0000002 mm in a header is 2 mm: such a scan keeps its own voxels as well.
    step = np.where(np.abs(step - 1) < 1e-4, 1.0, step)
    height, width = preprocessing.size
    num_slices = round((z1 - z0) / step[2]) + 1
    # With an unchanged spacing, rows and columns fall on the scan's own voxels: nothing is interpolated.
    x_first = _first_index((x0 + x1) / 2, width, step[0])
    y_last = -_first_index(-(y0 + y1) / 2, height, step[1])
    z_first = z0 if step[2] == 1 else (z0 + z1) / 2 - (num_slices - 1) / 2 * step[2]
    to_scan = shift([x_first, y_last, z_first])
    to_scan[:3, :3] = [[0.0, 0.0, step[0]], [0.0, -step[1], 0.0], [step[2], 0.0, 0.0]]
    return to_scan, (num_slices, height, width)


def two_percentiles(values: Num[np.ndarray, "n"], percentiles: tuple[float, float]) -> tuple[float, float]:
    """Two rising percentiles, interpolated as by `numpy.percentile`, in a fifth of its time.

    The second partition works on the values above the first; `numpy.percentile` partitions around four places. The
    values, which must not be empty, are reordered in place.
    """
    results = []
    above, passed = values, 0
    for percentile in percentiles:
        place = percentile / 100 * (len(values) - 1)
        rank = int(place) - passed
        above.partition(rank)
        value = float(above[rank])
        if place > int(place):
            following = float(above[rank + 1 :].min())
            value += (following - value) * (place - int(place))
        results.append(value)
        above, passed = above[rank:], passed + rank
    return results[0], results[1]


def _first_index(centre: float, count: int, step: float) -> float:
    """Index of the first of ``count`` samples, ``step`` apart, centred on ``centre``."""
    first = centre - (count - 1) / 2 * step
    return float(np.floor(first)) if step == 1 else first


def _needed_box(to_scan: np.ndarray, grid: tuple[int, int, int], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of a scan that affects a grid, with the blur before sampling; at least one voxel."""
    mapped = _apply(to_scan, np.array(list(product(*((0, n - 1) for n in grid)))))
    # Twice the sampling step covers the blur (three standard deviations, 0.42 steps each) and the interpolation.
    margin = np.ceil(2 * np.abs(to_scan[:3, :3]).max(axis=1)) + 2
    low = np.clip(np.floor(mapped.min(axis=0) - margin), 0, np.array(shape) - 1).astype(int)
    high = np.clip(np.ceil(mapped.max(axis=0) + margin) + 1, low + 1, shape).astype(int)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def _apply(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points, ``(n, 3)``, transformed by an affine."""
    return points @ affine[:3, :3].T + affine[:3, 3]


def _no_overlap(what: str, got: str, expected: str) -> ScanError:
    remedy = "Check that the files belong together and that their affines are right"
    what = f"{what} does not overlap the session's reference scan"
    return ScanError(what, got=got, expected=expected, remedy=remedy)


def _foreground_points(scan: Scan, inside: np.ndarray) -> np.ndarray:
    """Evenly spread points of the foreground, ``(n, 3)`` in mm."""
    step = [max(n // _POINTS_PER_AXIS, 1) for n in inside.shape]
    return _apply(scan.affine, np.argwhere(inside[:: step[0], :: step[1], :: step[2]]) * step)


def _share_within(points_mm: np.ndarray, affine: np.ndarray, shape: tuple[int, ...]) -> float:
    """The share of points that lie in the field of view of a grid."""
    if not len(points_mm):
        return 0.0
    mapped = _apply(np.linalg.inv(affine), points_mm)
    return float(((mapped >= -0.5) & (mapped <= np.array(shape) - 0.5)).all(axis=1).mean())
