"""Simulated multi-contrast brain MRI: anatomy, ageing, pathology, physics and scanners (numpy and scipy only)."""

from brainfound.phantom.cohort import write_phantom_cohort

__all__ = ["write_phantom_cohort"]
