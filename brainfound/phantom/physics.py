"""From tissue to signal: relaxation, diffusion, contrast agent, and the sequences' equations.

Relaxation times in seconds, diffusivity in mm²/s, proton density relative to cerebrospinal fluid.

Sources. T1 of white, cortical and deep grey matter at both fields: Wright et al. 2008 (Magn Reson Mater Phy 21:121),
MPRAGE values. T2 of white and grey matter, T1 and T2 of muscle, T1 of blood: Stanisz et al. 2005 (Magn Reson Med
54:507). Proton density: water content as in Whittall et al. 1997 (Magn Reson Med 37:34). Diffusivity: Pierpaoli et al.
1996 (Radiology 201:637), about 0.7·10⁻³ in parenchyma; 3·10⁻³ is free water at 37 °C. Cerebrospinal fluid, lesions,
bone, marrow and fat have round values within reported ranges. Relaxivity of gadobutrol in plasma: r1 from Szomolanyi et
al. 2019 (Invest Radiol 54:559), r2 from Rohrer et al. 2005 (Invest Radiol 40:715).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

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
