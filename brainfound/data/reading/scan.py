"""One scan: a 3-D image file, read, checked and turned to the closest RAS orientation.

Axis legend: X left → right, Y posterior → anterior, Z inferior → superior.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from nibabel.orientations import apply_orientation, inv_ornt_aff

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
MIN_RANGE = 1e-30
"""Smallest range of an image's values that can be scaled in float32. Diffusivities in m²/s vary by 1e-9."""


@dataclass(frozen=True)
class ScanHeader:
    """The header of an image file; shape, orientation (such as ``"LPS"``) and spacing refer to the stored axes.

    ``affine`` is ``(4, 4)``, index in the stored array → millimetres in RAS+. ``notes`` are for a person to check.
    """

    shape: tuple[int, int, int]
    dtype: str
    affine: Float[np.ndarray, "4 4"]
    orientation: str
    spacing_mm: tuple[float, float, float]
    affine_source: AffineSource
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scan:
    """A 3-D image in its closest RAS orientation, and its stored grid.

    Attributes:
        data: voxels ``(X, Y, Z)`` in float32; the stored axes are only reordered and flipped, nothing is interpolated.
        affine: ``(4, 4)``, index in ``data`` → millimetres in RAS+.
        native_shape, native_affine: of the stored array.
        header: None for a scan created in memory.
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
    _check_values(data, low, high, path, labels)
    orientation = closest_canonical(image.affine, path)
    return Scan(
        data=apply_orientation(data, orientation),
        affine=image.affine @ inv_ornt_aff(orientation, header.shape),
        native_shape=header.shape,
        native_affine=image.affine,
        header=header,
        notes=header.notes,
    )


def _scan_header(image: ImageHeader) -> ScanHeader:
    check_affine(image.affine, image.shape_3d, image.path)
    closest_canonical(image.affine, image.path)
    x, y, z = (float(size) for size in np.linalg.norm(image.affine[:3, :3], axis=0))
    return ScanHeader(
        shape=image.shape_3d,
        dtype=image.dtype.name,
        affine=image.affine,
        orientation=axis_codes(image.affine),
        spacing_mm=(x, y, z),
        affine_source=image.affine_source,
        notes=image.notes + shear_notes(image.affine),
    )


def _check_values(data: np.ndarray, low: float, high: float, path: Path, labels: bool) -> None:
    # NaN and infinite voxels show in the smallest and largest value.
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int(data.size - np.isfinite(data).sum())
        got, remedy = f"{count} of {data.size} voxels", "Repair the file, for example by writing 0 there"
        raise ScanError("NaN or infinite values", where=path.name, got=got, expected="finite values", remedy=remedy)
    if labels:
        if low < 0 or high > 65535 or not _all_integers(data):
            got, expected = f"values from {low:g} to {high:g}", "whole numbers from 0 to 65535"
            remedy = "Give a hard segmentation"
            raise ScanError("not a label map", where=path.name, got=got, expected=expected, remedy=remedy)
    elif max(-low, high) > MAX_VALUE or 0 < high - low < MIN_RANGE:
        got, expected = f"{low:g} to {high:g}", f"at most {MAX_VALUE:g}, and a range of at least {MIN_RANGE:g}"
        remedy = "The file or its scaling is damaged; export it again"
        raise ScanError("implausible values", where=path.name, got=got, expected=expected, remedy=remedy)
    elif low == high:
        what = "all voxels are zero" if low == 0 else f"all voxels have the value {low:g}"
        raise ScanError(what, where=path.name, expected="an image", remedy="Export the scan again or leave it out")


def _all_integers(data: np.ndarray) -> bool:
    # Slice by slice: a rounded copy of the volume would double the memory.
    return all(np.array_equal(data[:, :, z], np.rint(data[:, :, z])) for z in range(data.shape[2]))
