"""The engine's task in fine-tuning: a model with head and adapter, trained on batches of volumes.

`build_task` builds the model: new head, frozen baseline, fitted last layer, then the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import numpy as np
import torch
from torch import Tensor, nn

from brainfound.adapters.attach import AdapterRecipe, attach_adapter
from brainfound.adapters.bundle_reader import tensors_hash
from brainfound.data.store import Store
from brainfound.finetuning.best_step import BestStep
from brainfound.finetuning.embedding_cache import EmbeddingCache
from brainfound.finetuning.fitted_heads import AugmentedPasses, fit_decoder, fit_head
from brainfound.finetuning.frozen_baseline import fit_frozen_baseline, score_frozen_baseline
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.scoring import SessionScores, score_sessions
from brainfound.finetuning.tasks import ScoringRecipe, Task
from brainfound.finetuning.volumes import EmbeddedReader, VolumeReader, augment_volumes
from brainfound.models.loading import load_initial_model
from brainfound.models.stack_prediction import unwrap_peft
from brainfound.recipes import load
from brainfound.training import distributed
from brainfound.training.data_loading import EpochOrder, RankBatchSampler
from brainfound.training.optim import OptimRecipe, parameter_settings, warmup_schedule
from brainfound.training.randomness import INITIALISATION, StepKey, derive_seed
from brainfound.training.task import TrainTask


class FrozenBaselineResult(NamedTuple):
    """A linear model on the untouched backbone."""

    tensors: dict[str, Tensor]
    """Tensors of the linear model, for the bundle."""
    encoder: str
    """The hash of the backbone's weights."""
    scores: SessionScores | None
    """Scores on the test part; without one, on that which the run reports, if it has them."""


class FinetuneTask(TrainTask):
    """A model with an adapter and a head, trained on the training part."""

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        parts: Mapping[str, np.ndarray],
        task: Task,
        recipe: FinetuneRecipe,
        accelerator: accelerate.Accelerator,
        cache: EmbeddingCache | None = None,
        frozen: FrozenBaselineResult | None = None,
    ) -> None:
        self.model, self.store, self.parts, self.task, self.recipe = model, store, parts, task, recipe
        self.device, self.rank = accelerator.device, accelerator.process_index
        self.world_size = accelerator.num_processes
        self.clip_norm = recipe.optim.clip_norm
        self.evaluate_every = recipe.evaluate_every
        train = parts["train"].tolist()
        self.reader = make_volume_reader(recipe, store, train, unwrap_peft(model).config, task, cache)
        values = task.values(store, train)
        self.values = None if values is None else dict(zip(train, values.tolist(), strict=True))
        self.eval_slices = None if task.per_voxel else recipe.num_slices
        self.cache, self.frozen = cache, frozen
        self.best: BestStep | None = None
        if recipe.evaluate_every:
            self.best = BestStep(model, task.selection_metric, recipe.patience, recipe.min_gain)

    @property
    def withholds_contrasts(self) -> bool:
        """Whether contrasts are withheld in training; cached embeddings use all contrasts of a session."""
        return self.cache is None and self.recipe.augmentation.contrast_dropout > 0

    def make_optimizer(self) -> torch.optim.Optimizer:
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                # Role and decay only; the learning rate has no layer decay here.
                settings = parameter_settings(name, parameter, 0, OptimRecipe())
                role = settings.role if ".backbone." in name else "new"
                new_group: dict[str, Any] = {"params": [], "role": role, "lr_scale": 1.0, "decays": settings.decays}
                groups.setdefault((role, settings.decays), new_group)["params"].append(parameter)
        return torch.optim.AdamW(list(groups.values()), lr=self.recipe.optim.lr, fused=True)

    def batches(self, first_step: int) -> Iterator[tuple[Any, np.ndarray, StepKey]]:
        engine, seed = self.recipe.engine, self.recipe.seed
        sizes = engine.batch_size, engine.accumulation, self.rank, self.world_size
        order = EpochOrder(len(self.parts["train"]), seed)
        for number, positions in enumerate(RankBatchSampler(order, *sizes, first_step, engine.steps)):
            step, micro_batch = divmod(number, engine.accumulation)
            key = StepKey(seed, first_step + step, micro_batch, self.rank)
            yield *self.reader.read(positions, key), key

    def loss(self, model: nn.Module, batch: Any, step: int, micro_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        volumes, sessions, key = batch
        volumes = augment_volumes(volumes.to(self.device), self.recipe.augmentation, key)
        values = None if self.values is None else [self.values[int(session)] for session in sessions]
        masks = volumes.to("cpu").masks if self.task.per_voxel else None
        labels = self.task.loss_labels(values, masks).to(self.device)
        return model(**volumes.inputs(), labels=labels).loss, {}

    def learning_rate(self, step: int, role: str) -> float:
        recipe, steps = self.recipe.optim, self.recipe.engine.steps
        peak = recipe.lr if role == "backbone" else recipe.head_lr
        return warmup_schedule(step, peak, 0.01 * peak, round(recipe.warmup * steps), steps)

    def weight_decay(self, step: int) -> float:
        return self.recipe.optim.weight_decay

    def evaluate(self, step: int) -> dict[str, Any]:
        scored = self.score("validation")
        return {f"validation/{name}": value for name, value in scored.scores.items() if np.isfinite(value)}

    def on_log_line(self, step: int, line: Mapping[str, Any]) -> None:
        score = line.get(f"validation/{self.task.selection_metric}")
        if self.best is not None and score is not None:
            self.best.add(step, score)

    @property
    def is_finished(self) -> bool:
        return self.best is not None and self.best.is_finished

    def state_tensors(self) -> dict[str, Tensor]:
        return {} if self.best is None else dict(self.best.weights)

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, weight in self.state_tensors().items():
            weight.copy_(tensors[name])

    def state_dict(self) -> dict[str, Any]:
        return {} if self.best is None else {"best": self.best.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.best is not None:
            self.best.load_dict(state["best"])

    def score(self, part: str) -> SessionScores:
        """Score one part of the split."""
        return self._score(part, ScoringRecipe(empty=self.task.scoring.empty))

    def score_finally(self) -> SessionScores:
        """Score the part that the run reports, with the surface metrics of its recipe, which are slow."""
        return self._score(scored_part(self.parts), self.task.scoring)

    def _score(self, part: str, scoring: ScoringRecipe) -> SessionScores:
        sessions = self.parts[part].tolist()
        return score_sessions(
            self.model, self.store, sessions, self.task, self.eval_slices, cache=self.cache, scoring=scoring
        )


def scored_part(parts: Mapping[str, np.ndarray]) -> str:
    """The part that a run reports: test, or validation where another cohort is tested."""
    return "test" if "test" in parts else "validation"


def build_task(
    recipe: FinetuneRecipe,
    store: Store,
    parts: Mapping[str, np.ndarray],
    source: str,
    task: Task,
    accelerator: accelerate.Accelerator,
    caches: Path,
    shared_cache: bool = False,
) -> FinetuneTask:
    """Build the model of a run from ``source``, fit the frozen baseline and the last layer, and attach the adapter.

    Embeddings are cached in ``caches``; with ``shared_cache``, those of the frozen baseline too.
    """
    torch.manual_seed(derive_seed(INITIALISATION, recipe.seed))
    train, scored = parts["train"].tolist(), parts[scored_part(parts)].tolist()
    fields: dict[str, Any] = {"aggregator": recipe.aggregator, "head_dropout": recipe.head_dropout}
    fields |= task.config_fields(task.values(store, train))
    for name in ("stem", "slice_features", "feature_layers"):
        if (value := getattr(recipe, name)) is not None:
            fields[name] = list(value) if isinstance(value, tuple) else value
    model: Any = load_initial_model(task.model_class, source, store.contrasts, **fields)
    model.to(accelerator.device)
    if recipe.gradient_checkpointing:
        _enable_gradient_checkpointing(model)
    cache = None
    if recipe.cached_embeddings:
        sessions = np.concatenate(list(parts.values())).tolist()
        open_cache = partial(EmbeddingCache, model.brainfound, store, caches, recipe.num_slices)
        distributed.run_on_main_rank(lambda: open_cache().ensure_embedded(sessions), accelerator.is_main_process)
        cache = open_cache()
    frozen: list[FrozenBaselineResult] = []
    if recipe.frozen_baseline:
        # Now, while the backbone is untouched: at the end a second copy might not fit into memory.
        folder = caches if shared_cache else None

        def fit() -> None:
            baseline = fit_frozen_baseline(
                model, store, train, task, recipe.num_slices, cache=cache, folder=folder, seed=recipe.split.seed
            )
            scores = score_frozen_baseline(baseline, store, scored, scoring=task.scoring)
            frozen.append(FrozenBaselineResult(baseline.tensors(), tensors_hash(model.encoder.state_dict()), scores))

        distributed.run_on_main_rank(fit, accelerator.is_main_process)
    if recipe.head_fit_passes:
        reader = make_volume_reader(recipe, store, train, model.config, task, cache)
        # Cached embeddings are the same in every pass.
        num_passes = 1 if cache else recipe.head_fit_passes
        batch_size = max(recipe.engine.batch_size // recipe.engine.accumulation, 1)
        passes = AugmentedPasses(reader, recipe.augmentation, num_passes, batch_size, recipe.seed)
        fit_last_layer: Any = fit_decoder if task.per_voxel else fit_head
        with accelerator.autocast():  # as in training, so that the fit ignores what bfloat16 rounds away
            fit_last_layer(model, task, passes)
    adapted = attach_adapter(model, load(AdapterRecipe, recipe.adapter, "adapters"))
    return FinetuneTask(adapted, store, parts, task, recipe, accelerator, cache, frozen[0] if frozen else None)


def make_volume_reader(
    recipe: FinetuneRecipe, store: Store, train: Sequence[int], config: Any, task: Task, cache: EmbeddingCache | None
) -> VolumeReader | EmbeddedReader:
    """The reader of the training part; ``config`` is the model's."""
    if cache is not None:
        return EmbeddedReader(cache, train)
    return VolumeReader(store, train, recipe.num_slices, **task.reader_options(config))


def _enable_gradient_checkpointing(model: Any) -> None:
    # The old name is deprecated in recent releases of transformers; the oldest supported one lacks the new name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # With a frozen stem the input has no gradient, and reentrant checkpointing would give the adapters none.
    enable({"use_reentrant": False})
