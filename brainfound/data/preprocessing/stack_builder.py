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

from brainfound.data.preprocessing.foreground import foreground
from brainfound.data.preprocessing.grids import (
    bounding_box,
    resample,
    resample_labels,
    shift,
    smooth_before_downsampling,
)
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import ScanQuality, Stack, positions_mm, skull_state
from brainfound.data.reading.header_geometry import SFORM_QFORM_MM, axis_codes
from brainfound.data.reading.scan import Scan
from brainfound.errors import ScanError

_POINTS_PER_AXIS = 32
_MIN_LABELS_IN_HEAD = 0.8
"""Smallest share of a map's labels inside the head; of a randomly placed map it is about half."""
_LABEL_MARGIN_MM = 3.0
"""Labels this near count as inside the head: a stripped brain ends where its mask ended."""
_MAX_LABEL_POINTS = 100_000
_NOTE_CROPPED_SHARE = 0.01
_NOTE_SPACING_RATIO = 3.0


class StackBuilder:
    """Build a stack: the reference scan defines the grid; further scans and a mask are added one by one.

    A ``file`` is the name of a scan in the quality table and notes. ScanError: the reference scan cannot be used.
    """

    def __init__(self, preprocessing: Preprocessing, contrast: str, reference: Scan, file: str = "") -> None:
        self.preprocessing = preprocessing
        whole = foreground(reference.data, reference.affine)
        inside, self.cut_mm = cut_below(whole, preprocessing.field_of_view_mm, reference.spacing_mm[2])
        to_scan, self.grid = compute_stack_grid(preprocessing, reference, inside)
        if self.grid[0] < preprocessing.min_slices:
            expected, remedy = f"at least {preprocessing.min_slices}", "Lower min_slices or leave the session out"
            raise ScanError("too few slices inside the foreground", got=self.grid[0], expected=expected, remedy=remedy)
        self.affine = reference.affine @ to_scan
        self.native_shape, self.native_affine = reference.native_shape, reference.native_affine
        self._native_header = reference.header.spatial if reference.header else None
        self._points_mm = _foreground_points(reference, inside)
        self._inside, self._reference_affine = whole, reference.affine
        slices, height, width = self.grid
        self._pixels = np.zeros((slices, len(preprocessing.contrasts), height, width), dtype=preprocessing.pixel_dtype)
        self._present = np.zeros(len(preprocessing.contrasts), dtype=bool)
        self._mask: np.ndarray | None = None
        self.quality: list[ScanQuality] = []
        self._grids: list[tuple[np.ndarray, tuple[int, ...]]] = []
        """Affine and shape of each scan in RAS."""
        self._add(contrast, reference, whole, overlap=1.0, file=file)

    def add(self, contrast: str, scan: Scan, file: str = "") -> None:
        """Bring a further scan onto the grid; ScanError if it does not overlap the reference, or has no foreground."""
        overlap = self._covered_share(scan)
        least = self.preprocessing.min_overlap
        if overlap < least:
            raise _no_overlap("the scan", f"{overlap:.0%} of its foreground covered", f"at least {least:.0%}")
        self._add(contrast, scan, foreground(scan.data, scan.affine), overlap, file)

    def note(self, text: str, place: int = -1) -> None:
        """Add a note to the quality of a scan: by default of the last one."""
        quality = self.quality[place]
        self.quality[place] = replace(quality, notes=(*quality.notes, text))

    def add_mask(self, mask: Scan) -> None:
        """Bring a label map in the same world space onto the grid.

        Its labels must lie in the head, however much of the head its field of view covers. Everything outside of that
        is background; if it cuts off part of the head, the reference scan gets a note.
        ScanError: its labels lie elsewhere, or it covers too little of the head and is not cropped around labels.
        """
        covered, least = self._covered_share(mask), self.preprocessing.min_overlap
        inside_share = self._share_in_head(mask, project=covered >= least)
        distance_mm = self._distance_to_same_grid(mask)
        has_labels = not np.isnan(inside_share)
        # A map that is cropped around its labels has fewer voxels than the scan on which it was drawn.
        is_cropped = covered < least and has_labels and not distance_mm
        if inside_share < _MIN_LABELS_IN_HEAD or (covered < least and not is_cropped):
            inside = f"{inside_share:.0%} of the labels in it" if has_labels else "no label"
            got = f"{covered:.0%} of its foreground covered, and {inside}"
            if distance_mm:
                got += f"; a grid like that of a scan, {distance_mm:.0f} mm away"
            expected = f"at least {_MIN_LABELS_IN_HEAD:.0%} of the labels in it"
            if covered < least:
                expected = f"at least {least:.0%}, or a cropped map with {expected}"
                raise _no_overlap("the mask", got, expected)
            remedy = "Check that the mask was drawn on a scan of this session, and its affine"
            what = "the labels of the mask lie outside of the head"
            raise ScanError(what, got=got, expected=expected, remedy=remedy)
        labels = mask.data.astype(np.uint8 if mask.data.max() <= 255 else np.uint16)
        affine = mask.affine
        for note in mask.notes:
            self.note(f"the mask: {note}", place=0)
        if distance_mm:
            text = f"the mask has the voxel grid of a scan, {distance_mm:.1f} mm away: if it was drawn on it, its"
            self.note(f"{text} affine is wrong", place=0)
        if 1 - covered > _NOTE_CROPPED_SHARE:
            note = f"the mask covers {covered:.0%} of the foreground; what lies outside of it counts as background"
            self.note(note, place=0)
            # With a margin, labels at the faces of the map end as in a larger map.
            labels, affine = np.pad(labels, 1), affine @ shift(-1)
        if self.cut_mm:
            self._note_cut_labels(labels, affine)
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
            native_header=self._native_header,
        )

    def _add(self, contrast: str, scan: Scan, whole: Bool[np.ndarray, "X Y Z"], overlap: float, file: str) -> None:
        channel = self.preprocessing.contrasts.index(contrast)
        inside = whole & self._in_view(scan.affine, whole.shape) if self.cut_mm else whole
        low, high = self._intensity_range(contrast, scan, inside)
        to_scan = np.linalg.inv(scan.affine) @ self.affine
        box = _needed_box(to_scan, self.grid, scan.data.shape)
        top = self.preprocessing.max_pixel_value
        # Background is 0; voxels outside of the box cannot reach the stack.
        scaled = scan.data[box] - np.float32(low)
        scaled *= np.float32(top / (high - low))
        np.clip(scaled, 0, top, out=scaled)
        scaled *= whole[box]
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
        self._grids.append((scan.affine, scan.data.shape))
        self.quality.append(self._measure_quality(contrast, scan, whole, inside, (low, high), overlap, file))

    def _in_view(self, affine: np.ndarray, shape: tuple[int, ...]) -> Bool[np.ndarray, "X Y Z"]:
        """The voxels of a grid that do not lie below the stack's field of view."""
        to_slice = (np.linalg.inv(self.affine) @ affine)[0]
        x, y, z = np.ogrid[: shape[0], : shape[1], : shape[2]]
        return to_slice[0] * x + to_slice[1] * y + to_slice[2] * z + to_slice[3] >= -0.5 - 1e-6

    def _note_cut_labels(self, labels: Num[np.ndarray, "X Y Z"], affine: np.ndarray) -> None:
        """Note on the reference scan how many labelled voxels the field of view cuts off, and codes that it loses."""
        below = labels[~self._in_view(affine, labels.shape)]
        if not (count := np.count_nonzero(below)):
            return
        all_codes, all_counts = np.unique(labels[labels > 0], return_counts=True)
        codes, counts = np.unique(below[below > 0], return_counts=True)
        total = dict(zip(all_codes.tolist(), all_counts.tolist(), strict=True))
        lost = [str(code) for code, n in zip(codes.tolist(), counts.tolist(), strict=True) if n == total[code]]
        text = f"{count} of {all_counts.sum()} labelled voxels of the mask lie below the field of view: background"
        self.note(f"{text}; lost codes: {', '.join(lost)}" if lost else text, place=0)

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

    def _share_in_head(self, mask: Scan, project: bool) -> float:
        """The share of a map's labelled voxels in or near the reference scan's foreground; nan without labels.

        A map whose labels cover the head, such as one of all tissues and the air, is in it. With ``project``, labels
        outside of the field of view count as at its face: a slab shows only a part of the head.
        """
        if not mask.data.any():
            return float("nan")
        if _share_labelled(self._points_mm, mask) >= _MIN_LABELS_IN_HEAD:
            return 1.0
        points = np.argwhere(mask.data)
        points = points[:: max(len(points) // _MAX_LABEL_POINTS, 1)]
        voxels = _apply(np.linalg.inv(self._reference_affine) @ mask.affine, points)
        margin = _LABEL_MARGIN_MM / np.linalg.norm(self._reference_affine[:3, :3], axis=0)
        near = np.zeros(len(points), dtype=bool)
        for step in product((0, -1, 1), repeat=3):
            rest = np.flatnonzero(~near)
            index = np.rint(voxels[rest] + np.array(step) * margin).astype(int)
            nearest = np.clip(index, 0, np.array(self._inside.shape) - 1)
            within = project | (nearest == index).all(axis=1)
            near[rest] = within & self._inside[tuple(nearest.T)]
        return float(near.mean())

    def _distance_to_same_grid(self, mask: Scan) -> float:
        """Distance in mm of a map from the nearest scan with as many voxels along each axis; 0 if none, or if equal."""
        alike = [affine for affine, shape in self._grids if shape == mask.data.shape]
        corners = np.array(list(product(*((0, n - 1) for n in mask.data.shape))))
        here = _apply(mask.affine, corners)
        distances = [np.linalg.norm(_apply(affine, corners) - here, axis=1).max() for affine in alike]
        nearest = float(min(distances, default=0.0))
        return nearest if nearest > SFORM_QFORM_MM else 0.0

    def _measure_quality(
        self,
        contrast: str,
        scan: Scan,
        whole: np.ndarray,
        inside: np.ndarray,
        intensities: tuple[float, float],
        overlap: float,
        file: str,
    ) -> ScanQuality:
        millilitres = float(np.count_nonzero(whole) * np.abs(np.linalg.det(scan.affine[:3, :3])) / 1000)
        cropped = 1 - _share_within(_foreground_points(scan, inside), self.affine, self.grid)
        notes = list(scan.notes)
        if cropped > _NOTE_CROPPED_SHARE:
            notes.append(f"{cropped:.0%} of the foreground is outside of the stack")
        if self.cut_mm and not self.quality:
            notes.append(f"{self.cut_mm:.0f} mm below the field of view are cut off")
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
            skull=skull_state(scan, whole, millilitres),
            intensity_low=intensities[0],
            intensity_high=intensities[1],
            minimum=float(scan.data.min()),
            maximum=float(scan.data.max()),
            overlap=overlap,
            cropped=cropped,
            num_slices=self.grid[0],
            cut_mm=self.cut_mm,
            notes=tuple(notes),
        )


def cut_below(
    inside: Bool[np.ndarray, "X Y Z"], field_of_view_mm: float | None, slice_mm: float
) -> tuple[Bool[np.ndarray, "X Y Z"], float]:
    """The foreground without what lies further below its top than the field of view, and the mm that were cut.

    The length is measured along the scan's own slice axis, so that whole slices are kept or cut.
    Source: robustfov of FSL (Jenkinson et al., "FSL", NeuroImage 2012), which keeps 170 mm.
    """
    part = bounding_box(inside)[2]
    if field_of_view_mm is None or (lowest := part.stop - round(field_of_view_mm / slice_mm)) <= part.start:
        return inside, 0.0
    kept = inside.copy()
    kept[:, :, :lowest] = False
    return kept, float((lowest - part.start) * slice_mm)


def compute_stack_grid(
    preprocessing: Preprocessing, scan: Scan, inside: Bool[np.ndarray, "X Y Z"]
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The grid of a stack around the foreground of its reference scan, and the grid's shape ``(S, H, W)``.

    The grid is an affine ``(4, 4)``, (slice, row, column) → index in the scan.
    """
    (x0, x1), (y0, y1), (z0, z1) = ((part.start, part.stop - 1) for part in bounding_box(inside))
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


def _share_labelled(points_mm: np.ndarray, mask: Scan) -> float:
    """The share of points at which a map has a label."""
    voxels = np.rint(_apply(np.linalg.inv(mask.affine), points_mm)).astype(int)
    within = ((voxels >= 0) & (voxels < mask.data.shape)).all(axis=1)
    return float(np.count_nonzero(mask.data[tuple(voxels[within].T)]) / max(len(points_mm), 1))


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
