"""Self-distillation on slices: DINO on the CLS token, iBOT on masked patches, KoLeo, and an anchor.

Axis legend: ``n`` slices, ``m`` crops of a pass, ``C`` contrasts, ``T`` tokens of a crop, ``P`` patch tokens of
a global crop, ``M`` masked tokens, ``D`` width, ``K`` prototypes. Rows of crops are crop-major: crop A
of all slices, then crop B of all slices.

Sources: DINOv2 (arXiv 2304.07193, section 4) for the losses and constants; DINOv3 (2508.10104,
section 4.2) for the Gram anchor. What is ours is made for continuing from released weights: heads are
initialised once and copied to the teacher, the frozen starting checkpoint anchors patch and CLS
features, and KoLeo never pushes slices of one session apart. Each of these is a field of the recipe.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from brainfound.data.augmentation import CropViews, MultiCrop, ViewsRecipe
from brainfound.data.augmentation.sampling import to_device
from brainfound.errors import RecipeError
from brainfound.models.encoder import SliceEncoder, SliceEncoding
from brainfound.pretraining.monitoring.collapse_metrics import feature_health_metrics
from brainfound.pretraining.objectives import losses
from brainfound.pretraining.objectives.anchor import AnchorRecipe, anchor_losses
from brainfound.pretraining.objectives.base import Objective
from brainfound.pretraining.objectives.ema import ema_update
from brainfound.pretraining.objectives.encoder_with_heads import (
    EncoderWithHeads,
    GlobalPass,
    StepLosses,
    StudentOutput,
    select_views,
)
from brainfound.pretraining.objectives.heads import HeadRecipe
from brainfound.pretraining.objectives.masking import BlockMasks, num_masked_per_crop, sample_block_masks
from brainfound.pretraining.objectives.prototypes import Assignments, Projection, cross_entropy_sum, sinkhorn_assign
from brainfound.pretraining.slices import PretrainBatch
from brainfound.pretraining.starting_model import merge_adapters
from brainfound.training import distributed as ranks
from brainfound.training import schedules
from brainfound.training.randomness import MASKS, VIEWS, StepKey, numpy_generator, torch_generator


class SelfDistillationRecipe(AnchorRecipe):
    """Weights and constants of the self-distillation objective."""

    kind: Literal["self_distillation"] = "self_distillation"
    """Names the objective."""
    dino_weight: float = Field(default=1.0, ge=0)
    """Weight of the CLS loss."""
    ibot_weight: float = Field(default=1.0, ge=0)
    """Weight of the masked-patch loss."""
    koleo_weight: float = Field(default=0.1, ge=0)
    """Weight of KoLeo, summed over the two global crops."""
    koleo_in_float32: bool = True
    """Whether KoLeo looks for neighbours in float32 under autocast too, where bfloat16 cannot tell near ones apart."""
    koleo_over_ranks: bool = True
    """Whether KoLeo's neighbours are sought in the slices of all ranks, or in those of each rank alone."""
    koleo_within_sessions: bool = False
    """Whether slices of one session may be neighbours and be pushed apart; they are near-duplicates."""
    copied_heads: bool = True
    """Whether the teacher's heads begin as copies of the student's. Heads that are drawn apart are two sets of
    prototypes, and the student is at first taught noise."""
    head: HeadRecipe = HeadRecipe()
    """The projection heads."""
    shared_head: bool = False
    """Whether CLS and patches use one head (iBOT) or two (DINOv2)."""
    student_temperature: float = Field(default=0.1, gt=0)
    """Temperature of the student's scores."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """Temperature of the teacher's targets at the start, and after the warm-up."""
    teacher_temperature_warmup_steps: int = Field(default=3000, ge=0)
    """Steps over which it rises."""
    sinkhorn_iterations: int = Field(default=3, ge=1)
    """Iterations of Sinkhorn-Knopp."""
    momentum: tuple[float, float] = (0.994, 1.0)
    """Momentum of the EMA teacher at the start and at the end, along a cosine."""
    mask_probability: float = Field(default=0.5, ge=0, le=1)
    """Part of the global crops that are masked for the student; at least one crop always is."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Range of the part of a masked crop's patches that are hidden; at least one patch always is."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """How often the student skips a residual branch of an image (stochastic depth)."""

    @model_validator(mode="after")
    def _ranges_make_sense(self) -> SelfDistillationRecipe:
        # Not `>`: a NaN must not pass.
        if not all(0 < value < math.inf for value in self.teacher_temperature):
            raise ValueError(f"teacher_temperature must be two positive numbers, got {self.teacher_temperature}")
        if not all(0 <= value <= 1 for value in self.momentum):
            raise ValueError(f"momentum must be two numbers from 0 to 1, got {self.momentum}")
        low, high = self.mask_ratio
        if not 0 <= low <= high <= 1:
            raise ValueError(f"mask_ratio must be two increasing numbers from 0 to 1, got {low}, {high}")
        if not (self.dino_weight or self.ibot_weight or self.koleo_weight or self.anchored):
            raise ValueError("all weights are 0: there is nothing to learn")
        return self


class TeacherTargets(NamedTuple):
    """What the teacher answers, and what its health is read from."""

    cls: Float[Tensor, "2·n D"]
    cls_projection: Projection
    cls_targets: Assignments
    temperature: float


class SelfDistillation(Objective):
    """Student, EMA teacher and anchor around one starting encoder.

    Args:
        encoder: the starting checkpoint, with its trained part chosen; it is copied, not changed.
        recipe: weights and constants.
        views: the multi-crop recipe.
        num_steps: length of the run, for the momentum's cosine.
        seed: initialises the heads and names the randomness of masks.

    Raises:
        RecipeError: if crops do not fit the patch size.
    """

    student: EncoderWithHeads

    def __init__(
        self, encoder: SliceEncoder, recipe: SelfDistillationRecipe, views: ViewsRecipe, num_steps: int, seed: int
    ) -> None:
        self.recipe = recipe
        self.num_steps = num_steps
        self.multi_crop = MultiCrop(views, encoder.patch_size)
        # Of a student's and a teacher's crop: each global crop meets the other one, each local crop both.
        self.num_pairs = 2 + 2 * views.num_local
        self.grid = (views.global_size // encoder.patch_size,) * 2
        self.student = EncoderWithHeads(copy.deepcopy(encoder), recipe.head, recipe.shared_head, recipe.drop_path, seed)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        if not recipe.copied_heads:
            self.teacher.initialise_heads(seed, first_stream=len(self.teacher.heads))
        self.anchor = merge_adapters(encoder).requires_grad_(False).eval() if recipe.anchored else None
        self._last: tuple[TeacherTargets, dict[str, Tensor]] | None = None

    @property
    def exported_encoder(self) -> SliceEncoder:
        """The teacher's encoder."""
        return self.teacher.encoder

    def require_batch_size(self, num_slices: int) -> None:
        recipe = self.recipe
        num_patches = self.grid[0] * self.grid[1]
        counts = num_masked_per_crop(2 * num_slices, num_patches, recipe.mask_probability, recipe.mask_ratio)
        if recipe.anchored and 0 not in counts:
            raise RecipeError(
                "the anchor compares unmasked crops, and all crops of a micro-batch are masked",
                where="objective.mask_probability",
                got=f"{recipe.mask_probability:g} of {2 * num_slices} crops",
                remedy="Set objective.mask_probability=0.5, a larger batch, or both anchor weights to 0",
            )

    def frozen_modules(self) -> list[nn.Module]:
        return [self.teacher] if self.anchor is None else [self.teacher, self.anchor]

    def to(self, device: torch.device) -> None:
        self.teacher.to(device)
        if self.anchor is not None:
            self.anchor.to(device)

    def schedule(self, step: int) -> dict[str, float]:
        recipe = self.recipe
        return {
            "teacher_temperature": schedules.teacher_temperature(
                step, *recipe.teacher_temperature, recipe.teacher_temperature_warmup_steps
            ),
            "momentum": schedules.momentum(step, *recipe.momentum, self.num_steps),
        }

    def loss(self, student: nn.Module, batch: PretrainBatch, key: StepKey) -> tuple[Tensor, dict[str, Tensor]]:
        device = batch.pixels.device
        views = self.multi_crop(
            batch.pixels,
            batch.present_on_cpu,
            torch_generator(VIEWS, key.seed, *key.keys),
            torch_generator(VIEWS, key.seed, *key.keys, 1, device=device),
            batch.neighbours,
        )
        masks = sample_block_masks(
            len(views.global_views.pixels),
            self.grid,
            numpy_generator(MASKS, key.seed, *key.keys),
            self.recipe.mask_probability,
            self.recipe.mask_ratio,
        )
        passes = self._global_passes(masks, device)
        temperature = self.schedule(key.step)["teacher_temperature"]
        targets, masked_targets = self.targets(views, to_device(masks.indices, device), temperature)

        def global_loss_parts(output: StudentOutput, global_pass: GlobalPass) -> dict[str, Tensor]:
            masked = masked_targets.part(global_pass.masked)
            parts = self.compute_global_parts(output, targets, masked, global_pass, batch.sessions)
            return parts | self._anchor_parts(output, views, global_pass)

        step_losses = StepLosses(partial(self.compute_local_parts, targets), global_loss_parts, self.weighted_sum)
        total, parts = student(views.global_views, passes, views.local_views, step_losses)
        metrics = {f"loss_{name}": part for name, part in parts.items()}
        metrics["loss_dino"] = metrics["loss_dino_global"] + metrics.get("loss_dino_local", 0)
        self._last = targets, metrics
        return total, metrics

    def _global_passes(self, masks: BlockMasks, device: torch.device) -> list[GlobalPass]:
        """All global crops together, or first the one of every slice and then the other."""
        num_crops, num_passes = len(masks.mask), 2 if self.student.separate_passes else 1
        passes = []
        for first in range(0, num_crops, num_crops // num_passes):
            crops = slice(first, first + num_crops // num_passes)
            part, masked = masks.select_crops(crops)
            share = len(part.unmasked_crops) / max(1, len(masks.unmasked_crops))
            passes.append(GlobalPass(crops, part.to(device), masked, share))
        return passes

    def weighted_sum(self, parts: dict[str, Tensor]) -> Float[Tensor, ""]:
        """The weighted sum of parts of the loss."""
        return torch.stack([self.weight(name) * part for name, part in parts.items()]).sum()

    def weight(self, part: str) -> float:
        """The weight of a part of the loss."""
        recipe = self.recipe
        return {
            "dino_global": recipe.dino_weight,
            "dino_local": recipe.dino_weight,
            "ibot": recipe.ibot_weight,
            "koleo": recipe.koleo_weight,
            "anchor_gram": recipe.anchor_gram_weight,
            "anchor_cls": recipe.anchor_cls_weight,
        }[part]

    @torch.no_grad()
    def targets(
        self, views: CropViews, masked: Int[Tensor, "M"], temperature: float
    ) -> tuple[TeacherTargets, Assignments]:
        """The teacher's answers to the global crops, unmasked; of patches only where the student is masked.

        The answers to patches are the largest thing of a step: apart, so that they can be forgotten first.
        """
        large = views.global_views
        cls, patches, _ = _encode(self.teacher.encoder, large.pixels, large.contrast_mask)
        cls_projection = self.teacher.heads["dino"](cls)
        hidden = self.teacher.ibot_head(patches.flatten(0, 1).index_select(0, masked))
        iterations = self.recipe.sinkhorn_iterations
        targets = TeacherTargets(
            cls, cls_projection, sinkhorn_assign(cls_projection, temperature, iterations), temperature
        )
        return targets, sinkhorn_assign(hidden, temperature, iterations)

    def compute_local_parts(self, targets: TeacherTargets, projection: Projection) -> dict[str, Tensor]:
        """The CLS loss of some local crops of every slice; see `losses.dino_loss`."""
        num_slices = len(targets.cls) // 2
        slices = torch.arange(len(projection.unit), device=projection.unit.device) % num_slices
        target_rows = torch.stack((slices, slices + num_slices), dim=1)
        return {"dino_local": self._cls_loss(projection, targets, target_rows)}

    def _cls_loss(
        self, projection: Projection, targets: TeacherTargets, target_rows: Int[Tensor, "N targets"]
    ) -> Float[Tensor, ""]:
        share = 1 / (len(targets.cls) // 2 * self.num_pairs)
        weights = projection.unit.new_full((len(projection.unit),), share)
        temperature = self.recipe.student_temperature
        return cross_entropy_sum(projection, targets.cls_targets, weights, temperature, target_rows)

    def compute_global_parts(
        self,
        output: StudentOutput,
        targets: TeacherTargets,
        masked_targets: Assignments,
        global_pass: GlobalPass,
        sessions: Int[Tensor, "n"],
    ) -> dict[str, Tensor]:
        """What a pass over global crops adds to the parts that need no anchor; `losses` defines them.

        Args:
            masked_targets: of the masked tokens of this pass.
        """
        num_crops = len(targets.cls)
        other_crop = torch.arange(num_crops, device=output.cls.device).roll(num_crops // 2)[global_pass.crops]
        weights = global_pass.masks.weights / num_crops
        parts = {
            "dino_global": self._cls_loss(output.cls_projection, targets, other_crop[:, None]),
            "ibot": cross_entropy_sum(
                output.masked_projection, masked_targets, weights, self.recipe.student_temperature
            ),
        }
        if self.recipe.koleo_weight:
            crops = output.cls.split(num_crops // 2)
            parts["koleo"] = torch.stack([self._koleo(crop, sessions) for crop in crops]).sum()
        return parts

    def _koleo(self, cls: Float[Tensor, "n D"], sessions: Int[Tensor, "n"]) -> Float[Tensor, ""]:
        recipe = self.recipe
        if recipe.koleo_over_ranks:
            cls, sessions = ranks.gather_rows(cls), ranks.gather_rows(sessions)
        return losses.koleo(cls, None if recipe.koleo_within_sessions else sessions, recipe.koleo_in_float32)

    def _anchor_parts(self, output: StudentOutput, views: CropViews, global_pass: GlobalPass) -> dict[str, Tensor]:
        """The distance to the starting checkpoint, on the crops of which the student saw everything."""
        unmasked_crops = global_pass.masks.unmasked_crops
        if self.anchor is None or not len(unmasked_crops):
            return {}
        large = select_views(views.global_views, global_pass.crops)
        with torch.no_grad():
            anchor = _encode(self.anchor, large.pixels[unmasked_crops], large.contrast_mask[unmasked_crops])
        parts = anchor_losses(
            self.recipe, output.patches[unmasked_crops], output.cls[unmasked_crops], anchor.patches, anchor.cls
        )
        # Each part is a mean over the crops of its pass.
        return {name: part * global_pass.unmasked_fraction for name, part in parts.items()}

    @torch.no_grad()
    def after_step(self, step: int, taken: Float[Tensor, ""]) -> None:
        """teacher ← momentum · teacher + (1 − momentum) · student; as it was, where the step was skipped.

        A backbone that waits for its heads does not drift in the teacher either. What is never trained is
        not touched.
        """
        weight = (1 - self.schedule(step)["momentum"]) * taken
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        trained = [pair for pair in pairs if pair[1].requires_grad]
        ema_update([old for old, _ in trained], [new for _, new in trained], weight)

    @torch.no_grad()
    def health_metrics(self) -> dict[str, float]:
        """Gauges of the last batch; see `brainfound.pretraining.monitoring.collapse_metrics`."""
        if self._last is None:
            return {}
        targets, metrics = self._last
        num_prototypes = len(targets.cls_projection.prototypes)
        raw = F.softmax(targets.cls_projection.scores().float() / targets.temperature, dim=-1).mean(dim=0)
        raw = ranks.sum_over_ranks(raw) / ranks.world_size()
        crops = [ranks.gather_rows(crop.float()) for crop in targets.cls.chunk(2)]
        images = torch.arange(len(crops[0])).repeat(2)
        health_metrics = {
            "teacher_entropy": _entropy(raw).item() / math.log(num_prototypes),
            "target_entropy": _entropy(targets.cls_targets.take(slice(None))).mean().item() / math.log(num_prototypes),
            "ln_k": math.log(num_prototypes),
            **feature_health_metrics(torch.cat(crops), images),
        }
        if "loss_anchor_gram" in metrics:
            health_metrics["gram_distance"] = metrics["loss_anchor_gram"].item()
        return health_metrics

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        heads = {f"{name}_head": list(head.parameters()) for name, head in self.student.heads.items()}
        return {"backbone": list(self.student.encoder.parameters()), **heads}

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        if self.anchor is not None:
            state |= {f"anchor.{name}": value for name, value in self.anchor.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        _load_part(self.teacher, state, "teacher.")
        if self.anchor is not None:
            _load_part(self.anchor, state, "anchor.")


def _encode(encoder: SliceEncoder, pixels: Tensor, contrast_mask: Tensor) -> SliceEncoding:
    (tokens,) = encoder.transform([encoder.embed(pixels, contrast_mask)])
    return encoder.encoding(tokens)


def _entropy(probs: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows"]:
    return -torch.special.xlogy(probs, probs).sum(dim=-1)


def _load_part(module: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
