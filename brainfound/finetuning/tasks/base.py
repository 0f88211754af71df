"""The contract of a task: its labels, its head and loss, its answers and scores, and its section of the recipe.

A task is resolved once, on the training part alone, and then reads the labels of every part. `VolumeTask` holds what
classification and regression share: one label per session, and calibrated answers.

Axis legend: n sessions, D width, K classes or labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from brainfound.data.preprocessing.stack import Stack
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.finetuning.linear_models import LabelledFeatures, Linear
from brainfound.metrics.calibration import BiasCorrection, ConformalInterval, ReliabilityBins
from brainfound.metrics.registry import EmptyCase
from brainfound.models.stack_prediction import StackPrediction
from brainfound.recipes import Recipe

MASK = "mask"
Parts = Mapping[str, np.ndarray]
"""Part of a split → indices of its sessions."""
Notify = Callable[[str], None]
"""Receives one line."""


@dataclass(frozen=True, eq=False)
class TargetColumn:
    """The target named by a user, looked up once in a store."""

    name: str
    """A covariate, ``"mask"``, or several 0/1 covariates such as ``"edema,lesion"``."""
    columns: tuple[str, ...]
    """The covariates; none for the mask."""
    labelled: np.ndarray
    """Indices of the sessions that have a mask, or a label in each of the columns."""

    @classmethod
    def find(cls, store: Store, name: str) -> Self:
        """Find a target; UsageError where there is no such column, or no session has a label."""
        columns = target_columns(store, name)
        known = np.ones(len(store), dtype=bool) if columns else (store.sessions["mask_dtype"] != "").to_numpy()
        for column in columns:
            labels = store.covariate(column)
            numbers = pd.to_numeric(labels, errors="coerce")
            known &= labels.notna().to_numpy() & ~np.isinf(numbers.to_numpy(dtype=np.float64, na_value=0.0))
        if not known.any():
            what = f"the column {name!r} is empty" if columns else "no session has a mask"
            if len(columns) > 1:
                what = f"no session has a value in each of the columns {name!r}"
            remedy = "Add labels to the cohort and prepare it again"
            raise UsageError(what, where=f"store {store.path.name}", remedy=remedy)
        return cls(name, columns, np.flatnonzero(known))

    @property
    def is_mask(self) -> bool:
        return not self.columns


def target_columns(store: Store, name: str) -> tuple[str, ...]:
    """The covariates that a target names: none for the mask, several for ``"edema,lesion"``."""
    if name == MASK:
        return ()
    if "," not in name or name in store.covariates:
        return (name,)
    return tuple(dict.fromkeys(part.strip() for part in name.split(",") if part.strip())) or (name,)


class TaskRecipe(Recipe):
    """The section of a fine-tuning recipe that belongs to one kind of task."""

    needs: ClassVar[Mapping[str, tuple[str, tuple[str, ...]]]] = {}
    """Setting → the field that it depends on, and the values of that field for which it has an effect."""

    kind: str

    @classmethod
    def presets(cls) -> Mapping[str, Mapping[str, Any]]:
        kind = cls.model_fields["kind"].default
        return {kind: {"kind": kind}}

    @model_validator(mode="after")
    def _require_effect(self) -> Self:
        for setting, (choice, values) in self.needs.items():
            chosen = getattr(self, choice)
            if chosen not in values and getattr(self, setting) != type(self).model_fields[setting].default:
                raise ValueError(
                    f"{setting} has no effect with {choice}={chosen}; "
                    f"leave it out, or set task.{choice}={' or '.join(values)}"
                )
        return self


class ScoringRecipe(Recipe):
    """How a segmentation is scored."""

    surface_mm: float | None = Field(None, ge=0)
    """Tolerance in mm of surface Dice (normalised surface distance). If set, HD95, lesion-wise F1 and volume error are
    added too; they take many times as long. null: only Dice and the relative volume error."""
    empty: EmptyCase = "left_out"
    """Dice (surface Dice, lesion-wise F1) of a session without the structure: left_out (only clean_negatives counts
    it); with the others, 0 if anything was marked, else nan (left out), one or zero."""


@dataclass(frozen=True)
class SavedTask:
    """A task as saved in bundle.json and run.json; fields of other kinds keep their defaults."""

    task: str
    column: str
    names: tuple[str, ...] = ()
    codes: tuple[int, ...] = ()
    merge: bool = False
    mean: float = 0.0
    std: float = 1.0
    multi_label: bool = False
    regions: tuple[tuple[int, ...], ...] = ()
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class AnswerCalibration:
    """Calibration fitted to the answers on the validation part, or to out-of-fold answers, never on the test part.

    A classification gets a temperature; a regression a bias correction and a conformal interval. Calibrated answers
    appear next to the raw ones: in scores.json with their effect on the test part, and in the bundle's predictions.
    """

    num_sessions: int = 0
    """Sessions that it was fitted to."""
    temperature: float | None = None
    bias_correction: BiasCorrection | None = None
    interval: ConformalInterval | None = None
    left_out: tuple[str, ...] = ()
    """Fits that failed, for example on too small a validation part, with the reasons."""

    def report(self, effect: Mapping[str, Any], fitted_on: str = "validation") -> dict[str, Any]:
        """For scores.json: what was fitted, and its effect on the test part (`VolumeTask.calibration_effect`)."""
        common = {"fitted_on": fitted_on, "num_sessions": self.num_sessions, "left_out": list(self.left_out)}
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


class ScoredAnswers(NamedTuple):
    """The scores over all sessions, those of the trivial baseline, and notes on the labels."""

    scores: dict[str, float]
    trivial: dict[str, float]
    notes: tuple[str, ...] = ()


class Scorer(Protocol):
    """Collects the answers of its sessions, in order."""

    def add(self, stack: Stack, answer: StackPrediction) -> dict[str, Any]:
        """Score the answer of the next session; returns the task's columns of ``cases.tsv``."""
        ...

    def result(self) -> ScoredAnswers: ...


@dataclass(frozen=True)
class Task(ABC):
    """What a model is fine-tuned to predict."""

    kind: ClassVar[str]
    recipe: ClassVar[type[TaskRecipe]]
    model_class: ClassVar[type[Any]]
    per_voxel: ClassVar[bool] = False
    """The answer is a map on the scan's grid, computed from patch embeddings; there is no volume embedding."""
    has_names: ClassVar[bool] = True
    selection_metric: ClassVar[str]
    """The metric of the validation part by which the exported step is chosen."""

    column: str
    """The target's name."""
    names: tuple[str, ...] = ()
    """Class names in the order of their indices; none for a regression."""
    settings: Any = field(default=None, kw_only=True, compare=False, repr=False)
    """The task's section of the recipe; the defaults for a task from a bundle."""

    @classmethod
    @abstractmethod
    def suits(cls, store: Store, target: TargetColumn) -> bool:
        """Whether ``task: auto`` may resolve to this kind for a target."""

    @classmethod
    @abstractmethod
    def resolve(cls, store: Store, train: Sequence[int], target: TargetColumn, settings: Any) -> Task:
        """Read classes, scale or label codes from the training part; refuse labels that cannot be learnt."""

    @abstractmethod
    def check_parts(self, store: Store, parts: Parts, notify: Notify | None) -> None:
        """Before training: report labels that a part lacks, refuse those that the training part lacks."""

    @abstractmethod
    def values(self, store: Store, sessions: Sequence[int]) -> np.ndarray | None:
        """One label per session, ``(n,)`` or ``(n, K)``; None where the labels are in the stack.

        Raises:
            UsageError: an unknown label.
        """

    @abstractmethod
    def loss_labels(self, values: Any, masks: Any) -> Tensor:
        """The labels of a batch (or of one volume) as a model's loss expects them, from its values or its masks."""

    @abstractmethod
    def config_fields(self, values: np.ndarray | None) -> dict[str, Any]:
        """Fields of `BrainFoundConfig`; ``values`` are the labels of the training part."""

    def describe_labels(self) -> Any:
        """For the model's card: the names, or what an answer means."""
        return list(self.names)

    @staticmethod
    @abstractmethod
    def describe_loss(config: Any) -> str:
        """The loss of a model with this configuration, in words, for its card."""

    def reader_options(self, config: Any) -> dict[str, Any]:
        """How a `VolumeReader` chooses training slices."""
        return {}

    @abstractmethod
    def make_scorer(self, store: Store, sessions: Sequence[int], scoring: ScoringRecipe) -> Scorer: ...

    @property
    def scoring(self) -> ScoringRecipe:
        """How a run with these settings is scored."""
        return ScoringRecipe()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for bundle.json and run.json."""
        own: dict[str, Any] = {f.name: getattr(self, f.name, f.default) for f in fields(SavedTask) if f.name != "task"}
        return asdict(SavedTask(self.kind, **own))

    @classmethod
    def from_saved(cls, saved: SavedTask) -> Self:
        return cls(**{f.name: getattr(saved, f.name) for f in fields(cls) if f.name != "settings"})


class VolumeTask(Task):
    """A task with one answer per volume."""

    label_dtype: ClassVar[torch.dtype] = torch.float32

    def loss_labels(self, values: Any, masks: Any) -> Tensor:
        return torch.as_tensor(values, dtype=self.label_dtype)

    def make_scorer(self, store: Store, sessions: Sequence[int], scoring: ScoringRecipe) -> Scorer:
        return VolumeScorer(self, self.values(store, sessions).tolist())

    @abstractmethod
    def values(self, store: Store, sessions: Sequence[int]) -> np.ndarray: ...

    def absent_names(self, values: np.ndarray) -> list[str]:
        """The classes or labels that no value has; none for a regression."""
        return []

    @abstractmethod
    def truth_columns(self, truth: Any) -> dict[str, Any]:
        """The columns of ``cases.tsv`` for the label."""

    @abstractmethod
    def answer_columns(self, answer: StackPrediction) -> dict[str, Any]:
        """The columns of ``cases.tsv`` for the answer."""

    @abstractmethod
    def compute_scores(self, truths: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:
        """Metric → value over all sessions; the answers are of type `StackPrediction`."""

    @abstractmethod
    def trivial_answer(self) -> StackPrediction | None:
        """The answer for every case without its image, from the training labels; None if a bundle lacks them."""

    @abstractmethod
    def format_answer(self, answer: StackPrediction) -> dict[str, Any]:
        """The answer for one session, as plain values for JSON."""

    @abstractmethod
    def explained_score(self, answer: Mapping[str, Any], class_name: str | None) -> tuple[str, Callable[[Any], Tensor]]:
        """The score that a gradient map follows: its name, and how to read it from a model's output.

        ``answer`` comes from `format_answer`; without a class the score is that of the most probable one.
        """

    @abstractmethod
    def fit_linear(self, data: LabelledFeatures, class_weights: Sequence[float] | None) -> Linear:
        """A linear model of standardised embeddings; one row for a regression or two classes."""

    @abstractmethod
    def fit_head(self, data: LabelledFeatures, config: Any) -> Linear:
        """The first rows of a head's last layer, fitted to standardised embeddings."""

    @abstractmethod
    def linear_answer(self, scores: Float[np.ndarray, "rows"]) -> StackPrediction:
        """The scores of a `fit_linear` model for one volume, in the form of a model's answer."""

    @abstractmethod
    def calibration_fits(self, cases: pd.DataFrame) -> dict[str, Callable[[], Any]]:
        """Field of `AnswerCalibration` → its fit to cases."""

    def fit_calibration(self, cases: pd.DataFrame) -> AnswerCalibration:
        """Fit the calibration to a model's answers on the validation part."""
        fitted: dict[str, Any] = {}
        left_out = []
        for name, fit in self.calibration_fits(cases).items():
            try:
                fitted[name] = fit()
            except UsageError as error:
                left_out.append(f"{name.replace('_', ' ')}: {error}")
        return AnswerCalibration(len(cases), left_out=tuple(left_out), **fitted)

    @abstractmethod
    def calibration_effect(self, fitted: AnswerCalibration, cases: pd.DataFrame) -> dict[str, Any]:
        """The effect of a calibration on the cases of another part, as plain values for JSON."""

    def reliability(self, fitted: AnswerCalibration, cases: pd.DataFrame) -> dict[str, ReliabilityBins]:
        """Curves of accuracy against confidence, raw and calibrated, by name."""
        return {}

    @abstractmethod
    def calibrate(self, fitted: AnswerCalibration, answer: StackPrediction) -> dict[str, Any]:
        """What a calibration adds to one answer, as plain values for JSON."""


class VolumeScorer:
    """Scores one answer per volume."""

    def __init__(self, task: VolumeTask, truths: list[Any]) -> None:
        self.task, self.truths = task, truths
        self.answers: list[Any] = []

    def add(self, stack: Stack, answer: StackPrediction) -> dict[str, Any]:
        self.answers.append(answer)
        truth = self.truths[len(self.answers) - 1]
        return self.task.truth_columns(truth) | self.task.answer_columns(answer)

    def result(self) -> ScoredAnswers:
        scores, trivial = self.task.compute_scores(self.truths, self.answers), self.task.trivial_answer()
        if trivial is None:
            return ScoredAnswers(scores, dict.fromkeys(scores, float("nan")))
        return ScoredAnswers(scores, self.task.compute_scores(self.truths, [trivial] * len(self.truths)))
