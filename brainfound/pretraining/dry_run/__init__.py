"""The dry run: speed and memory of a pretraining run, measured here and estimated for other GPUs."""

from brainfound.pretraining.dry_run.costs import TargetHardware
from brainfound.pretraining.dry_run.trial import report_dry_run

__all__ = ["TargetHardware", "report_dry_run"]
