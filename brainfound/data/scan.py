"""One scan: a 3-D image file read, checked and turned to the closest RAS orientation."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import OrientationError, apply_orientation, inv_ornt_aff, io_orientation
from nibabel.spatialimages import HeaderDataError, SpatialImage
from nibabel.wrapstruct import WrapStructError

from brainfound.errors import ScanError

MAX_VOXELS = 1024**3
"""A header that claims more than this is refused before any memory is taken."""

_READ_ERRORS = (ImageFileError, HeaderDataError, WrapStructError, EOFError, OSError, zlib.error, ValueError)


@dataclass(frozen=True)
class Scan:
    """A 3-D image in its closest RAS orientation, beside the grid on which it was stored.

    Attributes:
        data: voxels ``(X, Y, Z)`` in float32; X runs left → right, Y posterior → anterior, Z inferior → superior
            as nearly as reordering and flipping the stored axes allows (nothing is interpolated).
        affine: ``(4, 4)``, index in ``data`` → millimetres in RAS+.
        native_shape: shape of the stored array.
        native_affine: ``(4, 4)``, index in the stored array → millimetres in RAS+.
    """

    data: Float[np.ndarray, "X Y Z"]
    affine: Float[np.ndarray, "4 4"]
    native_shape: tuple[int, int, int]
    native_affine: Float[np.ndarray, "4 4"]

    @property
    def spacing_mm(self) -> Float[np.ndarray, "3"]:
        """Voxel size along X, Y and Z in millimetres."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def __repr__(self) -> str:
        spacing = " × ".join(f"{s:.2f}" for s in self.spacing_mm)
        stored = "".join(nib.aff2axcodes(self.native_affine))
        size = f"{self.data.nbytes / 2**20:.0f} MiB"
        return f"Scan(shape={self.data.shape}, spacing_mm={spacing}, stored as {stored}, {size})"


def load_scan(path: str | Path, *, labels: bool = False) -> Scan:
    """Read a 3-D image (NIfTI or MGH) and check that it can be used.

    Args:
        path: the image file.
        labels: the image is a label map: an all-zero one is legal, values must be whole numbers ≥ 0.

    Raises:
        ScanError: the file is missing, truncated or not an image; it is not 3-D; it holds NaN or
            infinite values; it is constant (images) or not a label map (labels); its affine is singular.
    """
    path = Path(path)
    if not path.is_file():
        raise ScanError("no such file", where=path.name, remedy="Check the path in the manifest or folder")
    try:
        image = nib.load(path)
        if not isinstance(image, SpatialImage):
            raise ImageFileError(f"a {type(image).__name__} has no voxels")
        shape = _shape_3d(image.shape, path)
        data = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged")).reshape(shape)
        affine = np.asarray(image.affine, dtype=np.float64)
    except _READ_ERRORS as error:
        raise ScanError(
            f"cannot be read as an image: {_first_line(error)}",
            where=path.name,
            remedy="The file is truncated, corrupt or of another format; copy or export it again",
        ) from error
    _check_values(data, path, labels)
    orientation = _closest_canonical(affine, path)
    return Scan(
        data=apply_orientation(data, orientation),
        affine=affine @ inv_ornt_aff(orientation, shape),
        native_shape=shape,
        native_affine=affine,
    )


def _shape_3d(shape: tuple[int, ...], path: Path) -> tuple[int, int, int]:
    spatial = shape
    while len(spatial) > 3 and spatial[-1] == 1:
        spatial = spatial[:-1]
    if len(spatial) != 3:
        raise ScanError(
            "not a 3-D volume",
            where=path.name,
            got=f"shape {'×'.join(map(str, shape))}",
            expected="three dimensions",
            remedy="Extract one volume (for diffusion data the trace or b=1000 image)",
        )
    if min(spatial) < 2 or int(np.prod(spatial, dtype=np.float64)) > MAX_VOXELS:
        raise ScanError(
            "implausible size",
            where=path.name,
            got=f"shape {'×'.join(map(str, shape))}",
            expected=f"at least 2 voxels along each axis and at most {MAX_VOXELS} in all",
            remedy="Check the header",
        )
    return (int(spatial[0]), int(spatial[1]), int(spatial[2]))


def _check_values(data: np.ndarray, path: Path, labels: bool) -> None:
    # min and max carry NaN and infinities, so two passes without temporaries check everything.
    low, high = float(data.min()), float(data.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int(data.size - np.isfinite(data).sum())
        raise ScanError(
            "NaN or infinite values",
            where=path.name,
            got=f"{count} of {data.size} voxels",
            expected="finite values",
            remedy="Repair the file, for example by writing 0 there",
        )
    if labels:
        if low < 0 or high > 65535 or not np.array_equal(data, np.rint(data)):
            raise ScanError(
                "not a label map",
                where=path.name,
                got=f"values from {low:g} to {high:g}",
                expected="whole numbers from 0 to 65535",
                remedy="Give a hard segmentation",
            )
    elif low == high:
        what = "all voxels are zero" if low == 0 else f"all voxels have the value {low:g}"
        raise ScanError(what, where=path.name, expected="an image", remedy="Export the scan again or leave it out")


def _closest_canonical(affine: np.ndarray, path: Path) -> np.ndarray:
    try:
        orientation = io_orientation(affine)
    except (OrientationError, np.linalg.LinAlgError, ValueError) as error:
        raise ScanError(f"unusable affine: {_first_line(error)}", where=path.name) from error
    if np.isnan(orientation).any() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ScanError(
            "unusable affine: it is singular",
            where=path.name,
            expected="an invertible voxel-to-world matrix",
            remedy="Repair the header's sform or qform",
        )
    return orientation


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:160]
