"""Regression: a number per volume, such as age in years.

Axis legend: n sessions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.files import nan_as_none
from brainfound.finetuning.linear_models import LabelledFeatures, Linear, fit_ridge
from brainfound.finetuning.tasks.base import AnswerCalibration, Notify, Parts, TargetColumn, TaskRecipe, VolumeTask
from brainfound.metrics.calibration import conformal_interval, coverage, fit_bias_correction
from brainfound.metrics.registry import regression_scores
from brainfound.models import BrainFoundForRegression
from brainfound.models.heads import bin_edges
from brainfound.models.stack_prediction import StackPrediction

PREDICTION_STD = "prediction_std"
"""The column of the cases with the standard deviation of a prediction, if the head gives one."""


class RegressionRecipe(TaskRecipe):
    """Head and loss of a regression."""

    needs = {  # noqa: RUF012  (declared in the base class)
        "loss": ("head", ("point",)),
        "huber_delta": ("loss", ("huber",)),
        "bins": ("head", ("bins",)),
        "label_width": ("head", ("bins",)),
    }

    kind: Literal["regression"] = "regression"
    head: Literal["point", "gaussian", "bins"] = "point"
    """point: one number. gaussian: also its standard deviation, trained by maximum likelihood. bins: a distribution
    over bins that span the training range, whose expectation is the answer. The last two have a loss of their own."""
    loss: Literal["smooth_l1", "l1", "huber"] = "smooth_l1"
    """Loss of the point head, on the target in standard deviations of the training part."""
    huber_delta: float = Field(1.0, gt=0)
    """Where the Huber loss turns from squared to absolute errors, in the same unit."""
    bins: int = Field(40, ge=2)
    """Number of bins. They extend the training range by a tenth on each side."""
    label_width: float = Field(1.0, gt=0)
    """Standard deviation of the soft label around a target, in bin widths."""
    interval_confidence: float = Field(0.9, gt=0, lt=1)
    """Intended coverage of the prediction interval, which is fitted on the validation part."""


@dataclass(frozen=True)
class Regression(VolumeTask):
    """A number per volume."""

    kind: ClassVar[str] = "regression"
    recipe: ClassVar[type[TaskRecipe]] = RegressionRecipe
    model_class: ClassVar[type[Any]] = BrainFoundForRegression
    has_names: ClassVar[bool] = False
    selection_metric: ClassVar[str] = "mae"

    mean: float = 0.0
    std: float = 1.0
    """Mean and standard deviation in the training part, in the unit of the column."""
    settings: RegressionRecipe = field(default=RegressionRecipe(), kw_only=True, compare=False, repr=False)

    @classmethod
    def suits(cls, store: Store, target: TargetColumn) -> bool:
        """A single column of numbers with more than ten values."""
        if len(target.columns) != 1:
            return False
        labels = store.covariate(target.columns[0]).dropna()
        numeric = pd.to_numeric(labels, errors="coerce").notna().all()
        return bool(numeric and labels.nunique() > 10)

    @classmethod
    def resolve(cls, store: Store, train: Sequence[int], target: TargetColumn, settings: RegressionRecipe) -> Self:
        if len(target.columns) > 1:
            raise UsageError("a regression has one column", where="target", got=", ".join(target.columns))
        (column,) = target.columns
        numbers = cls(column).values(store, train)
        if not (std := float(numbers.std())) > 0:
            raise UsageError("the target is constant", where=f"column {column}", got=float(numbers[0]))
        return cls(column, mean=float(numbers.mean()), std=std, settings=settings)

    def check_parts(self, store: Store, parts: Parts, notify: Notify | None) -> None:
        for index in parts.values():
            self.values(store, index.tolist())

    def values(self, store: Store, sessions: Sequence[int]) -> Float[np.ndarray, "n"]:
        labels = store.covariate(self.column).iloc[list(sessions)]
        numbers = pd.to_numeric(labels, errors="coerce")
        if numbers.isna().any():
            raise UsageError(
                "a regression target must be numeric",
                where=f"column {self.column}",
                got=repr(labels[numbers.isna()].iloc[0]),
                remedy="Leave such a cell empty, use --set task=classification, or another column",
            )
        return numbers.to_numpy(dtype=np.float64)

    def config_fields(self, values: np.ndarray | None) -> dict[str, Any]:
        assert values is not None
        own = self.settings
        margin = 0.1 * float(np.ptp(values))
        ends = [float(values.min()) - margin, float(values.max()) + margin]
        return {
            "target_mean": self.mean,
            "target_std": self.std,
            "regression_head": own.head,
            "regression_loss": own.loss,
            "huber_delta": own.huber_delta,
            "regression_bins": own.bins,
            "regression_range": ends if own.head == "bins" else None,
            "regression_label_width": own.label_width,
        }

    def describe_labels(self) -> str:
        return f"{self.column}, {self.mean:.4g} ± {self.std:.4g} in the training part"

    @staticmethod
    def describe_loss(config: Any) -> str:
        if config.regression_head == "gaussian":
            return "Gaussian likelihood"
        if config.regression_head == "bins":
            return f"soft labels over {config.regression_bins} bins"
        huber = f"Huber, delta {config.huber_delta:g}"
        return {"smooth_l1": "smooth L1", "l1": "L1", "huber": huber}[config.regression_loss]

    def truth_columns(self, truth: float) -> dict[str, Any]:
        return {"truth": truth}

    def answer_columns(self, answer: StackPrediction) -> dict[str, Any]:
        std = {} if answer.value_std is None else {PREDICTION_STD: answer.value_std}
        return {"prediction": answer.value, **std}

    def compute_scores(self, truths: Sequence[float], answers: Sequence[Any]) -> dict[str, float]:
        return regression_scores(truths, [answer.value for answer in answers])

    def trivial_answer(self) -> StackPrediction:
        return StackPrediction(value=self.mean)

    def format_answer(self, answer: StackPrediction) -> dict[str, Any]:
        std = {} if answer.value_std is None else {"standard_deviation": answer.value_std}
        return {"target": self.column, "value": answer.value, **std}

    def explained_score(self, answer: Mapping[str, Any], class_name: str | None) -> tuple[str, Callable[[Any], Tensor]]:
        return self.column, lambda output: output.predictions[0]

    def fit_linear(self, data: LabelledFeatures, class_weights: Sequence[float] | None) -> Linear:
        weight, bias, _ = self._fit_ridge(data)
        return weight[None], np.array([bias])

    def fit_head(self, data: LabelledFeatures, config: Any) -> Linear:
        """One row for the number (a Gaussian head's second row is a log variance), or one row per bin.

        Bins get a Gaussian around the linear answer m with the variance σ² of its error. In −(c − m)² / 2σ², the score
        of a bin at c, all bins share the term m²; the rest is linear in m, hence in the features.
        """
        weight, bias, variance = self._fit_ridge(data)
        if config.regression_head != "bins":
            return weight[None], np.array([bias])
        edges = bin_edges(config).double().numpy()
        centres = (edges[1:] + edges[:-1]) / 2
        variance = max(variance, float(edges[1] - edges[0]) ** 2)
        return np.outer(centres, weight) / variance, (centres * bias - centres**2 / 2) / variance

    def _fit_ridge(self, data: LabelledFeatures) -> tuple[np.ndarray, float, float]:
        return fit_ridge(data.features, (data.labels - self.mean) / self.std, data.subject_groups)

    def linear_answer(self, scores: Float[np.ndarray, "1"]) -> StackPrediction:
        return StackPrediction(value=float(scores[0]) * self.std + self.mean)

    def calibration_fits(self, cases: pd.DataFrame) -> dict[str, Callable[[], Any]]:
        # Sessions of one subject are not independent.
        first, confidence = cases.drop_duplicates("subject"), self.settings.interval_confidence
        answers = first["truth"], first["prediction"], first.get(PREDICTION_STD)
        return {
            "bias_correction": lambda: fit_bias_correction(cases["truth"], cases["prediction"]),
            "interval": lambda: conformal_interval(*answers, confidence=confidence),
        }

    def calibration_effect(self, fitted: AnswerCalibration, cases: pd.DataFrame) -> dict[str, Any]:
        truth, prediction = cases["truth"].to_numpy(), cases["prediction"].to_numpy()
        content: dict[str, Any] = {"bias_correction": None, "interval": None}
        if fitted.bias_correction is not None:
            scores = regression_scores(truth.tolist(), fitted.bias_correction.apply(prediction).tolist())
            content["bias_correction"] = {**asdict(fitted.bias_correction), "scores": nan_as_none(scores)}
        if fitted.interval is not None:
            low, high = fitted.interval.apply(prediction, cases.get(PREDICTION_STD))
            measured = {"coverage": coverage(truth, low, high), "mean_width": float(np.mean(high - low))}
            content["interval"] = {**asdict(fitted.interval), **measured}
        return content

    def calibrate(self, fitted: AnswerCalibration, answer: StackPrediction) -> dict[str, Any]:
        assert answer.value is not None
        content: dict[str, Any] = {}
        value = np.array([answer.value])
        if fitted.bias_correction is not None:
            content["bias_corrected"] = float(fitted.bias_correction.apply(value)[0])
        if fitted.interval is not None:
            std = np.array([answer.value_std]) if fitted.interval.normalised else None
            low, high = (float(ends[0]) for ends in fitted.interval.apply(value, std))
            content["interval"] = {"low": low, "high": high, "confidence": fitted.interval.confidence}
        return content
