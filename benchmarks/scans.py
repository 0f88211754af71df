"""The scans to prepare: simulated heads on the grids of real sessions.

A session is one of three kinds, because their grids need different work:

    same      all contrasts on one grid, stored sagittally: reordered and cropped, no interpolation needed
    shifted   each further contrast on a parallel grid of its own, off by parts of a voxel
    oblique   each further contrast turned by some degrees, as for slices that were angled on the scanner

All are 1 mm (or `spacing_mm`), int16, and written as converters of DICOM write them by default (gzip level 6).
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainfound.data.cohort import Cohort
from brainfound.phantom import write_phantom_cohort

KINDS = ("same", "shifted", "oblique")
_STORED_AS = {"same": "PSR", "shifted": "LPS", "oblique": "RAS"}
_SHIFT_VOXELS = np.array([0.40, 0.25, 0.35])
_TURN_DEGREES = np.array([6.0, -2.0, 3.0])


def write_cohorts(
    folder: Path, per_kind: int, contrasts: tuple[str, ...], shape: tuple[int, int, int], spacing_mm: float = 1.0
) -> dict[str, Path]:
    """Write one cohort per kind of session, each with a manifest.

    Returns:
        kind → the cohort's folder.
    """
    phantom = folder / "phantom"
    write_phantom_cohort(
        phantom,
        per_kind * len(KINDS),
        # At 1 mm the simulation is stored on its own grid, so that no scan is interpolated twice.
        spacing_mm=None if spacing_mm == 1 else spacing_mm,
        contrasts=contrasts,
        diagnoses={"healthy": 1.0},
        missing_probability=0.0,
    )
    cohorts = {}
    sessions = list(Cohort.read(phantom).sessions())
    for number, kind in enumerate(KINDS):
        cohorts[kind] = folder / kind
        cohorts[kind].mkdir(parents=True)
        rows = ["subject\tsession\tcontrast\tpath"]
        for session in sessions[number * per_kind : (number + 1) * per_kind]:
            for contrast in contrasts:
                name = f"{session.subject}_{contrast}.nii.gz"
                first = session.scans[contrasts[0]]
                turn = contrasts.index(contrast)
                _write_scan(session.scans[contrast], first, cohorts[kind] / name, kind, turn, shape, spacing_mm)
                rows.append(f"{session.subject}\t1\t{contrast}\t{name}")
        (cohorts[kind] / "manifest.tsv").write_text("\n".join(rows) + "\n")
    shutil.rmtree(phantom)
    return cohorts


def _write_scan(
    source: Path, reference: Path, out: Path, kind: str, turn: int, shape: tuple[int, int, int], spacing_mm: float
) -> None:
    """Store a simulated scan with the field of view, the grid and the orientation of its kind."""
    image = nib.as_closest_canonical(nib.load(source))
    data = np.asarray(image.dataobj, dtype=np.float32)
    affine = _grid(nib.as_closest_canonical(nib.load(reference)), kind, turn, shape, spacing_mm)
    to_source = np.linalg.inv(image.affine) @ affine
    wide = ndimage.affine_transform(data, to_source[:3, :3], to_source[:3, 3], output_shape=shape, order=1, cval=-1)
    # Air goes on beyond the simulated field of view. In a magnitude image it is Rayleigh noise, whose mean is 1.25 σ.
    rng = np.random.default_rng([turn, KINDS.index(kind)])
    sigma = float(data[:4, -4:, -4:].mean()) / 1.2533
    outside = wide < 0
    wide[outside] = rng.rayleigh(sigma, int(outside.sum()))
    change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(_STORED_AS[kind]))
    stored = apply_orientation(np.rint(wide).astype(np.int16), change)
    write_nifti(out, stored, affine @ inv_ornt_aff(change, shape), level=6)


def _grid(
    reference: nib.Nifti1Image, kind: str, turn: int, shape: tuple[int, int, int], spacing_mm: float
) -> np.ndarray:
    """``(4, 4)``: index → mm of a grid around the middle of the session's first scan; `turn` 0 is that scan's own."""
    own = reference.affine[:3, :3] / np.linalg.norm(reference.affine[:3, :3], axis=0)
    affine = np.eye(4)
    affine[:3, :3] = own * spacing_mm
    if kind == "oblique" and turn:
        affine[:3, :3] = affine[:3, :3] @ Rotation.from_euler("xyz", _TURN_DEGREES * turn, degrees=True).as_matrix()
    middle = reference.affine @ [*((np.array(reference.shape) - 1) / 2), 1.0]
    # Whole voxels away from the first scan's own, so that its values are copied and not smoothed.
    first = np.rint((np.array(shape) - np.array(reference.shape)) / 2)
    offset = -first if kind != "oblique" or not turn else None
    if offset is not None and np.allclose(np.linalg.norm(reference.affine[:3, :3], axis=0), spacing_mm):
        affine[:3, 3] = (reference.affine @ [*offset, 1.0])[:3]
    else:
        affine[:3, 3] = middle[:3] - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    if kind == "shifted":
        affine[:3, 3] += affine[:3, :3] @ (_SHIFT_VOXELS * turn)
    return affine


def write_nifti(path: Path, data: np.ndarray, affine: np.ndarray, level: int) -> None:
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content, compresslevel=level, mtime=0) if path.suffix == ".gz" else content)


def write_ellipsoid(path: Path, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float],
                    dtype: str, turn_degrees: float = 0.0, seed: int = 0) -> None:  # fmt: skip
    """A bright ellipsoid in noisy air: quick to make at any size, for measurements of memory."""
    rng = np.random.default_rng(seed)
    axes = [
        ((np.arange(n, dtype=np.float32) - (n - 1) / 2) * step / radius).reshape(
            [-1 if a == b else 1 for b in range(3)]
        )
        for a, (n, step, radius) in enumerate(zip(shape, spacing_mm, (70.0, 85.0, 60.0), strict=True))
    ]
    inside = axes[0] ** 2 + axes[1] ** 2 + axes[2] ** 2 < 1
    data = rng.standard_normal(shape, dtype=np.float32)
    data *= 15
    np.abs(data, out=data)
    data += inside * (400 + 100 * axes[0])
    turned = Rotation.from_euler("x", turn_degrees, degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.diag(spacing_mm)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    write_nifti(path, data.astype(dtype), affine, level=1)
