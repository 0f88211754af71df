"""From tissue to scan: relaxation, diffusion, contrast agent, the sequences' equations, and the scanners of the sites.

Relaxation times in seconds, diffusivity in mm²/s, proton density relative to cerebrospinal fluid.

A scan is the object's signal averaged over the scanner's voxels (slice profile included) and multiplied by a smooth
coil sensitivity. Complex Gaussian noise makes the magnitude Rician (Gudbjartsson and Patz 1995, Magn Reson Med 34:910).
The ADC map is computed from two noisy images, as on a console: ADC = ln(S0/Sb)/b, in 10⁻⁶ mm²/s (Stejskal and Tanner
1965).

Sources. T1 of white, cortical and deep grey matter at both fields: Wright et al. 2008 (Magn Reson Mater Phy 21:121),
MPRAGE values. T2 of white and grey matter, T1 and T2 of muscle, T1 of blood: Stanisz et al. 2005 (Magn Reson Med
54:507). Proton density: water content as in Whittall et al. 1997 (Magn Reson Med 37:34). Diffusivity: Pierpaoli et al.
1996 (Radiology 201:637), about 0.7·10⁻³ in parenchyma; 3·10⁻³ is free water at 37 °C. Cerebrospinal fluid, lesions,
bone, marrow and fat have round values within reported ranges. Relaxivity of gadobutrol in plasma: r1 from Szomolanyi et
al. 2019 (Invest Radiol 54:559), r2 from Rohrer et al. 2005 (Invest Radiol 40:715).

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

SIMULATED_CONTRASTS = ("T1w", "T1ce", "T2w", "FLAIR", "DWI", "ADC")

B_VALUE_S_PER_MM2 = 1000.0
RELAXIVITY_R1 = {1.5: 4.8, 3.0: 5.0}  # L/(mmol·s)
RELAXIVITY_R2 = {1.5: 6.1, 3.0: 7.1}


@dataclass(frozen=True)
class Tissue:
    """The MR properties of one tissue; T1 and T2 are (at 1.5 T, at 3 T)."""

    name: str
    t1_s: tuple[float, float]
    t2_s: tuple[float, float]
    proton_density: float
    diffusivity_mm2_per_s: float
    gadolinium_mmol_per_l: float = 0.0
    """Concentration some minutes after injection; nearly none behind the blood-brain barrier."""


# The order is the order of the tissue axis (T) of every fraction array.
TISSUES: tuple[Tissue, ...] = (
    Tissue("air", (1.0, 1.0), (0.001, 0.001), 0.0, 0.0),
    Tissue("csf", (4.0, 4.2), (1.8, 1.6), 1.0, 3.0e-3),
    Tissue("ventricle", (4.0, 4.2), (1.8, 1.6), 1.0, 3.0e-3),
    Tissue("cortex", (1.197, 1.607), (0.095, 0.099), 0.83, 0.83e-3, 0.03),
    Tissue("white_matter", (0.646, 0.838), (0.072, 0.069), 0.71, 0.70e-3, 0.015),
    Tissue("deep_grey", (1.000, 1.320), (0.084, 0.080), 0.80, 0.75e-3, 0.03),
    Tissue("pallidum", (0.780, 1.000), (0.068, 0.058), 0.75, 0.75e-3, 0.02),
    Tissue("cerebellar_cortex", (1.150, 1.500), (0.095, 0.097), 0.83, 0.78e-3, 0.03),
    Tissue("cerebellar_white", (0.670, 0.860), (0.074, 0.071), 0.71, 0.68e-3, 0.015),
    Tissue("brain_stem", (0.720, 0.930), (0.076, 0.072), 0.73, 0.72e-3, 0.02),
    Tissue("bone", (0.4, 0.45), (0.0006, 0.0005), 0.15, 0.3e-3),
    Tissue("marrow", (0.38, 0.45), (0.055, 0.050), 0.42, 0.3e-3, 0.02),
    Tissue("fat", (0.30, 0.37), (0.075, 0.068), 0.62, 0.1e-3),
    Tissue("soft_tissue", (1.008, 1.412), (0.044, 0.050), 0.72, 1.2e-3, 0.15),
    Tissue("vessel", (1.441, 1.932), (0.020, 0.020), 0.70, 2.0e-3, 1.5),
    Tissue("choroid_plexus", (1.500, 1.900), (0.110, 0.105), 0.88, 1.4e-3, 0.8),
    Tissue("oedema", (1.200, 1.450), (0.150, 0.145), 0.86, 1.35e-3),
    Tissue("enhancing_tumour", (1.250, 1.450), (0.115, 0.110), 0.86, 1.05e-3, 0.9),
    Tissue("necrosis", (2.300, 2.500), (0.260, 0.240), 0.95, 2.0e-3, 0.02),
    Tissue("infarct", (1.250, 1.450), (0.135, 0.130), 0.85, 0.42e-3, 0.02),
    Tissue("plaque", (1.150, 1.350), (0.145, 0.140), 0.85, 1.10e-3, 0.02),
    Tissue("active_plaque", (1.150, 1.350), (0.145, 0.140), 0.85, 1.00e-3, 0.5),
    Tissue("hyperintensity", (0.920, 1.150), (0.120, 0.116), 0.79, 0.95e-3, 0.015),
)
TISSUE_INDEX = {tissue.name: index for index, tissue in enumerate(TISSUES)}
PARENCHYMA = ("cortex", "white_matter", "deep_grey", "pallidum", "cerebellar_cortex", "cerebellar_white", "brain_stem")
_IRON_RICH = ("pallidum", "deep_grey")


@dataclass(frozen=True)
class Sequence:
    """Timing of one contrast at one site; `inversion_time_s` is None for a plain spin echo."""

    repetition_time_s: float
    echo_time_s: float
    inversion_time_s: float | None = None


def nulling_inversion_time_s(t1_s: float, repetition_time_s: float) -> float:
    """The inversion time that nulls a tissue: TI = T1 ln(2 / (1 + e^(−TR/T1)))."""
    return float(t1_s * np.log(2 / (1 + np.exp(-repetition_time_s / t1_s))))


def subject_tissues(rng: np.random.Generator, iron: float = 1.0) -> tuple[Tissue, ...]:
    """The tissues of one subject: T1 and T2 vary by a few per cent, and iron shortens T2 of the basal ganglia."""
    drawn = []
    for tissue in TISSUES:
        t1_factor, t2_factor = np.exp(0.02 * rng.standard_normal(2))
        if tissue.name in _IRON_RICH:
            t2_factor /= 1 + (0.35 if tissue.name == "pallidum" else 0.15) * (iron - 1)
        (t1_low, t1_high), (t2_low, t2_high) = tissue.t1_s, tissue.t2_s
        t1_s, t2_s = (t1_low * t1_factor, t1_high * t1_factor), (t2_low * t2_factor, t2_high * t2_factor)
        drawn.append(replace(tissue, t1_s=t1_s, t2_s=t2_s))
    return tuple(drawn)


def tissue_signal(contrast: str, tissue: Tissue, sequence: Sequence, field_tesla: float) -> float:
    """The (signed) signal of one tissue in one contrast, relative to fully relaxed cerebrospinal fluid.

    A spin echo has PD (1 − e^(−TR/T1)) e^(−TE/T2), for TE ≪ TR (Bernstein, Handbook of MRI Pulse Sequences), and with
    inversion recovery PD (1 − 2e^(−TI/T1) + e^(−TR/T1)) e^(−TE/T2). Signed: spins of a voxel cancel before the receiver
    sees them, so the magnitude is taken after summing the tissues.

    `contrast` may also be "b0", DWI without diffusion weighting. An echo-planar scan suppresses fat.
    """
    column = 0 if field_tesla < 2.0 else 1
    t1, t2 = tissue.t1_s[column], tissue.t2_s[column]
    if contrast == "T1ce":  # contrast agent: 1/T → 1/T + r·C
        t1 = 1 / (1 / t1 + RELAXIVITY_R1[field_tesla] * tissue.gadolinium_mmol_per_l)
        t2 = 1 / (1 / t2 + RELAXIVITY_R2[field_tesla] * tissue.gadolinium_mmol_per_l)
    saturation, inversion_time_s = np.exp(-sequence.repetition_time_s / t1), sequence.inversion_time_s
    recovered = 1 - saturation if inversion_time_s is None else 1 - 2 * np.exp(-inversion_time_s / t1) + saturation
    signal = tissue.proton_density * recovered * np.exp(-sequence.echo_time_s / t2)
    if contrast in ("DWI", "b0") and tissue.name in ("fat", "marrow"):
        signal *= 0.08  # suppressed, but not entirely
    if contrast == "DWI":
        # e^(−bD) (Stejskal and Tanner 1965, J Chem Phys 42:288).
        signal *= np.exp(-B_VALUE_S_PER_MM2 * tissue.diffusivity_mm2_per_s)
    return float(signal)


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
