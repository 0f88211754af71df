"""What age does to a head, as numbers that the anatomy is built from.

Sources: Scahill et al. 2003 (Arch Neurol 60:989): ventricles enlarge and the enlargement accelerates
with age; Salat et al. 2004 (Cereb Cortex 14:721): the cortex thins from middle age on; Hallgren and
Sourander 1958 (J Neurochem 3:41): iron gathers in the pallidum and putamen, which shortens T2. The
rates below are round numbers in the range that such studies report; each subject departs from the
mean, so that age can be estimated from an image but not read off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ageing:
    """The age-dependent quantities of one subject."""

    ventricle_volume_ml: float
    """Lateral and third ventricles together."""
    cortical_thickness_mm: float
    sulcal_half_width_mm: float
    brain_shrinkage_mm: float
    """How far the brain's surface has withdrawn from the skull."""
    hyperintensity_mm: float
    """Thickness of the periventricular white-matter hyperintensity."""
    num_deep_hyperintensities: int
    iron: float
    """Iron in the basal ganglia relative to a 20-year-old (1 = as then)."""

    @property
    def has_hyperintensities(self) -> bool:
        """Whether the hyperintensities of age are large enough to see."""
        return self.hyperintensity_mm >= 0.3


def draw_ageing(rng: np.random.Generator, age_years: float) -> Ageing:
    """Draws what age has done to one subject.

    Ventricles grow by about 1 % a year to 60 and 3.5 % a year after; the cortex thins by 0.35 % a
    year from 2.75 mm at 20; sulci open and hyperintensities appear, mostly after 50.
    """
    adult = age_years - 20.0
    late = max(age_years - 60.0, 0.0)
    old = max(age_years - 45.0, 0.0)
    return Ageing(
        ventricle_volume_ml=float(16.0 * np.exp(0.01 * min(adult, 40.0) + 0.035 * late + 0.16 * rng.standard_normal())),
        cortical_thickness_mm=float(2.75 * (1 - 0.0035 * adult) * np.exp(0.03 * rng.standard_normal())),
        sulcal_half_width_mm=float((0.35 + 0.006 * adult + 0.010 * late) * np.exp(0.15 * rng.standard_normal())),
        brain_shrinkage_mm=float(max(0.018 * adult + 0.03 * late + 0.25 * rng.standard_normal(), 0.0)),
        hyperintensity_mm=float(0.085 * old * np.exp(0.4 * rng.standard_normal())),
        num_deep_hyperintensities=int(rng.poisson(0.22 * old)),
        iron=float((1 + 0.008 * adult) * np.exp(0.04 * rng.standard_normal())),
    )
