"""What the engine trains when it fine-tunes: a model with its head and its adapter, on batches of volumes.

Axis legend: B volumes, S slices, C contrasts, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import numpy as np
import torch
from torch import Tensor, nn

from brainfound.adapters.attach import AdapterRecipe, attach_adapter
from brainfound.adapters.bundle_reader import tensors_hash
from brainfound.data.store import Store
from brainfound.finetuning.embedding_cache import EmbeddingCache
from brainfound.finetuning.frozen_baseline import fit_frozen_baseline, score_frozen_baseline
from brainfound.finetuning.linear_start import fit_decoder, fit_head
from brainfound.finetuning.recipe import (
    SEGMENTATION_FIELDS,
    FinetuneRecipe,
    classification_config_fields,
    regression_config_fields,
)
from brainfound.finetuning.scoring import ScoringRecipe, SessionScores, score_sessions
from brainfound.finetuning.targets import Target
from brainfound.finetuning.volumes import EmbeddedReader, VolumeReader, augment_volumes
from brainfound.models import BrainFoundForClassification, BrainFoundForRegression, BrainFoundForSegmentation
from brainfound.models.infer import unwrap_peft
from brainfound.models.loading import load_initial_model
from brainfound.recipes import load
from brainfound.training import distributed as ranks
from brainfound.training.data_loading import EpochOrder, RankBatchSampler
from brainfound.training.randomness import INITIALISATION, StepKey, derive_seed
from brainfound.training.schedules import warmup_schedule
from brainfound.training.task import TrainTask

MODEL_CLASSES = {
    "classification": BrainFoundForClassification,
    "regression": BrainFoundForRegression,
    "segmentation": BrainFoundForSegmentation,
}


class FinetuneTask(TrainTask):
    """What the engine trains: a model with an adapter and a head, on the training part."""

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        parts: dict[str, np.ndarray],
        target: Target,
        recipe: FinetuneRecipe,
        accelerator: accelerate.Accelerator,
        cache: EmbeddingCache | None = None,
    ) -> None:
        self.model, self.store, self.parts, self.target, self.recipe = model, store, parts, target, recipe
        self.device, self.rank = accelerator.device, accelerator.process_index
        self.world_size = accelerator.num_processes
        self.clip_norm = recipe.optim.clip_norm
        self.evaluate_every = recipe.evaluate_every
        segmenting = target.task == "segmentation"
        self.reader = make_volume_reader(recipe, store, parts["train"], unwrap_peft(model).config, target, cache)
        values = [] if segmenting else target.values(store, parts["train"].tolist()).tolist()
        self.labels = dict(zip(parts["train"].tolist(), values, strict=True)) if values else {}
        self.eval_slices = None if segmenting else recipe.num_slices
        self.cache = cache

    @property
    def withholds_contrasts(self) -> bool:
        """Whether the model learns to do without a contrast; embeddings that are kept show all of a session."""
        return self.cache is None and self.recipe.augmentation.contrast_dropout > 0

    def make_optimizer(self) -> torch.optim.Optimizer:
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                role = "backbone" if ".backbone." in name else "new"
                decays = parameter.ndim > 1 and not any(word in name for word in ("token", "embedding"))
                group = groups.setdefault(
                    (role, decays), {"params": [], "role": role, "lr_scale": 1.0, "decays": decays}
                )
                group["params"].append(parameter)
        return torch.optim.AdamW(list(groups.values()), lr=self.recipe.optim.lr, fused=True)

    def batches(self, first_step: int) -> Iterator[tuple[Any, np.ndarray, StepKey]]:
        recipe = self.recipe
        order = EpochOrder(len(self.parts["train"]), recipe.seed)
        micro_batches = RankBatchSampler(
            order,
            recipe.engine.batch_size,
            recipe.engine.accumulation,
            self.rank,
            self.world_size,
            first_step,
            recipe.engine.steps,
        )
        for number, positions in enumerate(micro_batches):
            step, micro_batch = divmod(number, recipe.engine.accumulation)
            key = StepKey(recipe.seed, first_step + step, micro_batch, self.rank)
            yield *self.reader.read(positions, key), key

    def loss(self, model: nn.Module, batch: Any, step: int, micro_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        volumes, sessions, key = batch
        volumes = augment_volumes(volumes.to(self.device), self.recipe.augmentation, key)
        if self.target.task == "segmentation":
            codes = np.asarray(volumes.to("cpu").masks)
            labels = torch.from_numpy(self.target.encode_mask(codes).astype(np.int64)).to(self.device)
        else:
            are_classes = self.target.task == "classification" and not self.target.multi_label
            kind = torch.long if are_classes else torch.float32
            labels = torch.tensor([self.labels[int(s)] for s in sessions], dtype=kind, device=self.device)
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

    def score(self, part: str) -> SessionScores:
        """Score one part of the split; surfaces of the test part only, because they take long."""
        scoring = self.recipe.scoring if part == "test" else ScoringRecipe(empty=self.recipe.scoring.empty)
        return score_sessions(
            self.model,
            self.store,
            self.parts[part].tolist(),
            self.target,
            self.eval_slices,
            cache=self.cache,
            scoring=scoring,
        )


class FrozenBaselineResult(NamedTuple):
    """A linear model on the untouched backbone."""

    tensors: dict[str, Tensor]
    """What has to be kept to ask it again."""
    encoder: str
    """The hash of the backbone's weights."""
    scores: SessionScores
    """On the test part."""


class TrainingSetup(NamedTuple):
    """What a run begins with."""

    model: nn.Module
    """With its new head and its adapter, the same on all ranks."""
    cache: EmbeddingCache | None
    """The embeddings, if they are kept."""
    frozen: FrozenBaselineResult | None
    """On the main rank, if it is asked for."""


def build_training_setup(
    recipe: FinetuneRecipe,
    store: Store,
    parts: Mapping[str, np.ndarray],
    source: str,
    target: Target,
    accelerator: accelerate.Accelerator,
    caches: Path,
    shared_cache: bool = False,
) -> TrainingSetup:
    """Build what a run begins with.

    Args:
        source: the model to start from.
        caches: where embeddings lie, if they are kept.
        several_runs: others will ask for the same embeddings, so those of the frozen baseline are kept too.
    """
    torch.manual_seed(derive_seed(INITIALISATION, recipe.seed))
    fields: dict[str, Any] = {"aggregator": recipe.aggregator, "head_dropout": recipe.head_dropout}
    if target.task == "regression":
        fields |= regression_config_fields(recipe.regression, target, target.values(store, parts["train"].tolist()))
    else:
        fields |= {"id2label": dict(enumerate(target.names)), "label2id": {n: k for k, n in enumerate(target.names)}}
    if target.task == "classification":
        fields |= classification_config_fields(
            recipe.classification, target, target.values(store, parts["train"].tolist())
        )
    if target.task == "segmentation":
        # Segmentation reads no volume embedding; an aggregator with weights would be dead weight.
        fields |= {"aggregator": "mean", "overlapping_labels": bool(target.regions)}
        fields |= {name: getattr(recipe, name) for name in SEGMENTATION_FIELDS}
        fields |= {"class_weights": None}  # of a classification that the model may have learnt before
    fields |= {name: value for name in ("stem", "slice_features") if (value := getattr(recipe, name)) is not None}
    model: Any = load_initial_model(MODEL_CLASSES[target.task], source, store.contrasts, **fields)
    model.to(accelerator.device)
    if recipe.gradient_checkpointing:
        _enable_gradient_checkpointing(model)
    cache = None
    if recipe.cached_embeddings:
        sessions = np.concatenate(list(parts.values())).tolist()

        def embed() -> None:
            EmbeddingCache(model.brainfound, store, caches, recipe.num_slices).ensure_embedded(sessions)

        ranks.run_on_main_rank(embed, accelerator.is_main_process)
        cache = EmbeddingCache(model.brainfound, store, caches, recipe.num_slices)
    frozen: list[FrozenBaselineResult] = []
    if recipe.frozen_baseline:
        # Now, while nothing has touched the backbone; a second one at the end might not fit beside the trained one.
        folder = caches if shared_cache else None

        def fit() -> None:
            train, test = parts["train"].tolist(), parts["test"].tolist()
            found = fit_frozen_baseline(
                model, store, train, target, recipe.num_slices, cache=cache, folder=folder, seed=recipe.split.seed
            )
            encoder = tensors_hash(model.encoder.state_dict())
            frozen.append(
                FrozenBaselineResult(
                    found.tensors(), encoder, score_frozen_baseline(found, store, test, scoring=recipe.scoring)
                )
            )

        ranks.run_on_main_rank(fit, accelerator.is_main_process)
    if recipe.head_fit_passes:
        reader: Any = make_volume_reader(recipe, store, parts["train"], model.config, target, cache)
        # Embeddings that are kept are the same in every pass.
        passes = 1 if cache else recipe.head_fit_passes
        batch = max(recipe.engine.batch_size // recipe.engine.accumulation, 1)
        with accelerator.autocast():  # as training will see them: what bfloat16 rounds away is no feature
            fit_last_layer = fit_decoder if target.task == "segmentation" else fit_head
            fit_last_layer(model, reader, recipe.augmentation, target, passes, batch, recipe.seed)
    adapted = attach_adapter(model, load(AdapterRecipe, recipe.adapter, "adapters"))
    return TrainingSetup(adapted, cache, frozen[0] if frozen else None)


def make_volume_reader(
    recipe: FinetuneRecipe,
    store: Store,
    train: np.ndarray,
    config: Any,
    target: Target,
    cache: EmbeddingCache | None,
) -> VolumeReader | EmbeddedReader:
    """Reads the training part for a model with a configuration."""
    if cache is not None:
        return EmbeddedReader(cache, train.tolist())
    if target.task != "segmentation":
        return VolumeReader(store, train.tolist(), recipe.num_slices)
    neighbours = recipe.decoder_slice_mixing or config.stem == "slices"
    return VolumeReader(store, train.tolist(), recipe.num_slices, recipe.foreground_share, neighbours)


def _enable_gradient_checkpointing(model: Any) -> None:
    # The older name warns in later releases of the library, and the newer one is not in the earliest that is allowed.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # Without a gradient at its input, as with a frozen stem, the reentrant kind would give the adapters none.
    enable({"use_reentrant": False})
