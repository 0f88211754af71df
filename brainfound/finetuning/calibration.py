"""Calibration of the answers, fitted on the validation part after training, never on the test part.

A classification gets a temperature; a regression a bias correction and a conformal interval. They stand beside the raw
answers and never replace them: in scores.json with their effect on the test part, in the bundle for `brainfound
predict`. What the validation part is too small for is left out, with the reason. The tasks own the fits.

Axis legend: n answers, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Float

from brainfound.errors import UsageError
from brainfound.metrics.calibration import (
    BiasCorrection,
    ConformalInterval,
    apply_temperature,
)

_FLOAT32_STEP = float(np.finfo(np.float32).eps) / 2


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
    def fit(cls, num_sessions: int, fits: Mapping[str, Callable[[], Any]]) -> Self:
        """Run the fits of a task, by the names of the attributes."""
        fitted: dict[str, Any] = {}
        left_out = []
        for name, fit in fits.items():
            try:
                fitted[name] = fit()
            except UsageError as error:
                left_out.append(f"{name.replace('_', ' ')}: {error}")
        return cls(num_sessions, left_out=tuple(left_out), **fitted)

    def report(self, effect: Mapping[str, Any]) -> dict[str, Any]:
        """For scores.json: what was fitted, and its effect on the test part (`VolumeTask.calibration_effect`)."""
        common = {"fitted_on": "validation", "num_sessions": self.num_sessions, "left_out": list(self.left_out)}
        return common | dict(effect)

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


def binary_probabilities(probabilities: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n 2"]:
    """Probabilities of no and yes."""
    # A float32 sigmoid is 1 from about 17 on: beyond that the confidence of the model is not known.
    yes = np.clip(probabilities, _FLOAT32_STEP, 1 - _FLOAT32_STEP)
    return np.stack([1 - yes, yes], axis=1)


def temper(probabilities: Float[np.ndarray, "n K"], temperature: float) -> Float[np.ndarray, "n K"]:
    """Probabilities after a temperature."""
    return apply_temperature(log_probabilities(probabilities), temperature)


def log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Class scores for probabilities."""
    # Log probabilities are class scores up to a constant per row, which a softmax ignores.
    return np.log(np.clip(probabilities, 1e-38, None))
