"""The geometry in an image header: its affine, whether it is plausible, and the closest RAS orientation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, NoReturn

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
"""Deviation from a right angle that deserves a note: half a voxel at the edge of a head."""
SPACING_MM = (0.05, 50.0)
"""From microscopy to the thickest localiser; metres or micrometres fall outside."""
MAX_ORIGIN_MM = 1e5
"""Distance of the first voxel from the origin: no scanner is 100 m long, and float32 headers lose millimetres there."""
MAX_EXTENT_MM = 2000.0
"""Length of a volume along one axis: that of a person."""
MIN_VOLUME_SHARE = 0.5
"""Volume of a voxel over the product of its edges: 1 for right angles, 0.87 for a gantry tilted by 30 degrees."""
HEADER_ERRORS = (HeaderDataError, WrapStructError, MGHError, ArithmeticError, LookupError, ValueError, TypeError)
"""Errors that nibabel raises for a damaged header."""

QUATERNION_EXCESS = 1e-3
"""Most that b² + c² + d² of a qform may exceed 1; a turn by 180 degrees has 1, and writers round it."""
_FLOAT32_EXCESS = 1e-5

_QFORM = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")

AffineSource = Literal["sform", "qform", "header size only", "mgh"]

_REPAIR = "Repair the header's sform or qform"
_UNITS = {0: "", 1: "metres", 2: "", 3: "micrometres"}


def header_affine(
    header: Any, shape: tuple[int, int, int], repairs: Sequence[str]
) -> tuple[np.ndarray, AffineSource, list[str]]:
    """The affine ``(4, 4)`` of a NIfTI, Analyze or MGH header, as nibabel chooses it, its source, and notes on doubts.

    ``shape`` is that of the volume, at whose corners affines are compared; ``repairs`` are nibabel's messages.
    """
    notes = _normalise_quaternion(header) if isinstance(header, Nifti1Header) else []
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    source: AffineSource = "header size only"
    if isinstance(header, MGHHeader):
        if header["goodRASFlag"]:
            source = "mgh"
    elif isinstance(header, Nifti1Header):
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
    if source != "sform" and any("non-zero" in text for text in repairs):  # nibabel would assume 1 mm
        raise ValueError("its header gives a voxel size of 0 mm")
    if source == "header size only":
        notes.append("no orientation in the header; taken from voxel sizes, left-right may be wrong")
    return affine, source, notes


def spatial_header(header: Any) -> Nifti1Header | None:
    """A NIfTI-1 header with the qform and sform of another one, and nothing else; None for other formats.

    Written with it, an image lies where the scan lies for readers of either, with the scan's codes. Lengths are in mm.
    A qform that cannot be read is left out.
    """
    if not isinstance(header, Nifti1Header):
        return None
    copy = Nifti1Header()
    for name in ("qform_code", *_QFORM, "sform_code", "srow_x", "srow_y", "srow_z"):
        copy[name] = header[name]
    copy["pixdim"][:4] = header["pixdim"][:4]
    copy.set_xyzt_units("mm")
    _normalise_quaternion(copy)
    try:
        readable = bool(np.isfinite(copy.get_qform()).all())
    except HEADER_ERRORS:
        readable = False
    if not readable:
        copy["qform_code"] = 0
        for name in _QFORM:
            copy[name] = 0
    return copy


def _normalise_quaternion(header: Any) -> list[str]:
    """Scale a quaternion that rounding made longer than 1, as nifti1_io.c does; a note if it is more than rounding.

    The header stores b, c and d of a unit quaternion; nibabel refuses them where b² + c² + d² exceeds 1.
    """
    names = _QFORM[:3]
    vector = np.array([header[name] for name in names], dtype=np.float64)
    excess = float(vector @ vector - 1)
    if header["qform_code"] == 0 or not 0 < excess <= QUATERNION_EXCESS:
        return []
    for name, value in zip(names, vector / np.sqrt(1 + excess), strict=True):
        header[name] = value
    return [f"the qform's quaternion has the length {np.sqrt(1 + excess):.5f}, read as 1"] * (excess > _FLOAT32_EXCESS)


def _compare_with_qform(header: Any, affine: np.ndarray, shape: tuple[int, int, int]) -> list[str]:
    try:
        other = np.asarray(header.get_qform(), dtype=np.float64)
    except HEADER_ERRORS:
        return ["the header's qform is not valid; the sform was used"]
    corners = np.array(list(product(*((0, n - 1) for n in shape), [1])))
    distance = float(np.linalg.norm((corners @ (affine - other).T)[:, :3], axis=1).max())
    if distance <= SFORM_QFORM_MM:
        return []
    return [f"sform and qform disagree by up to {distance:.1f} mm at a corner of the volume; the sform was used"]


def _compare_with_pixdim(header: Any, affine: np.ndarray) -> list[str]:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    stated = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    if np.allclose(stated, sizes, rtol=0.01, atol=0.001):
        return []
    stated_mm, used_mm = _sizes(stated), _sizes(sizes)
    return [f"the header's voxel size {stated_mm} mm differs from the affine's, {used_mm} mm, which was used"]


def _sizes(values: np.ndarray) -> str:
    return " × ".join(f"{value:.4g}" for value in values)


def check_affine(affine: Float[np.ndarray, "4 4"], shape: tuple[int, int, int], path: Path) -> None:
    """Raise a ScanError for an affine that no scan can have."""

    def refuse(why: str, got: str | None = None, expected: str | None = None, remedy: str = _REPAIR) -> NoReturn:
        raise ScanError(f"unusable affine: {why}", where=path.name, got=got, expected=expected, remedy=remedy)

    linear = affine[:3, :3]
    if not np.isfinite(affine).all():
        refuse("values that are not finite")
    with np.errstate(all="ignore"):
        spacing = np.linalg.norm(linear, axis=0)
        share = abs(np.linalg.det(linear / spacing))
    finest, coarsest = SPACING_MM
    if spacing.min() > 0 and (spacing.min() < finest or spacing.max() > coarsest):
        remedy = "Check the units; lengths must be in millimetres"
        refuse("implausible voxel size", f"{_sizes(spacing)} mm", f"{finest:g} to {coarsest:g} mm", remedy)
    if not share >= MIN_VOLUME_SHARE:
        refuse("it is singular, or its axes nearly fall together", expected="an invertible voxel-to-world matrix")
    extent, origin = spacing * shape, np.abs(affine[:3, 3]).max()
    if extent.max() > MAX_EXTENT_MM:
        remedy = "Check the voxel size in the header"
        refuse("implausible length of the volume", f"{_sizes(extent)} mm", f"at most {MAX_EXTENT_MM:g} mm", remedy)
    if origin > MAX_ORIGIN_MM:
        refuse("implausible origin", f"{origin:.3g} mm away", f"at most {MAX_ORIGIN_MM:g} mm")


def shear_notes(affine: Float[np.ndarray, "4 4"]) -> tuple[str, ...]:
    """A note if the axes of a grid are not perpendicular."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = [abs(float(axes[:, a] @ axes[:, b])) for a, b in ((0, 1), (0, 2), (1, 2))]
    degrees = float(np.degrees(np.arcsin(min(max(cosines), 1.0))))
    if degrees <= SHEAR_DEGREES:
        return ()
    return (f"the axes of the grid are sheared by {degrees:.1f} degrees",)


def closest_canonical(affine: Float[np.ndarray, "4 4"], path: Path) -> np.ndarray:
    """The order and flips that bring the stored axes closest to RAS; ScanError if two of them are parallel."""
    try:
        orientation = io_orientation(affine)
    except (OrientationError, np.linalg.LinAlgError, ValueError) as error:
        raise ScanError(f"unusable affine: {error}", where=path.name) from error
    if np.isnan(orientation).any():
        raise ScanError("unusable affine: it is singular", where=path.name, remedy=_REPAIR)
    return orientation


def axis_codes(affine: Float[np.ndarray, "4 4"]) -> str:
    """The directions of the axes of a grid, for example ``"LPS"``."""
    return "".join(nib.aff2axcodes(affine))
