"""An automatic run: the best model that the training data allow, chosen by inner cross-validation.

The run folder is like that of `brainfound.finetuning.finetune`, with

    tried.tsv       the candidates: inner score, its standard error, folds, seconds, why each was stopped
    tried.json      their out-of-fold scores, for --resume
    candidates/     the inner runs of trained candidates
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from brainfound.adapters.attach import AdapterRecipe, attach_adapter, count_parameters
from brainfound.adapters.bundle_reader import tensors_hash
from brainfound.data.store import Store
from brainfound.data.store.store import restrict_contrasts
from brainfound.errors import UsageError
from brainfound.files import nan_as_none, require_json, write_atomically
from brainfound.finetuning.auto.features import FoldedModel, LinearModel, fold, volume_features
from brainfound.finetuning.auto.judge import AVERAGE, FINISHED, TRIVIAL, Choice, Judge, Result, make_judge
from brainfound.finetuning.auto.linear import as_answer, fit_candidate, trivial_scores
from brainfound.finetuning.auto.recipe import CHANGEABLE_ON_RESUME, AutoRecipe, LinearCandidate, resolve_auto_recipe
from brainfound.finetuning.auto.trained import TrainedCandidates
from brainfound.finetuning.embedding_cache import EmbeddingCache, slice_embeddings
from brainfound.finetuning.finetune import score_and_export
from brainfound.finetuning.frozen_baseline import VolumeLinearProbe, score_frozen_baseline
from brainfound.finetuning.linear_models import LabelledFeatures, standardise
from brainfound.finetuning.scoring import SUBJECT_ROW, SessionScores
from brainfound.finetuning.splits import resolve_split_file, split_sessions, write_split
from brainfound.finetuning.tasks import Regression, TargetColumn, VolumeTask, resolve
from brainfound.finetuning.tasks.base import MASK
from brainfound.finetuning.training_task import FinetuneTask, FrozenBaselineResult
from brainfound.metrics.registry import METRICS, format_score
from brainfound.models import BrainFoundModel
from brainfound.models.configuration import evenly_spaced_layers
from brainfound.models.loading import load_initial_model, read_backbone_config, read_history, require_start
from brainfound.recipes import load
from brainfound.training import run_folder
from brainfound.training.log import TrainingLog
from brainfound.training.process import process_state
from brainfound.training.randomness import INITIALISATION, derive_seed

FROZEN = LinearCandidate("penalised", "cls", "mean").name
"""The candidate that is the frozen baseline of any run."""
NO_TIME = "no time left"
"""Begins the reason of a candidate that goes on when a run is resumed with more minutes."""
TRIED_FILE, STATE_FILE, CANDIDATES_FOLDER = "tried.tsv", "tried.json", "candidates"


def finetune_auto(
    data: str | Path | Store,
    model: str | Path,
    target: str,
    out: str | Path | None = None,
    *,
    recipe: AutoRecipe | str | Path = "auto",
    minutes: float | None = None,
    split: str | Path | None = None,
    fold: str | None = None,
    resume: bool = False,
    keep_ids: bool = False,
    cache: str | Path | None = None,
    overrides: Iterable[str] = (),
    quiet: bool = False,
) -> Path:
    """Find the best model for a target, and export it.

    Linear models of frozen features and trained candidates are compared by inner cross-validation over the subjects of
    the training and the validation part. The winner is fitted to both and scored once on the test part. Of a
    segmentation all candidates are trained.

    Args:
        recipe: for the mask, "auto" stands for "auto-segmentation".
        minutes: time for the candidates; None: the recipe's.
        data, model, target, out, split, fold, resume, keep_ids, cache, overrides: as for
            `brainfound.finetuning.finetune.finetune`.

    Returns:
        The run folder; its ``export/`` is a bundle like any other.

    Raises:
        RecipeError, UsageError, ModelError, TrainingError.
    """
    overrides = [*overrides, *([] if minutes is None else [f"minutes={minutes!r}"])]
    if recipe == "auto" and target == MASK:
        recipe = "auto-segmentation"
    content = resolve_auto_recipe(recipe, overrides)
    if process_state().num_processes > 1:
        what, remedy = "an automatic run has one process", "Start it without accelerate launch"
        raise UsageError(what, got=process_state().num_processes, remedy=remedy)
    store = restrict_contrasts(data if isinstance(data, Store) else Store.open(data), content.contrasts)
    column = TargetColumn.find(store, target)
    if column.is_mask and not content.trained:
        what, remedy = "linear candidates are for classification and regression", "Give trained, as auto-segmentation"
        raise UsageError(what, where="trained", got="none, for a segmentation", remedy=remedy)
    folder = Path(out) if out is not None else Path("runs") / content.name
    content, accelerator, console = run_folder.start_process(folder, content, (), resume, quiet)
    with run_folder.lock_run_folder(folder, resume, accelerator):
        run_folder.find_resume_checkpoint(folder, content, store, resume, CHANGEABLE_ON_RESUME, accelerator)
        split_file, fold = resolve_split_file(folder, store, column, split, fold, resume)
        if resume and run_folder.is_run_complete(folder, None):
            console.print(f"this run is finished; its export is {folder / run_folder.EXPORT_FOLDER}")
            return folder
        require_start(model)
        parts = split_sessions(content.split, store, column, split_file, fold, console.print)
        pool = np.sort(np.concatenate([parts["train"], parts["validation"]]))
        task = resolve(store, pool.tolist(), column, content.task)
        _require_plain_head(task)
        task.check_parts(store, {**parts, "train": pool}, console.print)
        name = run_folder.short_name(model) if Path(model).exists() else str(model)
        judge = make_judge(content, store, column, pool, task)
        facts = run_folder.common_run_info(store, accelerator, content.seed)
        facts |= {"kind": "finetune", "model": name, "target": task.to_dict()}
        if resume:
            before = run_folder.read_facts(folder, "model")["model"]
            if before != name:
                raise UsageError("the run has another model", where=folder, got=name, expected=before)
        caches = folder / run_folder.EMBEDDINGS_FOLDER if cache is None else Path(cache)
        # Before the recipe, so that every run that can be resumed has its split.
        write_split(folder, store, parts, column, content.split, split_file)
        run_folder.write_start(folder, content, facts)
        history = read_history(model)
        counts = ", ".join(f"{part} {len(index)}" for part, index in parts.items())
        console.print(f"{task.kind} of {target}: {counts}")
        run = _Run(content, store, parts, pool, task, str(model), folder, judge, console.print)
        linear: list[LinearCandidate] = []
        if isinstance(task, VolumeTask):
            features = run.embed(caches, accelerator.device)
        run.clock = _Clock.open(folder, content.minutes * 60, judge)
        if isinstance(task, VolumeTask):
            linear = run.judge_linear(task, features)
        trained = TrainedCandidates(content, store, str(model), target, folder / CANDIDATES_FOLDER, caches, run.layers)
        for candidate in content.trained:
            run.judge_trained(trained, candidate)
        judge.add_average([one.name for one in linear])
        if not judge.finished():
            first = next(iter(content.trained))
            raise UsageError(
                "no candidate could be judged in the time",
                where=f"{folder / TRIED_FILE}",
                got=judge.results[first].stopped,
                remedy="Go on with more --minutes and --resume, or give candidates with fewer steps",
            )
        choice = judge.choose([one.name for one in linear])
        write_atomically(folder / TRIED_FILE, run.table(choice).to_csv(sep="\t", index=False))
        line = run.describe(choice)
        about = {"winner": choice.name, "inner_score": judge.score(choice.score), "standard_error": choice.error}
        about |= {"metric": task.selection_metric, "trivial": nan_as_none(choice.trivial), "weights": choice.weights}
        about |= {"text": line}
        if choice.name in content.trained:
            trained.export(choice.name, folder, about, keep_ids)
        else:
            assert isinstance(task, VolumeTask)
            final = run.fit(choice, linear, features)
            training = run.build(final, features, accelerator)
            _log_choice(folder, task, choice)
            objective = {TRIVIAL: "none: it answers alike for everybody"}.get(choice.name, f"linear fit: {choice.name}")
            score_and_export(
                *(folder, training, str(model), history, 0, keep_ids),
                out_of_fold=run.out_of_fold(choice.name),
                facts={"auto": about},
                card={"objective": objective, "steps": "none: a linear model of frozen features"},
            )
    return folder


def _require_plain_head(task: Any) -> None:
    if isinstance(task, Regression) and task.settings.head != "point":
        what, remedy = (
            "linear candidates answer with one number",
            "Leave task.head out, or train with finetune-regression",
        )
        raise UsageError(what, where="task.head", got=task.settings.head, expected="point", remedy=remedy)


@dataclass
class _Clock:
    """The seconds that the candidates have taken, over all starts of a run, and the file with their results."""

    path: Path
    limit: float
    judge: Judge
    before: float
    started: float

    @classmethod
    def open(cls, folder: Path, limit: float, judge: Judge) -> _Clock:
        path, before = folder / STATE_FILE, 0.0
        if path.is_file():
            content = require_json(path, "Remove this file; the candidates are fitted again")
            before = content["seconds"]
            judge.results |= {name: Result.from_dict(own) for name, own in content["candidates"].items()}
        return cls(path, limit, judge, before, time.monotonic())

    @property
    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.limit - self.elapsed

    def save(self) -> None:
        candidates = {name: result.to_dict() for name, result in self.judge.results.items()}
        write_atomically(self.path, json.dumps({"seconds": self.elapsed, "candidates": candidates}) + "\n")


@dataclass
class _Run:
    """The steps of an automatic run."""

    recipe: AutoRecipe
    store: Store
    parts: Mapping[str, np.ndarray]
    pool: np.ndarray
    task: Any
    source: str
    folder: Path
    judge: Judge
    notify: Callable[[str], None]
    clock: _Clock = field(init=False)
    seconds_per_session: float = 0.0
    layers: tuple[int, ...] = ()

    def embed(self, caches: Path, device: torch.device) -> np.ndarray:
        """The features of the training and the validation part, from one pass that is kept on disk."""
        depth = int(read_backbone_config(self.source, self.store.contrasts).num_hidden_layers)
        self.layers = tuple(evenly_spaced_layers(depth))
        fields: dict[str, Any] = {"slice_features": "cls_and_patches", "feature_layers": list(self.layers)}
        model = load_initial_model(
            BrainFoundModel, self.source, self.store.contrasts, aggregator="mean", **fields, **self._stem()
        )
        cache = EmbeddingCache(model.to(device), self.store, caches, self.recipe.num_slices)  # type: ignore[arg-type]
        started = time.monotonic()
        count = cache.ensure_embedded(self.pool.tolist())
        if not count:
            slice_embeddings(model, self.store[int(self.pool[0])], cache.slices_read(int(self.pool[0])))
        self.seconds_per_session = (time.monotonic() - started) / max(count, 1)
        self.notify(f"features: {count} of {len(self.pool)} sessions embedded, {len(self.pool) - count} in the cache")
        return volume_features(cache, self.pool.tolist())

    def _stem(self) -> dict[str, Any]:
        return {} if self.recipe.stem is None else {"stem": self.recipe.stem}

    def judge_linear(self, task: VolumeTask, features: np.ndarray) -> list[LinearCandidate]:
        """Score the linear candidates: one round of inner folds each, then more, while there is time."""
        judge = self.judge
        num_outputs = len(trivial_scores(task, judge.values))
        candidates = [
            one for one in self.recipe.linear.candidates() if one.method == "penalised" or isinstance(task, Regression)
        ]
        trivial = judge.results.setdefault(TRIVIAL, judge.new_result(num_outputs))
        for repeat, folds in enumerate(judge.repeats):
            for train, test in folds:
                trivial.scores[repeat, test] = trivial_scores(task, judge.values[train])
        trivial.folds, trivial.stopped = sum(map(len, judge.repeats)), FINISHED
        for repeat, folds in enumerate(judge.repeats):
            for candidate in candidates:
                result = judge.results.setdefault(candidate.name, judge.new_result(num_outputs))
                if not np.isnan(result.scores[repeat]).any():
                    continue
                if self.clock.left <= 0 and (repeat or candidate != candidates[0]):
                    result.stopped = NO_TIME
                    continue
                started = time.monotonic()
                for train, test in folds:
                    fitted = fit_candidate(candidate, features[train], judge.values[train], judge.groups[train], task)
                    result.scores[repeat, test] = fitted.scores(features[test])
                result.seconds += time.monotonic() - started
                result.folds += len(folds)
                result.stopped = FINISHED
            self.clock.save()
        return candidates

    def judge_trained(self, trained: TrainedCandidates, name: str) -> None:
        """Train a candidate on the first round of inner folds, as long as it is worth it."""
        judge = self.judge
        num_outputs = 1 if self.task.per_voxel else len(trivial_scores(self.task, judge.values))
        result = judge.results.setdefault(name, judge.new_result(num_outputs))
        if result.stopped and not result.stopped.startswith(NO_TIME):
            return
        result.stopped = ""
        cost = trained.cost(name)
        expected = cost * self.seconds_per_session
        folds = judge.repeats[0]
        for number, (train, test) in enumerate(folds):
            if not np.isnan(result.scores[0, test]).any():
                continue
            expected = result.seconds / result.folds if result.folds else expected
            # The winner is trained once more at the end.
            if 2 * expected > self.clock.left:
                result.stopped = (
                    f"{NO_TIME}: a fold takes about {expected:.0f} s, {max(self.clock.left, 0):.0f} s are left"
                )
                break
            started = time.monotonic()
            result.scores[0, test] = trained.run_fold(name, number, self.pool[train], self.pool[test], self.task)
            result.seconds += time.monotonic() - started
            result.folds += 1
            self.seconds_per_session = self.seconds_per_session or result.seconds / max(cost, 1)
            if result.folds < len(folds) and judge.is_hopeless(name):
                result.stopped = "worse than the best by more than the error of the difference"
                break
            self.clock.save()
        result.stopped = result.stopped or FINISHED
        self.notify(f"{name}: {result.folds} of {len(folds)} inner folds, {result.stopped}")
        self.clock.save()

    def table(self, choice: Choice) -> pd.DataFrame:
        """The content of tried.tsv, the best first."""
        rows = []
        for name, result in self.judge.results.items():
            score, error = self.judge.mean(name)
            own = {"candidate": name, self.task.selection_metric: self.judge.score(score), "standard_error": error}
            own |= {"folds": result.folds, "seconds": round(result.seconds, 1), "stopped": result.stopped}
            rows.append({**own, "winner": name == choice.name})
        metric = METRICS[self.task.selection_metric]
        return pd.DataFrame(rows).sort_values(metric.name, kind="stable", ascending=metric.better == "lower")

    def describe(self, choice: Choice) -> str:
        """One line: the winner and its inner score."""
        metric = self.task.selection_metric
        count = len(np.unique(self.judge.groups))
        if choice.name == TRIVIAL:
            same = f"the same answer for everybody ({metric} {format_score(metric, choice.trivial)}"
            nothing = f"no candidate is better than {same} on {count} left-out subjects)"
            return f"winner: {TRIVIAL}; {nothing}, so the model answers alike for everybody"
        is_average = choice.name == AVERAGE
        name = f"the average of {len(choice.weights)} linear models" if is_average else choice.name
        inner = self.judge.score(choice.score)
        scores = f"{metric} {format_score(metric, inner)} ± {format_score(metric, choice.error)}"
        line = f"winner: {name}, inner {scores} on {count} left-out subjects"
        if self.task.per_voxel:
            return line
        return f"{line}; the same answer for everybody {format_score(metric, choice.trivial)}"

    def fit(self, choice: Choice, candidates: list[LinearCandidate], features: np.ndarray) -> LinearModel:
        """The winner, fitted to the training and the validation part."""
        judge = self.judge
        if not choice.weights:
            return LinearModel.constant(trivial_scores(self.task, judge.values), features)
        chosen = [one for one in candidates if choice.weights.get(one.name)]
        models = [fit_candidate(one, features, judge.values, judge.groups, self.task) for one in chosen]
        return LinearModel.combine(models, [choice.weights[one.name] for one in chosen])

    def build(self, final: LinearModel, features: np.ndarray, accelerator: Any) -> FinetuneTask:
        """The exported model: the backbone with the linear model as its head, and the frozen baseline."""
        folded = fold(final, self.layers)
        torch.manual_seed(derive_seed(INITIALISATION, self.recipe.seed))
        fields = self.task.config_fields(self.judge.values) | folded.config | {"head_dropout": 0.0} | self._stem()
        model: Any = load_initial_model(self.task.model_class, self.source, self.store.contrasts, **fields)
        with torch.no_grad():
            model.head.score.weight.copy_(torch.from_numpy(folded.weight))
            model.head.score.bias.copy_(torch.from_numpy(folded.bias))
        recipe = self.recipe.finetuning()
        model = attach_adapter(model.to(accelerator.device).eval(), load(AdapterRecipe, recipe.adapter, "adapters"))
        tensors, probe = self._frozen_baseline(model, folded, features)
        scores = None
        if "test" in self.parts:
            scores = score_frozen_baseline(probe, self.store, self.parts["test"].tolist())
        elif FROZEN in self.judge.finished():
            scores = self.out_of_fold(FROZEN)
        frozen = FrozenBaselineResult(tensors, tensors_hash(model.encoder.state_dict()), scores)
        recipe = recipe.model_copy(update={"evaluate_every": 0})
        self.notify(f"head of {count_parameters(model)[0]:,} numbers on {model.config.describe_features()}")
        return FinetuneTask(model, self.store, self.parts, self.task, recipe, accelerator, frozen=frozen)

    def _frozen_baseline(
        self, model: Any, folded: FoldedModel, features: np.ndarray
    ) -> tuple[dict[str, Tensor], VolumeLinearProbe]:
        """The frozen baseline of any run: the mean class token, here as a part of the model's slice embedding."""
        judge = self.judge
        class_token = features[:, 0, -1, 0]
        own, mean, std = standardise([class_token], "the model that the run starts from gives embeddings")
        data = LabelledFeatures(own, judge.values, judge.groups)
        weight, bias = self.task.fit_linear(data, model.config.class_weights)
        place = slice(folded.first_class_token, folded.first_class_token + own.shape[1])
        all_means, all_stds = np.zeros(folded.num_slice_features), np.ones(folded.num_slice_features)
        all_means[place], all_stds[place] = mean, std
        rows = np.zeros((len(weight), folded.num_slice_features))
        rows[:, place] = weight
        probe = VolumeLinearProbe(model, self.task, all_means, all_stds, rows, bias, self.recipe.num_slices)
        return probe.tensors(), probe

    def out_of_fold(self, name: str) -> SessionScores:
        """The scores of a candidate on left-out subjects, its head outputs averaged over repeats."""
        task, judge, sessions = self.task, self.judge, self.store.sessions
        answers = [as_answer(task, scores) for scores in judge.out_of_fold(name)]
        rows = []
        for session, group, value, answer in zip(
            self.pool.tolist(), judge.groups.tolist(), judge.values.tolist(), answers, strict=True
        ):
            who = {"row": session, SUBJECT_ROW: group, "subject": sessions["subject"].iloc[session]}
            who["session"] = sessions["session"].iloc[session]
            rows.append({**who, **task.truth_columns(value), **task.answer_columns(answer)})
        trivial = [as_answer(task, scores) for scores in judge.out_of_fold(TRIVIAL)]
        truths = judge.values.tolist()
        scores, constant = (task.compute_scores(truths, own) for own in (answers, trivial))
        return SessionScores(task.kind, scores, constant, pd.DataFrame(rows))


def _log_choice(folder: Path, task: VolumeTask, choice: Choice) -> None:
    with TrainingLog(folder / "log.jsonl", 0, True, True) as log:
        log.truncate_after(-1)
        log.write({"step": 0, f"validation/{task.selection_metric}": choice.score})
