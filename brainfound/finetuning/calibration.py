"""Calibration of the answers, fitted on the validation part after training, never on the test part.

A classification gets a temperature; a regression a bias correction and a conformal interval. They stand beside the raw
answers and never replace them: in scores.json with their effect on the test part, in the bundle for `brainfound
predict`. What the validation part is too small for is left out, with the reason. The tasks own the fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from brainfound.errors import UsageError
from brainfound.finetuning.scoring import SessionScores
from brainfound.finetuning.tasks import Task
from brainfound.metrics.calibration import BiasCorrection, ConformalInterval


@dataclass(frozen=True)
class AnswerCalibration:
    """The fits to the validation part; None where one failed, or belongs to another task.

    Attributes:
        num_sessions: of the validation part.
        left_out: fits that failed, with the reasons.
    """

    num_sessions: int = 0
    temperature: float | None = None
    bias_correction: BiasCorrection | None = None
    interval: ConformalInterval | None = None
    left_out: tuple[str, ...] = ()

    @classmethod
    def fit(cls, validation: SessionScores, task: Task) -> Self:
        """Fit the task's calibration to a model's answers on the validation part."""
        fitted: dict[str, Any] = {}
        left_out = []
        for name, fit in task.calibration_fits(validation.cases).items():
            try:
                fitted[name] = fit()
            except UsageError as error:
                left_out.append(f"{name.replace('_', ' ')}: {error}")
        return cls(len(validation.cases), left_out=tuple(left_out), **fitted)

    def report(self, test: SessionScores, task: Task) -> dict[str, Any]:
        """The effect on another part, beside the raw answers; plain values for JSON."""
        effect = task.report_calibration(self, test.cases)
        if effect is None:
            return {}
        common = {"fitted_on": "validation", "num_sessions": self.num_sessions, "left_out": list(self.left_out)}
        return common | effect

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "left_out": list(self.left_out)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any] | None) -> Self:
        """From `to_dict`; None, as in bundles without a calibration, gives one that adds nothing."""
        fields = dict(content or {})
        for name, kind in (("bias_correction", BiasCorrection), ("interval", ConformalInterval)):
            if fields.get(name) is not None:
                fields[name] = kind(**fields[name])
        return cls(**{**fields, "left_out": tuple(fields.get("left_out", ()))})
