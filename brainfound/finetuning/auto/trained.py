"""Trained candidates: fine-tuning runs on inner folds, and on the whole training part for the winner."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import logit

from brainfound.data.splits import dividing
from brainfound.data.splits.split_file import SINGLE_FOLD, Split, get_split_groups
from brainfound.data.store import Store
from brainfound.files import write_atomically
from brainfound.finetuning.auto.recipe import AutoRecipe
from brainfound.finetuning.finetune import RELIABILITY_FILE, finetune
from brainfound.finetuning.scoring import CASES_FILE, FROZEN_CASES_FILE, SCORES_FILE, read_cases, read_scores
from brainfound.finetuning.splits import RUN_SPLIT_FILE, stratification_labels
from brainfound.finetuning.tasks import Regression, TargetColumn, Task
from brainfound.finetuning.tasks.classification import MultiLabelClassification
from brainfound.recipes import validate
from brainfound.report.curves import CURVES_FILE, LOG_FILE
from brainfound.training import run_folder

VALIDATION_SHARE = 0.15
"""Share of the subjects of an inner fold on which the step is chosen."""
_PASSES_PER_STEP = 3
"""Cost of a forward and a backward pass, in forward passes."""


@dataclass(frozen=True)
class TrainedCandidates:
    """Runs the trained candidates of a recipe."""

    recipe: AutoRecipe
    store: Store
    source: str
    target: str
    folder: Path
    caches: Path
    layers: tuple[int, ...]
    """The backbone blocks that the linear candidates read."""

    def cost(self, name: str) -> float:
        """An estimate of a fold, in forward passes of a session with the slices of the linear candidates."""
        own, num_sessions = self.recipe.finetuning(name, self.layers), len(self.store)
        if own.cached_embeddings:
            is_embedded = own.feature_layers == self.layers and own.num_slices == self.recipe.num_slices
            return 0.0 if is_embedded else num_sessions
        share = own.num_slices / min(self.recipe.num_slices, float(self.store.sessions["num_slices"].mean()))
        sessions = float(own.engine.steps * own.engine.batch_size * _PASSES_PER_STEP)
        sessions += own.head_fit_passes * num_sessions
        scored = num_sessions / self.recipe.inner_folds
        if own.evaluate_every:
            scored += VALIDATION_SHARE * num_sessions * (1 + own.engine.steps / own.evaluate_every)
        # A segmentation is scored on all slices.
        return min(share, 1.0) * sessions + scored * (1.0 if own.task.kind == "segmentation" else min(share, 1.0))

    def run_fold(
        self, name: str, number: int, train: np.ndarray, test: np.ndarray, task: Task
    ) -> Float[np.ndarray, "n R"]:
        """Train on an inner fold; returns the head outputs of its left-out sessions."""
        out = self.folder / name / f"fold-{number + 1}"
        if not (out / CASES_FILE).is_file():
            column = TargetColumn.find(self.store, self.target)
            groups = get_split_groups(self.store)[0][train].tolist()
            strata = {column.name: stratification_labels(self.store, train, column.columns)}
            shares = {"train": 1 - VALIDATION_SHARE, "validation": VALIDATION_SHARE}
            inner = dividing.split_by_subject(groups, shares, self.recipe.seed, strata)
            parts = {part: train[index] for part, index in inner.items()} | {"test": test}
            made = {"kind": "inner fold", "target": self.target}
            file = self.folder / name / f"fold-{number + 1}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            Split.from_folds(self.store, {SINGLE_FOLD: parts}, seed=None, made=made, columns=column.columns).save(file)
            self._finetune(name, out, file, frozen=False)
            # Only its answers are needed: a fold's weights may take gigabytes.
            for part in ("checkpoints", run_folder.EXPORT_FOLDER):
                shutil.rmtree(out / part, ignore_errors=True)
        cases = read_cases(out / CASES_FILE).set_index("row").loc[test.tolist()]
        return _head_outputs(cases, task)

    def export(self, name: str, folder: Path, about: Mapping[str, Any], keep_ids: bool) -> None:
        """Train the winner on the training part, with its step chosen on the validation part, and move its files."""
        out = self.folder / name / "final"
        self._finetune(name, out, folder / RUN_SPLIT_FILE, frozen=True, keep_ids=keep_ids)
        scores = read_scores(out) | {"auto": dict(about)}
        write_atomically(out / SCORES_FILE, json.dumps(scores, indent=1) + "\n")
        files = (FROZEN_CASES_FILE, CASES_FILE, RELIABILITY_FILE, LOG_FILE, CURVES_FILE, SCORES_FILE)
        for file in (*files, run_folder.EXPORT_FOLDER):
            if (out / file).exists():
                shutil.rmtree(folder / file, ignore_errors=True)
                (out / file).rename(folder / file)
        shutil.rmtree(out)
        run_folder.write_end(folder, run_folder.DONE, scores["step"], 0)

    def _finetune(self, name: str, out: Path, split: Path, frozen: bool, keep_ids: bool = False) -> None:
        recipe = self.recipe.finetuning(name, self.layers)
        recipe = validate(type(recipe), {**recipe.model_dump(mode="json"), "frozen_baseline": frozen})
        options: dict[str, Any] = {"resume": run_folder.is_run_folder(out), "keep_ids": keep_ids, "quiet": True}
        finetune(recipe, self.store, self.source, self.target, out, split=split, cache=self.caches, **options)


def _head_outputs(cases: Any, task: Task) -> Float[np.ndarray, "n R"]:
    """The head outputs that give the answers of a table of cases; of a segmentation 1 − Dice.

    In a session without the structure nothing is to be marked: 0, or 1 where something is.
    """
    if task.per_voxel:
        dice, marked = cases["dice"].to_numpy(dtype=np.float64), cases["predicted_pixels"].to_numpy() > 0
        return np.where(np.isnan(dice), marked, 1 - dice)[:, None]
    if isinstance(task, Regression):
        return ((cases["prediction"].to_numpy(dtype=np.float64) - task.mean) / task.std)[:, None]
    probabilities = cases[[f"p({name})" for name in task.names]].to_numpy(dtype=np.float64)
    if isinstance(task, MultiLabelClassification):
        return logit(np.clip(probabilities, 1e-7, 1 - 1e-7))
    return np.log(np.clip(probabilities, 1e-7, None))
