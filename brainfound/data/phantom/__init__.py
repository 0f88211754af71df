"""Simulated multi-contrast brain MRI: anatomy, ageing, pathology, physics and scanners (numpy and scipy only)."""

from brainfound.data.phantom.anatomy import ShapedHead
from brainfound.data.phantom.cohort import DEFAULT_DIAGNOSES, write_phantom_cohort
from brainfound.data.phantom.label_maps import LabelledHead, LabelMap, read_label_map
from brainfound.data.phantom.pathology import DIAGNOSES
from brainfound.data.phantom.physics import SIMULATED_CONTRASTS, TISSUES, tissue_signal
from brainfound.data.phantom.subject import SEGMENTATION

__all__ = [
    "DEFAULT_DIAGNOSES",
    "DIAGNOSES",
    "SEGMENTATION",
    "SIMULATED_CONTRASTS",
    "TISSUES",
    "LabelMap",
    "LabelledHead",
    "ShapedHead",
    "read_label_map",
    "tissue_signal",
    "write_phantom_cohort",
]
