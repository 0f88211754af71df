"""From voxels to the world: the affine of a header, its plausibility, and the closest RAS orientation."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from jaxtyping import Float
from nibabel.freesurfer.mghformat import MGHError, MGHHeader
from nibabel.nifti1 import Nifti1Header
from nibabel.orientations import OrientationError, io_orientation
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from brainfound.errors import ScanError

SFORM_QFORM_MM = 0.5
"""Distance at a corner of the volume: more than rounding, less than matters at 1 mm."""

SHEAR_DEGREES = 0.5
"""Deviation from a right angle that is worth a note: half a voxel at the edge of a head."""

SPACING_MM = (0.05, 50.0)
"""From microscopy to the thickest localiser; metres or micrometres fall outside."""

MAX_ORIGIN_MM = 1e5
"""Distance of the first voxel from the origin: no scanner is 100 m long, and float32 headers lose millimetres there."""

MAX_EXTENT_MM = 2000.0
"""Length of a volume along one axis: a person."""

MIN_VOLUME_SHARE = 0.5
"""Volume of a voxel over the product of its edges: 1 for right angles, 0.87 for a gantry tilted by 30 degrees."""

HEADER_ERRORS = (HeaderDataError, WrapStructError, MGHError, ArithmeticError, LookupError, ValueError, TypeError)
"""Errors that nibabel raises for a damaged header."""

AffineSource = Literal["sform", "qform", "header size only", "mgh"]

_UNITS = {0: "", 1: "metres", 2: "", 3: "micrometres"}


def header_affine(header: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, AffineSource, list[str]]:
    """The affine of a nibabel header, as nibabel chooses it.

    Args:
        header: a NIfTI, Analyze or MGH header.
        shape: of the volume, for distances at its corners.

    Returns:
        The affine ``(4, 4)``, its source, and notes: sform and qform disagree, the header's voxel sizes differ from the
        affine's, lengths are not in millimetres, or the header has no orientation.
    """
    notes: list[str] = []
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    if isinstance(header, MGHHeader):
        if header["goodRASFlag"]:
            return affine, "mgh", notes
        source: AffineSource = "header size only"
    elif isinstance(header, Nifti1Header):
        source = "header size only"
        if header["sform_code"] != 0:
            source = "sform"
            if header["qform_code"] != 0:
                notes += _compare_with_qform(header, affine, shape)
        elif header["qform_code"] != 0:
            source = "qform"
        if unit := _UNITS.get(int(header["xyzt_units"]) & 7, "an unknown unit"):
            notes.append(f"the header's lengths are in {unit}; they were read as millimetres")
        if source == "sform":
            notes += _compare_with_pixdim(header, affine)
    else:
        source = "header size only"
    if source == "header size only":
        notes.append("no orientation in the header; taken from voxel sizes, left-right may be wrong")
    return affine, source, notes


def _compare_with_qform(header: Any, affine: np.ndarray, shape: tuple[int, int, int]) -> list[str]:
    try:
        other = np.asarray(header.get_qform(), dtype=np.float64)
    except HEADER_ERRORS:
        return ["the header's qform is not valid; the sform was used"]
    corners = np.array(list(product(*((0, n - 1) for n in shape), [1])))
    apart = float(np.linalg.norm((corners @ (affine - other).T)[:, :3], axis=1).max())
    if apart <= SFORM_QFORM_MM:
        return []
    return [f"sform and qform disagree by up to {apart:.1f} mm at a corner of the volume; the sform was used"]


def _compare_with_pixdim(header: Any, affine: np.ndarray) -> list[str]:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    stated = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    if np.allclose(stated, sizes, rtol=0.01, atol=0.001):
        return []
    return [
        f"the header's voxel size {_sizes(stated)} mm differs from the affine's, {_sizes(sizes)} mm, which was used"
    ]


def _sizes(values: np.ndarray) -> str:
    return " × ".join(f"{value:.4g}" for value in values)


def check_affine(affine: Float[np.ndarray, "4 4"], shape: tuple[int, int, int], path: Path) -> None:
    """Refuse an affine that cannot be a scan's.

    Raises:
        ScanError: values that are not finite, a voxel size of zero or outside of `SPACING_MM`, axes that (nearly)
            fall together, a volume longer than `MAX_EXTENT_MM`, or an origin beyond `MAX_ORIGIN_MM`.
    """
    remedy = "Repair the header's sform or qform"
    linear = affine[:3, :3]
    if not np.isfinite(affine).all():
        raise ScanError("unusable affine: values that are not finite", where=path.name, remedy=remedy)
    with np.errstate(all="ignore"):
        spacing = np.linalg.norm(linear, axis=0)
        share = abs(np.linalg.det(linear / spacing))
    if spacing.min() > 0 and (spacing.min() < SPACING_MM[0] or spacing.max() > SPACING_MM[1]):
        raise ScanError(
            "unusable affine: implausible voxel size",
            where=path.name,
            got=f"{_sizes(spacing)} mm",
            expected=f"{SPACING_MM[0]:g} to {SPACING_MM[1]:g} mm",
            remedy="Check the units; lengths must be in millimetres",
        )
    if not share >= MIN_VOLUME_SHARE:
        raise ScanError(
            "unusable affine: it is singular, or its axes nearly fall together",
            where=path.name,
            expected="an invertible voxel-to-world matrix",
            remedy=remedy,
        )
    if (spacing * shape).max() > MAX_EXTENT_MM:
        raise ScanError(
            "unusable affine: implausible length of the volume",
            where=path.name,
            got=f"{_sizes(spacing * shape)} mm",
            expected=f"at most {MAX_EXTENT_MM:g} mm",
            remedy="Check the voxel size in the header",
        )
    if np.abs(affine[:3, 3]).max() > MAX_ORIGIN_MM:
        raise ScanError(
            "unusable affine: implausible origin",
            where=path.name,
            got=f"{np.abs(affine[:3, 3]).max():.3g} mm away",
            expected=f"at most {MAX_ORIGIN_MM:g} mm",
            remedy=remedy,
        )


def shear_notes(affine: Float[np.ndarray, "4 4"]) -> tuple[str, ...]:
    """A note if the axes of a grid are not perpendicular."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = [abs(float(axes[:, a] @ axes[:, b])) for a, b in ((0, 1), (0, 2), (1, 2))]
    degrees = float(np.degrees(np.arcsin(min(max(cosines), 1.0))))
    if degrees <= SHEAR_DEGREES:
        return ()
    return (f"the axes of the grid are sheared by {degrees:.1f} degrees",)


def closest_canonical(affine: Float[np.ndarray, "4 4"], path: Path) -> np.ndarray:
    """The reordering and flips of the stored axes that bring them closest to right, anterior, superior.

    Raises:
        ScanError: two axes run along the same direction.
    """
    try:
        orientation = io_orientation(affine)
    except (OrientationError, np.linalg.LinAlgError, ValueError) as error:
        raise ScanError(f"unusable affine: {error}", where=path.name) from error
    if np.isnan(orientation).any():
        raise ScanError("unusable affine: it is singular", where=path.name, remedy="Repair the header's sform or qform")
    return orientation


def axis_codes(affine: Float[np.ndarray, "4 4"]) -> str:
    """The directions of the axes of a grid, for example ``"LPS"``."""
    return "".join(nib.aff2axcodes(affine))
