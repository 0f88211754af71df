"""The runs of an experiment over folds and seeds as one predictor: the mean of its members.

Axis legend: n calibration subjects, S slices, K classes or overlapping labels, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import BrainFoundError, ModelError, UsageError
from brainfound.experiments.folder import CASES_FILE, RUNS_FILE, SUMMARY_FILE, ExperimentFolder
from brainfound.finetuning.scoring import SUBJECT_ROW, read_cases
from brainfound.finetuning.tasks import AnswerCalibration, Regression, RegressionRecipe, Segmentation, VolumeTask
from brainfound.inference.explanation import Explanation
from brainfound.inference.predictor import Predictor, PredictorInput
from brainfound.inference.segmentation import build_segmentation_fields
from brainfound.inference.tokens import TokenOptions
from brainfound.metrics.calibration import cv_plus_interval
from brainfound.models.stack_prediction import StackPrediction, infer
from brainfound.training.run_folder import read_saved_recipe

_OF_TRAINING_PART = ("mean", "std", "shares")
"""Fields of a task that differ between folds."""


@dataclass(frozen=True)
class Members:
    """The runs of one system over folds and seeds."""

    folders: Mapping[str, Path]
    """Run as ``fold-1/seed-0`` → its folder."""
    folds: Mapping[str, str]
    """Run → its fold."""


@dataclass(frozen=True)
class MeanPrediction(StackPrediction):
    """The mean of several predictions."""

    members: tuple[StackPrediction, ...] = ()


def find_members(path: Path) -> Members | None:
    """The runs below the folder of an experiment, or below the subfolder of a system or group; None elsewhere.

    Raises:
        UsageError: an evaluation, an unfinished experiment, or several systems or few-shot groups.
    """
    above = [folder for folder in list(path.absolute().parents)[:2] if (folder / RUNS_FILE).is_file()]
    root = next((folder for folder in (path, *above) if (folder / SUMMARY_FILE).is_file()), None)
    if root is None or not path.is_dir():
        return None
    experiment = ExperimentFolder.read(root)
    table = experiment.table
    if table.empty:
        raise UsageError("the folder holds scores, not models", where=path, remedy="Give the folder of a run")
    inner = path.absolute().relative_to(root.absolute()).as_posix()
    runs = table if inner == "." else table[table["run"].str.startswith(f"{inner}/")]
    if runs.empty:
        return None
    names = runs["run"].tolist()
    for column, what in (("system", "systems"), ("group", "groups of training subjects")):
        if column in runs and runs[column].nunique() > 1:
            first = Path(names[0]).parts
            depth = len(Path(inner).parts) + 1
            example = root.joinpath(*first[:depth])
            raise UsageError(
                f"the folder holds several {what}, whose mean is of no use",
                where=path,
                got=", ".join(map(str, runs[column].unique()[:4])),
                remedy=f"Give the folder of one, such as {example}",
            )
    if experiment.summary["num_runs"] < experiment.summary["num_planned"]:
        got = f"{experiment.summary['num_runs']} of {experiment.summary['num_planned']} runs"
        raise UsageError(
            "the experiment has not finished",
            where=root,
            got=got,
            remedy="Go on with it: the same command and --resume",
        )
    folds = dict(zip(names, runs["fold"].astype(str), strict=True))
    return Members({name: root / name for name in names}, folds)


class EnsemblePredictor(Predictor):
    """The mean over the folds and seeds of an experiment; used as a `Predictor`.

    The seeds of a fold are averaged first, then the folds: numbers, probabilities of classes, and probabilities of
    every pixel, from which a segmentation is decided as usual. The answer has the standard deviation over members
    (``spread``). A regression has a CV+ interval, see `brainfound.metrics.calibration.cv_plus_interval`: its residuals
    are those of each run's ``cases.tsv``, one session per subject. Temperatures, bias corrections and predicted
    standard deviations of the members are not used.

    Scans are read and compared with the input contract once; the contract is that of the first member. Members that
    adapted one frozen backbone share it in memory. Members of full fine-tuning are all held, each with its own.

    Args:
        predictors: run → its predictor.
        members: the folders of the runs and their folds.

    Raises:
        ModelError: members of different tasks, preprocessing, contrasts or numbers of slices.
    """

    def __init__(self, predictors: Mapping[str, Predictor], members: Members) -> None:
        first_name, first = next(iter(predictors.items()))
        for name, other in predictors.items():
            _require_same(first_name, first, name, other)
        super().__init__(
            first.model, first.preprocessing, first.target, first.num_slices, first.device, first.hooks,
            AnswerCalibration(), first.options, first.contract, first.withheld,
        )  # fmt: skip
        self.members, self.predictors = members, dict(predictors)
        self.folds = list(dict.fromkeys(members.folds[name] for name in predictors))
        self._residuals: np.ndarray = np.empty(0)
        if isinstance(first.target, Regression):
            self._residuals, self._fold_of_residual = _read_residuals(members, self.folds)
            recipe = read_saved_recipe(members.folders[first_name])
            self._confidence = float(_task_section(recipe)["interval_confidence"])

    def as_encoder(self, tokens: TokenOptions = TokenOptions()) -> NoReturn:
        """Refused: the embeddings of different models have no common axes."""
        self._refuse("embedded")

    def explain_prepared(
        self, ready: PredictorInput, method: str | Sequence[str] | None = None, class_name: str | None = None
    ) -> Explanation:
        """Refused: an explanation is of one model."""
        self._refuse("explained")

    def explanation_settings(
        self, method: str | Sequence[str] | None = None, class_name: str | None = None
    ) -> dict[str, Any]:
        self._refuse("explained")

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"the mean of {len(self.predictors)} models cannot be {what}",
            remedy=f"Give one of its runs, such as {next(iter(self.members.folders.values()))}",
        )

    @cached_property
    def model_hash(self) -> str:
        """A hash of the weights of all members."""
        return hashlib.blake2b(
            "".join(p.model_hash for p in self.predictors.values()).encode(), digest_size=16
        ).hexdigest()

    def infer_stack(self, stack: Stack, class_probabilities: bool = False) -> StackPrediction:
        augmentation, outputs = self.options.augmentation(self.target), []
        total: np.ndarray | None = None
        for name, predictor in self.predictors.items():
            output = infer(predictor.model, stack, self.num_slices, augmentation, self.per_voxel)
            if output.class_probabilities is not None:
                # Every pixel of every class: only the sum is kept.
                weighted = output.class_probabilities * np.float32(self._weight(name))
                total = weighted if total is None else total + weighted
                output = replace(output, class_probabilities=None)
            outputs.append(output)
        if total is not None:
            return self._decide(total, tuple(outputs), class_probabilities)
        return self.mean(outputs)

    def mean(self, answers: Sequence[StackPrediction]) -> MeanPrediction:
        """The mean of one answer per member, in their order: of numbers, or of probabilities of classes."""
        weights = np.array([self._weight(name) for name in self.predictors])
        value, probabilities = None, None
        if answers[0].value is not None:
            value = float(weights @ np.array([answer.value for answer in answers]))
        if answers[0].probabilities is not None:
            shares = [answer.probabilities for answer in answers if answer.probabilities is not None]
            probabilities = weights @ np.stack(shares)
        return MeanPrediction(
            value=value, probabilities=probabilities, slices=answers[0].slices, members=tuple(answers)
        )

    def _weight(self, name: str) -> float:
        """Each fold counts the same, and each seed of a fold."""
        own = [self.members.folds[other] for other in self.predictors].count(self.members.folds[name])
        return 1 / (own * len(self.folds))

    def _decide(
        self, mean: np.ndarray, outputs: tuple[StackPrediction, ...], class_probabilities: bool
    ) -> MeanPrediction:
        """A segmentation from its mean probabilities ``(S, K, H, W)``, as from those of a single model."""
        saved = mean if class_probabilities else None
        if outputs[0].labels is not None:
            labels, foreground = mean > 0.5, mean.max(axis=1)
            return MeanPrediction(
                labels=labels, foreground_probability=foreground, class_probabilities=saved, members=outputs
            )
        assert outputs[0].classes is not None
        classes = mean.argmax(axis=1).astype(outputs[0].classes.dtype)
        return MeanPrediction(
            classes=classes, foreground_probability=1 - mean[:, 0], class_probabilities=saved, members=outputs
        )

    def _build_fields(self, stack: Stack, answer: StackPrediction) -> dict[str, Any]:
        assert isinstance(answer, MeanPrediction)
        fields, target = super()._build_fields(stack, answer), self.target
        spread: dict[str, Any] = {"num_members": len(answer.members)}
        if isinstance(target, Segmentation):
            own = [build_segmentation_fields(stack, m, target, self.options)["answer"] for m in answer.members]
            volumes = pd.DataFrame([content["volumes_mm3"] for content in own])
            spread["volumes_mm3"] = {str(name): _deviation(volumes[name]) for name in volumes}
        elif answer.value is not None:
            spread["value"] = _deviation([m.value for m in answer.members])
            fields["answer"] |= self._interval(answer)
        else:
            assert isinstance(target, VolumeTask)
            shares = np.stack([m.probabilities for m in answer.members if m.probabilities is not None])
            spread["probabilities"] = dict(zip(target.names, map(_deviation, shares.T), strict=True))
        fields["answer"] |= {"spread": spread}
        return fields

    def _interval(self, answer: MeanPrediction) -> dict[str, Any]:
        folds = [self.members.folds[name] for name in self.predictors]
        values = pd.Series([m.value for m in answer.members]).groupby(folds).mean()
        predictions = values.loc[self._fold_of_residual].to_numpy()
        try:
            low, high = cv_plus_interval(self._residuals, predictions, confidence=self._confidence)
        except UsageError:
            return {}  # too few subjects: `_notes_on_answer`
        return {"interval": {"low": low, "high": high, "confidence": self._confidence, "method": "CV+"}}

    def _notes_on_answer(self) -> list[str]:
        notes = super()._notes_on_answer()
        if isinstance(self.target, Regression):
            try:
                cv_plus_interval(self._residuals, np.zeros(len(self._residuals)), confidence=self._confidence)
            except UsageError as error:
                notes.append(f"no interval: {error}")
        return notes


def _task_section(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    section = recipe.get("task")
    # `task: auto` has the defaults of the kind that it resolves to.
    given = section if isinstance(section, Mapping) and section.get("kind") == "regression" else {}
    return RegressionRecipe().model_dump() | dict(given)


def _deviation(values: Any) -> float | None:
    """The standard deviation over members; None for a single one."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.std(ddof=1)) if len(array) > 1 else None


def _require_same(first_name: str, first: Predictor, name: str, other: Predictor) -> None:
    """Refuse a member whose answers cannot be averaged with those of the first."""
    facts = []
    for predictor in (first, other):
        labels = {} if predictor.target is None else predictor.target.to_dict()
        facts.append(
            {
                "task": {key: value for key, value in labels.items() if key not in _OF_TRAINING_PART},
                "preprocessing": predictor.preprocessing.model_dump(),
                "contrasts": predictor.input_contrasts,
                "number of slices": predictor.num_slices,
            }
        )
    for fact in facts[0]:
        if facts[0][fact] != facts[1][fact]:
            raise ModelError(
                f"another {fact} than {first_name}: their answers have no mean",
                where=name,
                got=facts[1][fact],
                expected=str(facts[0][fact]),
                remedy="Give the folder of one run",
                usage=True,
            )


def _read_residuals(members: Members, folds: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Out-of-fold absolute errors ``(n,)`` of the mean over seeds, one session per subject, and the fold of each."""
    tables = []
    for fold in folds:
        runs = []
        for name, folder in members.folders.items():
            if members.folds[name] != fold:
                continue
            file = folder / CASES_FILE
            if not file.is_file():
                raise BrainFoundError("the run has no cases to calibrate an interval on", where=file)
            cases = read_cases(file)
            runs.append(cases.assign(truth=cases["truth"].astype(float)))
        mean = pd.concat(runs).groupby("row", as_index=False)[[SUBJECT_ROW, "truth", "prediction"]].mean()
        tables.append(mean.assign(fold=fold))
    cases = pd.concat(tables, ignore_index=True).drop_duplicates(SUBJECT_ROW)
    return (cases["prediction"] - cases["truth"]).abs().to_numpy(), cases["fold"].to_numpy()
