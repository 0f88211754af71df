"""Simulated multi-contrast brain MRI: anatomy, ageing, pathology, physics and scanners (numpy and scipy only)."""

from brainfound.phantom.anatomy import ParametricHead
from brainfound.phantom.cohort import DEFAULT_DIAGNOSES, write_phantom_cohort
from brainfound.phantom.label_maps import LabelledHead, LabelMap, read_label_map
from brainfound.phantom.pathology import DIAGNOSES
from brainfound.phantom.physics import SIMULATED_CONTRASTS, TISSUES, tissue_signal
from brainfound.phantom.subject import SEGMENTATION

__all__ = [
    "DEFAULT_DIAGNOSES",
    "DIAGNOSES",
    "SEGMENTATION",
    "SIMULATED_CONTRASTS",
    "TISSUES",
    "LabelMap",
    "LabelledHead",
    "ParametricHead",
    "read_label_map",
    "tissue_signal",
    "write_phantom_cohort",
]
