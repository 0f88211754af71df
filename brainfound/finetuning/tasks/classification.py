"""Classification: one of several classes per volume, or any subset of several labels.

Axis legend: n sessions, D width, K classes or labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import Field
from scipy.special import expit, softmax
from torch import Tensor

from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.finetuning.linear_models import LabelledFeatures, Linear, fit_logistic, softmax_rows
from brainfound.finetuning.tasks.base import (
    AnswerCalibration,
    Notify,
    Parts,
    SavedTask,
    TargetColumn,
    TaskRecipe,
    VolumeTask,
)
from brainfound.metrics import calibration
from brainfound.metrics.registry import classification_scores, multi_label_scores
from brainfound.models import BrainFoundForClassification
from brainfound.models.stack_prediction import StackPrediction

MAX_CLASSES = 50
NUM_BINS = 15
"""Bins of the calibration error and of the reliability curves."""


class ClassificationRecipe(TaskRecipe):
    """Loss of a classification."""

    kind: Literal["classification"] = "classification"
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: sessions are weighted by the inverse frequency of their class in the training part. For rare classes;
    the probabilities are then those of a cohort in which all classes are equally frequent."""
    focal_gamma: float = Field(0.0, ge=0)
    """Focal loss: above 0, easy sessions count less (2 is usual); 0: cross-entropy."""


@dataclass(frozen=True)
class Classification(VolumeTask):
    """One of several classes per volume."""

    kind: ClassVar[str] = "classification"
    recipe: ClassVar[type[TaskRecipe]] = ClassificationRecipe
    model_class: ClassVar[type[Any]] = BrainFoundForClassification
    label_dtype: ClassVar[torch.dtype] = torch.long
    problem_type: ClassVar[str | None] = None
    selection_metric: ClassVar[str] = "log_loss"

    shares: tuple[float, ...] = ()
    """Share of the training sessions in each class (or with each label); empty if the labels of a bundle lack them."""
    settings: ClassificationRecipe = field(default=ClassificationRecipe(), kw_only=True, compare=False, repr=False)

    @classmethod
    def suits(cls, store: Store, target: TargetColumn) -> bool:
        """Any column; regression is tried first."""
        return not target.is_mask

    @classmethod
    def resolve(
        cls, store: Store, train: Sequence[int], target: TargetColumn, settings: ClassificationRecipe
    ) -> Classification:
        if len(target.columns) > 1:
            return MultiLabelClassification.resolve(store, train, target, settings)
        (column,) = target.columns
        labels = [_class_name(label) for label in store.covariate(column).iloc[list(train)]]
        names = tuple(sorted(set(labels)))
        remedy = "Choose another column, or --set task=regression for numbers"
        if not 2 <= len(names) <= MAX_CLASSES:
            raise UsageError(
                "a classification needs at least two classes in the training part",
                where=f"column {column}",
                got=f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})",
                expected=f"2 to {MAX_CLASSES}",
                remedy=remedy,
            )
        everything = [_class_name(label) for label in store.covariate(column).dropna()]
        if len(set(everything)) == len(everything) > 2:
            got = ", ".join(names[:3]) + ", …"
            raise UsageError("every session has a class of its own", where=f"column {column}", got=got, remedy=remedy)
        return cls(column, names, tuple(labels.count(name) / len(labels) for name in names), settings=settings)

    @classmethod
    def from_saved(cls, saved: SavedTask) -> Classification:
        kind = MultiLabelClassification if saved.multi_label else Classification
        return kind(saved.column, saved.names, saved.shares)

    def check_parts(self, store: Store, parts: Parts, notify: Notify | None) -> None:
        self._require_classes_in_training(store, parts)
        for part, index in parts.items():
            absent = self.absent_names(self.values(store, index.tolist()))
            if notify and absent:
                missing = ", ".join(absent)
                notify(f"no session of the {part} part is {missing}: scores that need it are not defined there")

    def _require_classes_in_training(self, store: Store, parts: Parts) -> None:
        labels = store.covariate(self.column)
        for part, index in parts.items():
            if unknown := [name for name in _class_names(labels.iloc[index]) if name not in self.names]:
                placed = np.concatenate(list(parts.values()))
                has_it = np.array([_class_name(label) == unknown[0] for label in labels.iloc[placed]])
                subjects = store.sessions["subject"].iloc[placed[has_it]].nunique()
                raise UsageError(
                    f"the class {unknown[0]!r} is in the {part} part and not in the training part",
                    where=f"column {self.column}",
                    got=f"{subjects} subjects have it" if subjects > 1 else "one subject has it",
                    remedy="Leave its cells empty, join it to another class, or divide the subjects otherwise",
                )

    def absent_names(self, values: np.ndarray) -> list[str]:
        return [name for k, name in enumerate(self.names) if not (values == k).any()]

    def values(self, store: Store, sessions: Sequence[int]) -> Int[np.ndarray, "n"]:
        labels = store.covariate(self.column).iloc[list(sessions)]
        if unknown := [name for name in _class_names(labels) if name not in self.names]:
            raise UsageError(
                f"the class {unknown[0]!r} is not among those that the model was trained on",
                where=f"column {self.column}",
                expected=", ".join(self.names),
                remedy="Leave such sessions out, or use a regression for numbers (--set task=regression)",
            )
        return np.array([self.names.index(_class_name(label)) for label in labels])

    def config_fields(self, values: np.ndarray | None) -> dict[str, Any]:
        assert values is not None
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: k for k, name in enumerate(self.names)},
            "class_weights": self._balanced_weights(values) if self.settings.class_weights == "balanced" else None,
            "classification_focal_gamma": self.settings.focal_gamma,
            "problem_type": self.problem_type,
        }

    def _balanced_weights(self, values: np.ndarray) -> list[float]:
        """Inverse frequencies n / (K · n_k) of the classes, all of which occur; their mean over sessions is 1."""
        counts = np.bincount(values, minlength=len(self.names))
        return (len(values) / (len(self.names) * counts)).tolist()

    @staticmethod
    def describe_loss(config: Any) -> str:
        multi_label = config.problem_type == MultiLabelClassification.problem_type
        name = "binary cross-entropy" if multi_label else "cross-entropy"
        if config.classification_focal_gamma:
            name = f"focal loss (gamma {config.classification_focal_gamma:g}) on {name}"
        return name if config.class_weights is None else f"{name}, weighted by inverse frequency"

    def truth_columns(self, truth: Any) -> dict[str, Any]:
        return {"truth": self.names[truth]}

    def answer_columns(self, answer: StackPrediction) -> dict[str, Any]:
        return {f"p({name})": p for name, p in self._by_name(answer.probabilities).items()}

    def _by_name(self, probabilities: Any) -> dict[str, float]:
        return dict(zip(self.names, map(float, probabilities), strict=True))

    def compute_scores(self, truths: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:
        return classification_scores(truths, np.stack([answer.probabilities for answer in answers]))

    def trivial_answer(self) -> StackPrediction | None:
        return StackPrediction(probabilities=np.array(self.shares)) if self.shares else None

    def format_answer(self, answer: StackPrediction) -> dict[str, Any]:
        probabilities = self._by_name(answer.probabilities)
        return {"target": self.column, **self._decide(probabilities), "probabilities": probabilities}

    def _decide(self, probabilities: Mapping[str, float]) -> dict[str, Any]:
        return {"class": _most_probable(probabilities)}

    def explained_score(self, answer: Mapping[str, Any], class_name: str | None) -> tuple[str, Callable[[Any], Tensor]]:
        name = class_name or _most_probable(answer["probabilities"])
        index = self.names.index(name)
        return name, lambda output: output.logits[0, index]

    def fit_linear(self, data: LabelledFeatures, class_weights: Sequence[float] | None) -> Linear:
        weights = None if class_weights is None else dict(enumerate(class_weights))
        fitted = fit_logistic(*data, weights)
        return fitted.coef_, fitted.intercept_

    def fit_head(self, data: LabelledFeatures, config: Any) -> Linear:
        return softmax_rows(*self.fit_linear(data, config.class_weights))

    def linear_answer(self, scores: Float[np.ndarray, "rows"]) -> StackPrediction:
        if len(scores) == 1:
            return StackPrediction(probabilities=np.array([expit(-scores[0]), expit(scores[0])]))
        return StackPrediction(probabilities=softmax(scores))

    def calibration_fits(self, cases: pd.DataFrame) -> dict[str, Callable[[], Any]]:
        probabilities, truth = self._joined_questions(cases)
        return {"temperature": lambda: calibration.fit_temperature(_log(probabilities), truth)}

    def _joined_questions(self, cases: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        probabilities, truth = zip(*self._questions(cases), strict=True)
        return np.concatenate(probabilities), np.concatenate(truth)

    def _questions(self, cases: pd.DataFrame) -> list[tuple[np.ndarray, np.ndarray]]:
        """Probabilities ``(n, K)`` and class indices ``(n,)`` of each yes-or-no or multi-class question: here one."""
        probabilities = self._probabilities(cases)
        # Float32 rows sum to 1 only to seven digits.
        rows = probabilities / probabilities.sum(axis=1, keepdims=True)
        return [(rows, cases["truth"].map(self.names.index).to_numpy())]

    def _probabilities(self, cases: pd.DataFrame) -> Float[np.ndarray, "n K"]:
        return cases[[f"p({name})" for name in self.names]].to_numpy(dtype=np.float64)

    def calibration_effect(self, fitted: AnswerCalibration, cases: pd.DataFrame) -> dict[str, Any]:
        questions, temperature = self._questions(cases), fitted.temperature

        def effect(measure: Callable[..., float]) -> dict[str, float | None]:
            raw = float(np.mean([measure(probabilities, truth) for probabilities, truth in questions]))
            if temperature is None:
                return {"raw": raw, "calibrated": None}
            after = [measure(_temper(probabilities, temperature), truth) for probabilities, truth in questions]
            return {"raw": raw, "calibrated": float(np.mean(after))}

        ece = partial(calibration.expected_calibration_error, num_bins=NUM_BINS)
        return {"temperature": temperature, "ece": effect(ece), "brier": effect(calibration.brier_score)}

    def reliability(self, fitted: AnswerCalibration, cases: pd.DataFrame) -> dict[str, calibration.ReliabilityBins]:
        """Several labels are pooled."""
        probabilities, truth = self._joined_questions(cases)
        curves = {"raw": probabilities}
        if fitted.temperature is not None:
            curves[f"temperature {fitted.temperature:.3g}"] = _temper(probabilities, fitted.temperature)
        return {name: calibration.reliability_bins(values, truth, NUM_BINS) for name, values in curves.items()}

    def calibrate(self, fitted: AnswerCalibration, answer: StackPrediction) -> dict[str, Any]:
        if fitted.temperature is None:
            return {}
        tempered = self._temper(np.asarray(answer.probabilities, dtype=np.float64), fitted.temperature)
        return {"calibrated_probabilities": self._by_name(tempered)}

    def _temper(self, probabilities: Float[np.ndarray, "K"], temperature: float) -> Float[np.ndarray, "K"]:
        return _temper(probabilities[None], temperature)[0]


@dataclass(frozen=True)
class MultiLabelClassification(Classification):
    """Any subset of several labels per volume; each name is a 0/1 column."""

    label_dtype: ClassVar[torch.dtype] = torch.float32
    problem_type: ClassVar[str | None] = "multi_label_classification"
    multi_label: ClassVar[bool] = True

    @classmethod
    def resolve(cls, store: Store, train: Sequence[int], target: TargetColumn, settings: ClassificationRecipe) -> Self:
        shares = tuple(float(_binary_labels(store, name, train).mean()) for name in target.columns)
        for name, share in zip(target.columns, shares, strict=True):
            if share in (0, 1):
                raise UsageError(
                    "a label needs sessions with it and without it in the training part",
                    where=f"column {name}",
                    got="one value",
                    remedy="Leave this column out of the target",
                )
        return cls(",".join(target.columns), target.columns, shares, settings=settings)

    def _require_classes_in_training(self, store: Store, parts: Parts) -> None:
        """Nothing to require: every label is 0 or 1."""

    def absent_names(self, values: np.ndarray) -> list[str]:
        return [name for name, column in zip(self.names, values.T, strict=True) if not column.any()]

    def values(self, store: Store, sessions: Sequence[int]) -> Float[np.ndarray, "n K"]:
        return np.stack([_binary_labels(store, name, sessions) for name in self.names], axis=1)

    def _balanced_weights(self, values: np.ndarray) -> list[float]:
        """Negatives / positives of each label."""
        positives = values.sum(axis=0)
        return ((len(values) - positives) / positives).tolist()

    def truth_columns(self, truth: Any) -> dict[str, Any]:
        return {f"truth({name})": int(label) for name, label in zip(self.names, truth, strict=True)}

    def compute_scores(self, truths: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:
        return multi_label_scores(truths, np.stack([answer.probabilities for answer in answers]), self.names)

    def _decide(self, probabilities: Mapping[str, float]) -> dict[str, Any]:
        return {"present": [name for name, p in probabilities.items() if p > 0.5]}

    def fit_linear(self, data: LabelledFeatures, class_weights: Sequence[float] | None) -> Linear:
        weights = [None] * len(self.names) if class_weights is None else [{0: 1.0, 1: w} for w in class_weights]
        fits = [
            fit_logistic(data.features, column.astype(int), data.subject_groups, own)
            for column, own in zip(data.labels.T, weights, strict=True)
        ]
        return np.concatenate([fit.coef_ for fit in fits]), np.concatenate([fit.intercept_ for fit in fits])

    def fit_head(self, data: LabelledFeatures, config: Any) -> Linear:
        return self.fit_linear(data, config.class_weights)

    def linear_answer(self, scores: Float[np.ndarray, "K"]) -> StackPrediction:
        return StackPrediction(probabilities=expit(scores))

    def _questions(self, cases: pd.DataFrame) -> list[tuple[np.ndarray, np.ndarray]]:
        """A yes-or-no question per label."""
        probabilities = self._probabilities(cases)
        return [
            (_no_and_yes(probabilities[:, k]), cases[f"truth({name})"].to_numpy(dtype=int))
            for k, name in enumerate(self.names)
        ]

    def _temper(self, probabilities: Float[np.ndarray, "K"], temperature: float) -> Float[np.ndarray, "K"]:
        return _temper(_no_and_yes(probabilities), temperature)[:, 1]


def _no_and_yes(probabilities: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n 2"]:
    # A float32 sigmoid saturates at 1 above about 17, where the model's confidence is unknown.
    step = float(np.finfo(np.float32).eps) / 2
    yes = np.clip(probabilities, step, 1 - step)
    return np.stack([1 - yes, yes], axis=1)


def _log(probabilities: np.ndarray) -> np.ndarray:
    # Log probabilities are class scores up to a constant per row, which a softmax ignores.
    return np.log(np.clip(probabilities, 1e-38, None))


def _temper(probabilities: Float[np.ndarray, "n K"], temperature: float) -> Float[np.ndarray, "n K"]:
    return calibration.apply_temperature(_log(probabilities), temperature)


def _most_probable(probabilities: Mapping[str, float]) -> str:
    return max(probabilities, key=probabilities.__getitem__)


def _class_names(labels: Iterable[Any]) -> list[str]:
    return sorted({_class_name(label) for label in labels})


def _class_name(label: Any) -> str:
    if isinstance(label, (float, np.floating)) and float(label).is_integer():
        return str(int(label))
    return str(label)


def _binary_labels(store: Store, column: str, sessions: Sequence[int]) -> Float[np.ndarray, "n"]:
    """A column of 0 and 1, or of true and false, as numbers."""
    labels = store.covariate(column).iloc[list(sessions)]
    meanings = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}
    numbers = np.array([meanings.get(_class_name(label).strip().lower(), -1.0) for label in labels])
    if (numbers < 0).any():
        raise UsageError(
            "a label among several must be 0 or 1",
            where=f"column {column}",
            got=repr(labels.iloc[int(np.argmax(numbers < 0))]),
            expected="0, 1, true or false",
            remedy="Create one column of 0 and 1 of each class",
        )
    return numbers
