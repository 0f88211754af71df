"""Sites and their scanners: protocols, voxels, coil shading, noise, and storage of scans.

A scan is the object's signal averaged over the scanner's voxels (slice profile included) and multiplied by a smooth
coil sensitivity. Complex Gaussian noise makes the magnitude Rician (Gudbjartsson and Patz 1995, Magn Reson Med 34:910).
The ADC map is computed from two noisy images, as on a console: ADC = ln(S0/Sb)/b, in 10⁻⁶ mm²/s (Stejskal and Tanner
1965).

Axes: X Y Z voxels.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from brainfound.phantom.geometry import HEAD_EXTENT_MM, Grid, apply_matrices, resampling_matrices, smooth_noise
from brainfound.phantom.physics import B_VALUE_S_PER_MM2, Sequence, nulling_inversion_time_s

_LARGEST_ADC = 4000.0


@dataclass(frozen=True)
class ScanProtocol:
    """How one contrast is acquired at one site."""

    sequence: Sequence
    in_plane: float = 1.0
    """In-plane voxel width as a multiple of the cohort's spacing."""
    slice_thickness_mm: float | None = None
    """Thickness of axial slices; None for isotropic voxels."""


@dataclass(frozen=True)
class Site:
    """One site: its field strength, its protocols, and the image properties of its scanner."""

    name: str
    field_tesla: float
    protocols: Mapping[str, ScanProtocol]
    bias_strength: float
    """Standard deviation of the logarithm of the coil's sensitivity."""
    noise: float
    """Noise standard deviation relative to the signal of white matter in the same scan."""
    gain: float
    """Stored intensity of white matter."""
    orientation: str
    """Axis codes of the stored array, e.g. RAS or PSR."""
    tilt_degrees: float
    """Spread of the head's tilt in the scanner, which makes affines oblique."""

    def get_protocol(self, contrast: str) -> ScanProtocol:
        """The protocol of a contrast; ADC and b0 share that of DWI."""
        return self.protocols["DWI" if contrast in ("ADC", "b0") else contrast]


def _flair(field_tesla: float, repetition_time_s: float, echo_time_s: float, factor: float) -> Sequence:
    """A FLAIR whose inversion time is `factor` times the one that nulls fluid."""
    fluid_t1_s = 4.0 if field_tesla < 2 else 4.2
    inversion = nulling_inversion_time_s(fluid_t1_s, repetition_time_s) * factor
    return Sequence(repetition_time_s, echo_time_s, round(inversion, 3))


_SITES = (
    Site(
        "site-1", 3.0,
        {
            "T1w": ScanProtocol(Sequence(2.3, 0.003, 1.0)),
            "T1ce": ScanProtocol(Sequence(2.3, 0.003, 1.0)),
            "T2w": ScanProtocol(Sequence(4.0, 0.095)),
            "FLAIR": ScanProtocol(_flair(3.0, 9.0, 0.110, 1.0)),
            "DWI": ScanProtocol(Sequence(6.0, 0.080), 1.6),
        },
        bias_strength=0.10, noise=0.035, gain=420.0, orientation="RAS", tilt_degrees=0.0,
    ),
    Site(
        "site-2", 1.5,
        {
            "T1w": ScanProtocol(Sequence(0.55, 0.012), 1.0),
            "T1ce": ScanProtocol(Sequence(0.55, 0.012), 1.0),
            "T2w": ScanProtocol(Sequence(4.8, 0.100), 0.9, 3.0),
            "FLAIR": ScanProtocol(_flair(1.5, 8.5, 0.120, 0.97), 0.9, 4.0),
            "DWI": ScanProtocol(Sequence(5.0, 0.095), 1.8, 5.0),
        },
        bias_strength=0.06, noise=0.055, gain=260.0, orientation="LPS", tilt_degrees=4.0,
    ),
    Site(
        "site-3", 3.0,
        {
            "T1w": ScanProtocol(Sequence(1.9, 0.0025, 0.95), 1.1),
            "T1ce": ScanProtocol(Sequence(1.9, 0.0025, 0.95), 1.1),
            "T2w": ScanProtocol(Sequence(3.2, 0.085), 1.0, 2.0),
            "FLAIR": ScanProtocol(_flair(3.0, 7.5, 0.125, 1.03), 1.2),
            "DWI": ScanProtocol(Sequence(8.0, 0.070), 2.0),
        },
        bias_strength=0.16, noise=0.045, gain=900.0, orientation="PSR", tilt_degrees=2.0,
    ),
)  # fmt: skip


def make_site(index: int, seed: int) -> Site:
    """Site number `index` (from 0). The first three are fixed; later ones are random variations of them, by seed."""
    base = _SITES[index % 3]
    if index < 3:
        return base
    rng = np.random.default_rng([seed, 7_001, index])
    timing, voxels = rng.uniform(0.88, 1.12), rng.uniform(0.9, 1.2)
    protocols = {}
    for contrast, protocol in base.protocols.items():
        sequence = protocol.sequence
        if sequence.inversion_time_s is None:
            sequence = replace(
                sequence,
                repetition_time_s=round(sequence.repetition_time_s * timing, 3),
                echo_time_s=round(sequence.echo_time_s * timing, 4),
            )
        protocols[contrast] = replace(protocol, sequence=sequence, in_plane=round(protocol.in_plane * voxels, 2))
    return replace(
        base,
        name=f"site-{index + 1}",
        protocols=protocols,
        bias_strength=float(base.bias_strength * rng.uniform(0.6, 1.5)),
        noise=float(base.noise * rng.uniform(0.7, 1.4)),
        gain=float(np.round(rng.uniform(150, 1200))),
        orientation=str(rng.choice(["RAS", "LAS", "LPS", "LIA", "PSR", "RSA"])),
        tilt_degrees=float(rng.uniform(0, 6)),
    )


@dataclass(frozen=True)
class Acquisition:
    """One session on one scanner: turns signals on the `simulation` grid into stored scans."""

    site: Site
    seed: list[int]
    """Seed of this session's noise and shading; every contrast has its own stream."""
    simulation: Grid
    spacing_mm: float | None
    """The cohort's spacing; None keeps the simulation grid."""
    pose: np.ndarray
    """(4, 4) head coordinates → scanner coordinates."""

    def grid(self, contrast: str) -> Grid:
        """The voxels of one contrast."""
        if self.spacing_mm is None:
            return self.simulation
        protocol = self.site.get_protocol(contrast)
        in_plane = protocol.in_plane * self.spacing_mm
        thickness = in_plane if protocol.slice_thickness_mm is None else max(protocol.slice_thickness_mm, in_plane)
        if np.allclose((in_plane, thickness), self.simulation.spacing_mm[0], rtol=1e-6):
            return self.simulation
        # The last voxel must end inside the simulated volume.
        extent = np.subtract(HEAD_EXTENT_MM, (in_plane, in_plane, thickness)).tolist()
        return Grid.covering_head((in_plane, in_plane, thickness), extent)

    def magnitude(self, contrast: str, signal: np.ndarray, white_matter: float) -> np.ndarray:
        """(X, Y, Z) float32 magnitude image on the contrast's own grid, white matter near the site's gain.

        `signal` is signed and on the simulation grid; `white_matter` is that tissue's magnitude in it.
        """
        grid = self.grid(contrast)
        order = ("T1w", "T1ce", "T2w", "FLAIR", "DWI", "b0").index(contrast)
        rng = np.random.default_rng([*self.seed, order])
        image = apply_matrices(signal, resampling_matrices(self.simulation, grid, "acquisition"))
        scale = np.float32(self.site.gain / white_matter)
        image = image * (scale * self._sensitivity(grid, order))
        sigma = np.float32(self.site.noise * self.site.gain)
        image += sigma * rng.standard_normal(image.shape, dtype=np.float32)
        return np.hypot(image, sigma * rng.standard_normal(image.shape, dtype=np.float32))

    def _sensitivity(self, grid: Grid, order: int) -> np.ndarray:
        """The coil's sensitivity: mostly shared by the session, partly the scan's own."""
        shared = smooth_noise(np.random.default_rng([*self.seed, 100]), grid, 90.0)[0]
        own = smooth_noise(np.random.default_rng([*self.seed, 200 + order]), grid, 70.0)[0]
        return np.exp(np.float32(self.site.bias_strength) * (shared + 0.3 * own))

    def adc(self, unweighted: np.ndarray, weighted: np.ndarray) -> np.ndarray:
        """ADC in 10⁻⁶ mm²/s from the two magnitudes (same scale), 0 where the signal is too low."""
        floor = max(4 * self.site.noise, 0.25) * self.site.gain
        ratio = np.log(np.maximum(unweighted, 1.0) / np.maximum(weighted, 1.0)) / B_VALUE_S_PER_MM2 * 1e6
        return np.where(unweighted > floor, np.clip(ratio, 0, _LARGEST_ADC), 0).astype(np.float32)

    def store(self, path: Path, volume: np.ndarray, grid: Grid, dtype: type) -> None:
        """Write a volume in the site's orientation, with the matching affine."""
        codes = nib.orientations.axcodes2ornt(tuple(self.site.orientation))
        canonical = nib.orientations.axcodes2ornt(("R", "A", "S"))
        change = nib.orientations.ornt_transform(canonical, codes)
        stored = nib.orientations.apply_orientation(np.rint(volume).astype(dtype), change)
        affine = self.pose @ grid.affine @ nib.orientations.inv_ornt_aff(change, volume.shape)
        image = nib.Nifti1Image(stored, affine)
        image.header.set_xyzt_units("mm", "sec")
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Compressed quickly, and with the same bytes every time (no time stamp).
        path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
