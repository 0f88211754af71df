"""One scan: a 3-D image file, read, checked and turned to the closest RAS orientation.

Axis legend: X left → right, Y posterior → anterior, Z inferior → superior.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from nibabel.nifti1 import Nifti1Header
from nibabel.orientations import apply_orientation, inv_ornt_aff
from scipy import ndimage

from brainfound.data.preprocessing.foreground import foreground
from brainfound.data.preprocessing.grids import faces
from brainfound.data.reading.header_geometry import (
    AffineSource,
    axis_codes,
    check_affine,
    closest_canonical,
    shear_notes,
)
from brainfound.data.reading.image_file import ImageHeader, read_image_header, read_voxels
from brainfound.errors import ScanError

MAX_VALUE = 1e30
"""Largest absolute value of a voxel. No scanner writes it, and sums of larger values overflow float32."""
MAX_LABEL = 65535
"""Largest code of a label map."""
LABEL_ROUNDING = 0.01
"""Distance from a whole number that is the rounding of whoever wrote a label map."""
MAX_NONFINITE_SHARE = 1e-3
"""Share of voxels outside of the head that may be NaN or infinite; more is a damaged file or a mask in NaN."""
MIN_RANGE = 1e-30
"""Smallest range of an image's values that can be scaled in float32. Diffusivities in m²/s vary by 1e-9."""

MAX_MASK_VALUES, MAX_LABEL_VALUES = 12, 2000
"""No more different values than the first are those of a mask, or a coarse quantisation; no label map has more than the
second."""
MIN_FLAT_SHARE, MAX_STEP_SHARE = 0.7, 0.5
"""In a label map more neighbours than the first share are equal, along each axis; of the others fewer than the second
are next to each other among the values. A quantised scan that is as flat rises and falls by single steps: 0.88 or
more."""


@dataclass(frozen=True)
class ScanHeader:
    """The header of an image file; shape and spacing refer to the stored axes.

    ``affine`` is ``(4, 4)``, index in the stored array → millimetres in RAS+. ``notes`` are for a person to check.
    """

    shape: tuple[int, int, int]
    dtype: str
    affine: Float[np.ndarray, "4 4"]
    spacing_mm: tuple[float, float, float]
    affine_source: AffineSource
    notes: tuple[str, ...] = ()
    spatial: Nifti1Header | None = field(default=None, repr=False, compare=False)
    """qform, sform and their codes, see `brainfound.data.reading.header_geometry.spatial_header`; None if not NIfTI."""


@dataclass(frozen=True)
class Scan:
    """A 3-D image in its closest RAS orientation, and its stored grid.

    Attributes:
        data: voxels ``(X, Y, Z)`` in float32; the stored axes are only reordered and flipped, nothing is interpolated.
        affine: ``(4, 4)``, index in ``data`` → millimetres in RAS+.
        native_shape, native_affine: of the stored array.
        header: None for a scan created in memory.
        notes: those of the header, and on corrected voxels.
    """

    data: Float[np.ndarray, "X Y Z"]
    affine: Float[np.ndarray, "4 4"]
    native_shape: tuple[int, int, int]
    native_affine: Float[np.ndarray, "4 4"]
    header: ScanHeader | None = None
    notes: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> Float[np.ndarray, "3"]:
        """Voxel size along X, Y and Z in millimetres."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def __repr__(self) -> str:
        spacing = " × ".join(f"{s:.2f}" for s in self.spacing_mm)
        size = f"{self.data.nbytes / 2**20:.0f} MiB"
        stored = axis_codes(self.native_affine)
        return f"Scan(shape={self.data.shape}, spacing_mm={spacing}, stored as {stored}, {size})"


def read_header(path: str | Path) -> ScanHeader:
    """Read and check the header of an image, also in a zip archive; ScanError as `load_scan`. No voxel is read."""
    return _scan_header(read_image_header(Path(path)))


def load_scan(path: str | Path, *, labels: bool = False) -> Scan:
    """Read and check a 3-D image (NIfTI or MGH); at most one float32 copy of the volume is in memory.

    Args:
        path: the image file, or a member of a zip archive (``…/ses-01.zip/anat/x.nii.gz``).
        labels: the image is a label map: values are whole numbers ≥ 0, and all may be 0.

    Raises:
        ScanError: the file is missing, damaged or not a 3-D image, or its values or affine are implausible.
    """
    path = Path(path)
    image = read_image_header(path)
    header = _scan_header(image)
    data, low, high = read_voxels(image)
    orientation = closest_canonical(image.affine, path)
    scan = Scan(
        data=apply_orientation(data, orientation),
        affine=image.affine @ inv_ornt_aff(orientation, header.shape),
        native_shape=header.shape,
        native_affine=image.affine,
        header=header,
        notes=header.notes,
    )
    # Corrections are made in `data`, of which the scan's voxels are a view.
    if labels:
        note = _round_labels(data, low, high, image)
    else:
        note = "" if np.isfinite(low) and np.isfinite(high) else _fill_nonfinite(scan, path)
        _check_range(data, *((float(data.min()), float(data.max())) if note else (low, high)), path)
    return replace(scan, notes=(*scan.notes, note)) if note else scan


def _scan_header(image: ImageHeader) -> ScanHeader:
    check_affine(image.affine, image.shape_3d, image.path)
    closest_canonical(image.affine, image.path)
    x, y, z = (float(size) for size in np.linalg.norm(image.affine[:3, :3], axis=0))
    return ScanHeader(
        shape=image.shape_3d,
        dtype=image.dtype.name,
        affine=image.affine,
        spacing_mm=(x, y, z),
        affine_source=image.affine_source,
        notes=image.notes + shear_notes(image.affine),
        spatial=image.spatial,
    )


def _check_range(data: np.ndarray, low: float, high: float, path: Path) -> None:
    if max(-low, high) > MAX_VALUE or 0 < high - low < MIN_RANGE:
        got, expected = f"{low:g} to {high:g}", f"at most {MAX_VALUE:g}, and a range of at least {MIN_RANGE:g}"
        remedy = "The file or its scaling is damaged; export it again"
        raise ScanError("implausible values", where=path.name, got=got, expected=expected, remedy=remedy)
    if low == high:
        what = "all voxels are zero" if low == 0 else f"all voxels have the value {low:g}"
        raise ScanError(what, where=path.name, expected="an image", remedy="Export the scan again or leave it out")


def labels_in(scan: Scan) -> Literal["no", "perhaps", "surely"]:
    """Whether a scan is a mask or label map: whole numbers in flat regions with sudden borders.

    A scan that was quantised is none, since its values rise and fall by single steps; with few of them, it is perhaps.
    """
    sample = np.unique(scan.data[::3, ::3, ::3])
    unsure: Literal["no", "perhaps"] = "perhaps" if len(sample) <= MAX_MASK_VALUES else "no"
    if len(sample) > MAX_LABEL_VALUES or not np.array_equal(sample, np.rint(sample)):
        return unsure
    middle = scan.data[tuple(slice(n // 4, max(n - n // 4, n // 4 + 2)) for n in scan.data.shape)]
    low = float(middle.min())
    if float(middle.max()) - low > MAX_LABEL or not np.array_equal(middle, np.rint(middle)):
        return unsure
    codes = (middle - np.float32(low)).astype(np.int32)
    counts = np.bincount(codes.ravel())
    ranks = (np.cumsum(counts > 0) - 1)[codes].astype(np.int32)
    most = ranks.flat[np.flatnonzero(codes == counts.argmax())[0]]
    flat, num_others, num_steps = [], 0, 0
    for axis in range(3):
        here, after = (ranks.take(range(a, ranks.shape[axis] - 1 + a), axis) for a in (0, 1))
        distance = np.abs(after - here)[(here != most) & (after != most)]
        flat.append(np.count_nonzero(distance == 0) / max(len(distance), 1))
        num_others += int(np.count_nonzero(distance))
        num_steps += int(np.count_nonzero(distance == 1))
    is_flat = min(flat) > MIN_FLAT_SHARE and num_steps < MAX_STEP_SHARE * num_others
    return "surely" if is_flat or len(sample) <= 2 else unsure


def _nonfinite_error(count: int, size: int, path: Path, where: str = "") -> ScanError:
    got, remedy = f"{count} of {size} voxels{where}", "Repair the file, for example by writing 0 there"
    return ScanError("NaN or infinite values", where=path.name, got=got, expected="finite values", remedy=remedy)


def _fill_nonfinite(scan: Scan, path: Path) -> str:
    """Give a few NaN or infinite voxels outside of the head the value of the background; returns the note on it.

    ScanError: they are too many, or one of them lies in the head or touches it.
    """
    data = scan.data
    faulty = ~np.isfinite(data)
    count = int(np.count_nonzero(faulty))
    if count > max(MAX_NONFINITE_SHARE * data.size, 1):
        raise _nonfinite_error(count, data.size, path)
    outermost = np.concatenate([plane.ravel() for plane in faces(data)])
    outermost = outermost[np.isfinite(outermost)]
    data[faulty] = np.median(outermost) if outermost.size else 0
    # A hole in a stripped brain has the value of its background now: it is closed again.
    with np.errstate(all="ignore"):
        inside = ndimage.binary_fill_holes(foreground(data, scan.affine))
    in_head = int(np.count_nonzero(faulty & ndimage.binary_dilation(inside, np.ones((3, 3, 3)))))
    if in_head or not inside.any():
        raise _nonfinite_error(count, data.size, path, f", {in_head} of them in the head" if in_head else "")
    voxels = "1 voxel" if count == 1 else f"{count} voxels"
    return f"{voxels} outside of the head {'was' if count == 1 else 'were'} NaN or infinite, and became background"


def _round_labels(data: np.ndarray, low: float, high: float, image: ImageHeader) -> str:
    """Round label codes to whole numbers, where they stand for them; returns a note if one changed.

    A scaled integer stands for the whole number within half a step, if each code has one stored value; any number
    stands for the whole number within `LABEL_ROUNDING`.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        raise _nonfinite_error(int(data.size - np.isfinite(data).sum()), data.size, image.path)
    # Slice by slice: another copy of the volume would double the memory.
    slices = [data[:, :, z] for z in range(data.shape[2])]
    largest = max(float(np.abs(part - np.rint(part)).max()) for part in slices)
    limit = LABEL_ROUNDING
    values: set[float] = set()
    if largest > LABEL_ROUNDING:
        for part in slices:
            values.update(np.unique(part).tolist())
            if len(values) > MAX_LABEL:
                break
        step = abs(float(np.max(image.slope or 0.0))) if image.dtype.kind in "iu" else 0.0
        # Of a step of 1 or more, some codes cannot be stored; float32 values carry a rounding of their own.
        if step < 1 and len({round(value) for value in values}) == len(values):
            limit = max(LABEL_ROUNDING, step / 2 + 1e-6 * abs(high))
    if np.rint(low) < 0 or np.rint(high) > MAX_LABEL or largest > limit:
        got = f"values from {low:g} to {high:g}"
        if largest > limit:
            first = min(value for value in values if abs(value - round(value)) > limit)
            got = f"the value {first:.6g}, in {int(np.count_nonzero(data == first))} voxels, and {got}"
        remedy = "Give a hard segmentation"
        expected = f"whole numbers from 0 to {MAX_LABEL}"
        raise ScanError("not a label map", where=image.path.name, got=got, expected=expected, remedy=remedy)
    if not largest:
        return ""
    for part in slices:
        np.rint(part, out=part)
    return f"label codes were rounded to whole numbers, by up to {largest:.2g}"
