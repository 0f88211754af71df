"""The pretraining task: an objective, its data, its probe and its guard, for the engine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from brainfound.data.store import Store
from brainfound.files import writing
from brainfound.models import BrainFoundModel
from brainfound.models.block_runner import SavedActivations
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.monitoring.guard import Guard, read_retention_scores
from brainfound.pretraining.monitoring.probes import Probe
from brainfound.pretraining.objectives.base import LossAndMetrics, Objective
from brainfound.pretraining.objectives.registry import make_objective
from brainfound.pretraining.recipe import PretrainEngineRecipe, PretrainRecipe
from brainfound.pretraining.slices import PretrainBatch, SliceDataset, make_slice_loader, usable_rows
from brainfound.pretraining.starting_model import FROM_SCRATCH
from brainfound.training import checkpoint, distributed, optim
from brainfound.training.checkpoint import wrap_write_errors
from brainfound.training.data_loading import EpochOrder, RankBatchSampler, prefetch_to_device
from brainfound.training.distributed import is_sharded
from brainfound.training.randomness import StepKey
from brainfound.training.task import TrainTask

_SAVED_ACTIVATIONS: dict[bool | str, SavedActivations] = {False: "all", "pointwise": "products", True: "inputs"}


def make_task(
    recipe: PretrainRecipe, store: Store, model: BrainFoundModel, folder: Path, accelerator: Accelerator
) -> PretrainTask:
    """The task of a run, around copies of the starting model's encoder."""
    steps, seed = recipe.engine.steps, recipe.seed
    objective = make_objective(recipe.objective, recipe.trained, model.encoder, recipe.views, steps, seed)
    if recipe.engine.parallel == "fsdp" and accelerator.num_processes > 1:
        frozen = objective.frozen_modules()
        distributed.shard(objective.student, frozen, accelerator.device, accelerator.mixed_precision)
    objective.to(accelerator.device)
    apply_engine_settings(objective, recipe.engine)
    return PretrainTask(recipe, objective, store, folder, accelerator)


def apply_engine_settings(objective: Objective, engine: PretrainEngineRecipe) -> None:
    """Set up the encoders of an objective as `engine` says, in which no "auto" is left."""
    objective.separate_passes = engine.crops == "separate"
    kept = _SAVED_ACTIVATIONS[engine.gradient_checkpointing]
    for module in (objective.student, *objective.frozen_modules()):
        for part in module.modules():
            if isinstance(part, SliceEncoder):
                part.configure_blocks(engine.attention, compiled=bool(engine.compile), kept=kept)  # type: ignore[arg-type]


class PretrainTask(TrainTask):
    """Self-supervised pretraining on the slices of a store; best encoders are kept in ``checkpoints/best/``.

    The objective must already be on the accelerator's device, except for its student.
    """

    def __init__(
        self, recipe: PretrainRecipe, objective: Objective, store: Store, folder: Path, accelerator: Accelerator
    ) -> None:
        self.recipe, self.objective, self.store, self.engine = recipe, objective, store, recipe.engine
        self.seed, self.device = recipe.seed, accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.checkpoint_folder = folder / "checkpoints"
        self.best_folder = self.checkpoint_folder / "best"
        # Only rank 0's scores count.
        start_file = self.checkpoint_folder / "start.safetensors" if self.rank == 0 else None
        self.probe = Probe(store, recipe.probe, recipe.seed, start_file) if recipe.probe.every else None
        self.guard = Guard(recipe.guard, from_scratch=recipe.init.source == FROM_SCRATCH)
        self.effective_lr = optim.effective_lr(recipe.optim.lr, recipe.engine.batch_size)
        self.model = objective.student
        self.clip_norm = recipe.optim.clip_norm
        self.evaluate_every = recipe.probe.every
        self.rollback_policy = self.guard
        views = recipe.views
        self.dataset = SliceDataset(store, usable_rows(store, views.slice_margin), views.neighbour_mm)
        self.order = EpochOrder(len(self.dataset), recipe.seed)
        objective.require_batch_size(self._rank_batches(0).per_rank)

    def make_optimizer(self) -> torch.optim.Optimizer:
        num_layers = self.objective.exported_encoder.num_layers
        settings = self.recipe.optim
        return optim.make_optimizer(
            optim.parameter_groups(self.model.named_parameters(), num_layers, settings), settings
        )

    def _rank_batches(self, first_step: int) -> RankBatchSampler:
        engine = self.engine
        return RankBatchSampler(
            self.order, engine.batch_size, engine.accumulation, self.rank, self.world_size, first_step, engine.steps
        )

    def batches(self, first_step: int) -> Iterator[PretrainBatch]:
        loader = make_slice_loader(self.dataset, self._rank_batches(first_step), self.engine.num_workers)
        return prefetch_to_device(loader, self.device)

    def loss(self, model: nn.Module, batch: PretrainBatch, step: int, micro_batch: int) -> LossAndMetrics:
        return self.objective.loss(model, batch, StepKey(self.seed, step, micro_batch, self.rank))

    def learning_rate(self, step: int, role: str) -> float:
        schedule, peak = self.recipe.schedule, self.effective_lr * self.guard.state.lr_scale
        return optim.learning_rate(
            step,
            role,
            peak=peak,
            final=peak * schedule.final_lr_ratio,
            num_steps=self.engine.steps,
            warmup_steps=schedule.warmup_steps,
            head_warmup_steps=schedule.head_warmup_steps,
            freeze_last_layer_steps=schedule.freeze_last_layer_steps,
            shape=schedule.shape,
        )

    def weight_decay(self, step: int) -> float:
        return self.recipe.optim.weight_decay

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        return self.objective.clip_groups()

    def after_step(self, step: int, taken: Tensor) -> None:
        self.objective.after_step(step, taken)

    def scheduled_values(self, step: int) -> dict[str, float]:
        return self.objective.schedule(step)

    def health_metrics(self) -> dict[str, float]:
        return self.objective.health_metrics()

    def evaluate(self, step: int) -> dict[str, Any]:
        assert self.probe is not None
        scores = self.probe.run(self.objective.exported_encoder, self.device, step == 0)
        return scores.line(self.probe.recipe.method)

    def on_log_line(self, step: int, line: Mapping[str, Any]) -> None:
        if self.rank == 0:
            for text in self.guard.new_warnings(line):
                warnings.warn(text, stacklevel=2)
        if "loss" in line:
            self.guard.on_log_line(step, line)
            return
        if step == 0 and self.probe is not None:
            distributed.run_on_main_rank(self.probe.save_start, self.rank == 0)
        # Saved first, because `record_probe` may stop the run.
        retention = read_retention_scores(line)
        if self.guard.is_best(step, line["probe"], retention):
            self._save_best_encoder(step)
        self.guard.record_probe(step, line["probe"], line["probe_standard_error"], retention)

    def best_encoder_path(self, step: int) -> Path:
        return self.best_folder / f"step-{step:06d}.safetensors"

    def _save_best_encoder(self, step: int) -> None:
        weights: dict[str, Tensor] = {}
        if self.rank == 0 or is_sharded(self.model):
            weights = {name: t.detach().cpu().contiguous() for name, t in self.objective.exported_state().items()}
        distributed.run_on_main_rank(lambda: self._write_best(step, weights), self.rank == 0)

    def _write_best(self, step: int, weights: dict[str, Tensor]) -> None:
        kept = self.best_encoder_path(step)
        with wrap_write_errors("the encoder of the best probe", kept):
            self.best_folder.mkdir(parents=True, exist_ok=True)
            with writing(kept) as temporary:
                save_file(weights, temporary)
            # A killed run resumes from a checkpoint, and may stop again before it reaches this step: the best encoder
            # that a checkpoint names stays as long as that checkpoint.
            guards = [state.get("guard", {}) for state in checkpoint.read_task_states(self.checkpoint_folder)]
            steps = {guard["best_step"] for guard in guards if guard.get("best_step") is not None}
            referenced = {self.best_encoder_path(best) for best in steps}
            for old in set(self.best_folder.glob("step-*.safetensors")) - referenced - {kept}:
                old.unlink()

    def export_weights(self) -> tuple[int | None, dict[str, Tensor]]:
        """(step of a better, earlier encoder or None; weights). All ranks call it together if the model is sharded."""
        # Gathered before the file is opened, which may fail on one rank only.
        weights = {name: tensor.detach().cpu() for name, tensor in self.objective.exported_state().items()}
        best = self.guard.state.best_step
        if self.guard.should_export_best() and best is not None:
            try:
                return best, load_file(self.best_encoder_path(best))
            except (OSError, SafetensorError) as error:
                text = f"{self.best_encoder_path(best)} cannot be read ({error}); the last teacher is exported"
                warnings.warn(text, stacklevel=2)
        return None, weights

    def export_bytes(self) -> int:
        # The export, and the best encoder of each checkpoint. Counted, not gathered: only rank 0 calls this.
        weights = self.objective.exported_encoder.state_dict().values()
        num_encoders = 1 + self.engine.max_checkpoints_on_disk(self.guard.may_roll_back)
        return num_encoders * sum(weight.numel() * weight.element_size() for weight in weights)

    def state_tensors(self) -> dict[str, Tensor]:
        return self.objective.state_dict()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.objective.load_state_dict(tensors)

    def state_dict(self) -> dict[str, Any]:
        return {"guard": self.guard.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.guard.load_state_dict(state["guard"])
