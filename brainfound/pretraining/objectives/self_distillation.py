"""Self-distillation on slices: DINO on the CLS token, iBOT on masked patches, KoLeo, and an anchor.

Axis legend: ``n`` slices, ``m`` crops of a pass, ``C`` contrasts, ``T`` tokens of a crop, ``P`` patch tokens of
a global crop, ``M`` masked tokens, ``D`` width, ``K`` prototypes. Rows of crops are crop-major: crop A
of all slices, then crop B of all slices.

Sources: DINOv2 (arXiv 2304.07193, section 4) for the losses and constants; DINOv3 (2508.10104, section 4.2) for the
Gram anchor. Ours, for continuing from released weights: the teacher's heads are copies of the student's, the start
anchors patch and CLS features, and KoLeo never pushes slices of one session apart. Each is a field of the recipe.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from brainfound.data.augmentation import MultiCrop, Views, ViewsRecipe
from brainfound.data.augmentation.transforms import to_device
from brainfound.errors import RecipeError
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.monitoring.guard import feature_health_metrics
from brainfound.pretraining.objectives import ema, losses
from brainfound.pretraining.objectives.base import (
    AnchoredObjective,
    AnchorRecipe,
    LossAndMetrics,
    StepFlops,
    encoder_flops,
    matmul_flops,
)
from brainfound.pretraining.objectives.masking import BlockMasks, num_masked_per_crop, sample_block_masks
from brainfound.pretraining.objectives.networks import (
    DistillationModel,
    DistillationOutput,
    HeadRecipe,
    backward_per_pass,
)
from brainfound.pretraining.objectives.prototypes import Assignments, Projection
from brainfound.pretraining.slices import PretrainBatch
from brainfound.training import distributed
from brainfound.training.optim import ScheduleRecipe, cosine, linear
from brainfound.training.randomness import MASKS, VIEWS, StepKey, numpy_generator, torch_generator

MAX_INITIAL_WEIGHT_FRACTION = 0.05  # of the initial weights left in the final teacher; above it, a note


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
    """Whether KoLeo looks for neighbours in float32 even under autocast: bfloat16 cannot tell near ones apart."""
    koleo_over_ranks: bool = True
    """Whether KoLeo looks for neighbours among the slices of all ranks, or of each rank alone."""
    koleo_within_sessions: bool = False
    """Whether KoLeo may push slices of one session apart, which are near-duplicates."""
    copied_heads: bool = True
    """Whether the teacher's heads begin as copies of the student's; otherwise the first targets are noise."""
    head: HeadRecipe = HeadRecipe()
    """The projection heads."""
    shared_head: bool = False
    """Whether CLS and patches use one head (iBOT) or two (DINOv2)."""
    student_temperature: float = Field(default=0.1, gt=0)
    """Temperature of the student's scores."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """Temperature of the teacher's targets at the start, and after the warm-up."""
    teacher_temperature_warmup_steps: int = Field(default=3000, ge=0)
    """Steps of the warm-up of the teacher's temperature."""
    sinkhorn_iterations: int = Field(default=3, ge=1)
    """Iterations of Sinkhorn-Knopp."""
    momentum: tuple[float, float] = (0.994, 1.0)
    """Momentum of the EMA teacher at the start and at the end, along a cosine."""
    mask_probability: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the global crops that are masked for the student; at least one crop always is."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Range of the fraction of a masked crop's patches that is hidden; at least one patch always is."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Probability that the student skips a residual branch for an image (stochastic depth)."""

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
    """The teacher's CLS tokens and their targets, for its collapse metrics."""

    cls: Float[Tensor, "2·n D"]
    cls_projection: Projection
    cls_targets: Assignments
    temperature: float


class GlobalCrops(NamedTuple):
    """Global crops that the student encodes together, and their masks on the device."""

    rows: slice
    masks: BlockMasks
    masked: slice
    """Their masked tokens among those of all global crops."""
    unmasked_fraction: float
    """Their share of the crops without masks."""


class SelfDistillation(AnchoredObjective):
    """Student, EMA teacher and anchor around copies of one encoder; the teacher is exported."""

    recipe_class = SelfDistillationRecipe
    exported_name = "EMA teacher"
    recipe: SelfDistillationRecipe

    def __init__(
        self, encoder: SliceEncoder, recipe: SelfDistillationRecipe, views: ViewsRecipe, num_steps: int, seed: int
    ) -> None:
        self.multi_crop = MultiCrop(views, encoder.patch_size)
        # Pairs of a student's and a teacher's crop: each global crop meets the other one, each local crop both.
        self.num_pairs = 2 + 2 * views.num_local
        self.grid = (views.global_size // encoder.patch_size,) * 2
        self.num_patches = self.grid[0] * self.grid[1]
        model = DistillationModel(copy.deepcopy(encoder), recipe.head, recipe.shared_head, recipe.drop_path, seed)
        self.student = self.distilled = model
        self.teacher = copy.deepcopy(model).requires_grad_(False).eval()
        if not recipe.copied_heads:
            self.teacher.initialise_heads(seed, first_stream=len(self.teacher.heads))
        super().__init__(encoder, recipe, views, num_steps, seed)
        self._last: tuple[TeacherTargets, dict[str, Tensor]] | None = None

    def compute_loss(self, student: DistillationModel, batch: PretrainBatch, key: StepKey) -> LossAndMetrics:
        recipe, device = self.recipe, batch.pixels.device

        # Crops of each slice, and patches of the global ones that are hidden from the student.
        views = self.multi_crop(
            batch.pixels,
            batch.present_on_cpu,
            torch_generator(VIEWS, key.seed, *key.keys),
            torch_generator(VIEWS, key.seed, *key.keys, 1, device=device),
            batch.neighbours,
        )
        large, num_crops = views.global_views, len(views.global_views.pixels)
        num_slices = num_crops // 2
        rng = numpy_generator(MASKS, key.seed, *key.keys)
        masks = sample_block_masks(num_crops, self.grid, rng, recipe.mask_probability, recipe.mask_ratio)

        # Targets: the teacher sees the global crops, unmasked.
        temperature = self.schedule(key.step)["teacher_temperature"]
        targets, patch_targets = self._teacher_targets(large, to_device(masks.indices, device), temperature)

        def cls_loss(projection: Projection, target_rows: Int[Tensor, "N targets"]) -> Float[Tensor, ""]:
            """The mean over all pairs of crops; normalised as in DINOv2."""
            weights = projection.unit.new_full((len(projection.unit),), 1 / (num_slices * self.num_pairs))
            student_temperature = recipe.student_temperature
            return losses.cross_entropy(projection, targets.cls_targets, student_temperature, weights, target_rows)

        def local_losses(tokens: Float[Tensor, "m T D"]) -> dict[str, Tensor]:
            """Each local crop against both crops of the teacher."""
            slices = torch.arange(len(tokens), device=device) % num_slices
            target_rows = torch.stack((slices, slices + num_slices), dim=1)
            return {"dino_local": cls_loss(student.project_cls(tokens), target_rows)}

        def global_losses(tokens: Float[Tensor, "m T D"], crops: GlobalCrops) -> dict[str, Tensor]:
            """Each global crop against the teacher's other one, and its masked patches against the teacher's."""
            output = student.project(tokens, crops.masks.indices)
            other_crop = torch.arange(num_crops, device=device).roll(num_slices)[crops.rows]
            parts = {
                "dino_global": cls_loss(output.cls_projection, other_crop[:, None]),
                "ibot": losses.cross_entropy(
                    output.masked_projection,
                    patch_targets.part(crops.masked),
                    recipe.student_temperature,
                    crops.masks.weights / num_crops,
                ),
            }
            if recipe.koleo_weight:
                spreads = [self._koleo(cls, batch.sessions) for cls in output.cls.split(num_slices)]
                parts["koleo"] = torch.stack(spreads).sum()
            return parts | self._anchor_losses(output, select_views(large, crops.rows), crops)

        summed: dict[str, Tensor] = {}

        def pass_loss(local: Views | None, crops: GlobalCrops | None) -> Float[Tensor, ""]:
            """The weighted loss of crops that are encoded together."""
            groups = [] if local is None else [student.embed(local)]
            if crops is not None:
                groups.append(student.embed(select_views(large, crops.rows), crops.masks.mask))
            tokens = student.encoder.transform(groups, student.drop_path)
            parts = {} if crops is None else global_losses(tokens[-1], crops)
            parts |= {} if local is None else local_losses(tokens[0])
            for name, part in parts.items():
                summed[name] = summed.get(name, 0) + part.detach()
            return torch.stack([self.weight(name) * part for name, part in parts.items()]).sum()

        *early, last = self._passes(large, views.local_views, masks)
        if early:
            # Only the gradients of these passes are left in memory when the last one begins.
            before = backward_per_pass([partial(pass_loss, *one) for one in early], student.parameters())
            total = before + pass_loss(*last)
        else:
            total = pass_loss(*last)
        metrics = {f"loss_{name}": part for name, part in summed.items()}
        metrics["loss_dino"] = metrics["loss_dino_global"] + metrics.get("loss_dino_local", 0)
        self._last = targets, metrics
        return total, metrics

    def weight(self, part: str) -> float:
        """The weight of a part of the loss."""
        return getattr(self.recipe, f"{'dino' if part.startswith('dino') else part}_weight")

    def _passes(
        self, large: Views, small: Views | None, masks: BlockMasks
    ) -> list[tuple[Views | None, GlobalCrops | None]]:
        """The crops of each pass: all, or (`separate_passes`) some local ones at a time, then each global one."""
        num_crops, num_passes, device = len(masks.mask), 2 if self.separate_passes else 1, large.pixels.device
        passes = []
        for first in range(0, num_crops, num_crops // num_passes):
            rows = slice(first, first + num_crops // num_passes)
            part, masked = masks.select_crops(rows)
            share = len(part.unmasked_crops) / max(1, len(masks.unmasked_crops))
            passes.append(GlobalCrops(rows, part.to(device), masked, share))
        if not self.separate_passes:
            return [(small, passes[0])]
        return [*((local, None) for local in self._split_local(large, small)), *((None, crops) for crops in passes)]

    def _split_local(self, large: Views, small: Views | None) -> list[Views]:
        """The local crops, in groups of no more tokens than one global crop of every slice has."""
        if small is None:
            return []
        encoder = self.distilled.encoder
        large_tokens, small_tokens = (
            encoder.num_prefix_tokens + views.pixels.shape[-2:].numel() // encoder.patch_size**2
            for views in (large, small)
        )
        at_a_time = max(1, large_tokens // small_tokens) * (len(large.pixels) // 2)
        return [select_views(small, slice(at, at + at_a_time)) for at in range(0, len(small.pixels), at_a_time)]

    @torch.no_grad()
    def _teacher_targets(
        self, large: Views, masked: Int[Tensor, "M"], temperature: float
    ) -> tuple[TeacherTargets, Assignments]:
        """The targets of CLS tokens and of masked patches; the latter are too large to keep for `health_metrics`."""
        output = self.teacher.project(_encode(self.teacher.encoder, large), masked)
        iterations = self.recipe.sinkhorn_iterations
        cls_targets = losses.sinkhorn_knopp(output.cls_projection, temperature, iterations)
        targets = TeacherTargets(output.cls, output.cls_projection, cls_targets, temperature)
        return targets, losses.sinkhorn_knopp(output.masked_projection, temperature, iterations)

    def _koleo(self, cls: Float[Tensor, "n D"], sessions: Int[Tensor, "n"]) -> Float[Tensor, ""]:
        recipe = self.recipe
        if recipe.koleo_over_ranks:
            cls, sessions = distributed.gather_rows(cls), distributed.gather_rows(sessions)
        return losses.koleo(cls, None if recipe.koleo_within_sessions else sessions, recipe.koleo_in_float32)

    def _anchor_losses(self, output: DistillationOutput, large: Views, crops: GlobalCrops) -> dict[str, Tensor]:
        """The distance to the starting checkpoint, on the crops without masks."""
        rows = crops.masks.unmasked_crops
        if self.anchor is None or not len(rows):
            return {}
        with torch.no_grad():
            anchor = self.anchor.encoding(_encode(self.anchor, select_views(large, rows)))
        parts = self.anchor_losses(output.patches[rows], output.cls[rows], anchor.patches, anchor.cls)
        # Each part is a mean over the crops of its pass.
        return {name: part * crops.unmasked_fraction for name, part in parts.items()}

    @property
    def exported_encoder(self) -> SliceEncoder:
        return self.teacher.encoder

    def describe(self) -> str:
        recipe = self.recipe
        weighted = {"DINO": recipe.dino_weight, "iBOT": recipe.ibot_weight, "KoLeo": recipe.koleo_weight}
        parts = " + ".join(name for name, weight in weighted.items() if weight)
        return f"self-distillation ({parts}{self.describe_anchor()})"

    @classmethod
    def preflight(cls, recipe: SelfDistillationRecipe, schedule: ScheduleRecipe, num_steps: int) -> Iterator[str]:
        """Note if the teacher follows too slowly for the length of the run."""
        start, end = recipe.momentum

        def initial_fraction(momentum: float) -> float:
            return ema.initial_weight_fraction(momentum, end, num_steps, schedule.head_warmup_steps)

        fraction = initial_fraction(start) if num_steps else 0.0
        if fraction > MAX_INITIAL_WEIGHT_FRACTION:
            hundredths = (value / 100 for value in range(99, 89, -1))
            enough = (value for value in hundredths if initial_fraction(value) <= MAX_INITIAL_WEIGHT_FRACTION)
            remedy = next((f", or set 'objective.momentum=[{value:g},{end:g}]'" for value in enough), "")
            yield (
                f"objective.momentum=[{start},{end}] over {num_steps} steps: {fraction:.0%} of the exported"
                f" teacher will be the weights that it began with. Train for longer{remedy}"
            )

    def require_batch_size(self, num_slices: int) -> None:
        if self.recipe.anchored and 0 not in self._num_masked(num_slices):
            raise RecipeError(
                "the anchor compares unmasked crops, and all crops of a micro-batch are masked",
                where="objective.mask_probability",
                got=f"{self.recipe.mask_probability:g} of {2 * num_slices} crops",
                remedy="Set objective.mask_probability=0.5, a larger batch, or both anchor weights to 0",
            )

    def _num_masked(self, num_slices: int) -> list[int]:
        """How many patches are masked in each global crop."""
        recipe = self.recipe
        return num_masked_per_crop(2 * num_slices, self.num_patches, recipe.mask_probability, recipe.mask_ratio)

    def named_frozen_modules(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher, **super().named_frozen_modules()}

    def schedule(self, step: int) -> dict[str, float]:
        recipe = self.recipe
        return {
            "teacher_temperature": linear(step, *recipe.teacher_temperature, recipe.teacher_temperature_warmup_steps),
            "momentum": cosine(step, *recipe.momentum, self.num_steps),
        }

    @torch.no_grad()
    def after_step(self, step: int, taken: Float[Tensor, ""]) -> None:
        """teacher ← momentum · teacher + (1 − momentum) · student, where trained and unless the step was skipped."""
        weight = (1 - self.schedule(step)["momentum"]) * taken
        pairs = zip(self.teacher.parameters(), self.distilled.parameters(), strict=True)
        trained = [pair for pair in pairs if pair[1].requires_grad]
        ema.ema_update([old for old, _ in trained], [new for _, new in trained], weight)

    @torch.no_grad()
    def health_metrics(self) -> dict[str, float]:
        """Collapse metrics of the teacher (`monitoring.guard`)."""
        if self._last is None:
            return {}
        targets, metrics = self._last
        ln_k = math.log(len(targets.cls_projection.prototypes))
        raw = F.softmax(targets.cls_projection.scores().float() / targets.temperature, dim=-1).mean(dim=0)
        raw = distributed.sum_over_ranks(raw) / distributed.world_size()
        crops = [distributed.gather_rows(crop.float()) for crop in targets.cls.chunk(2)]
        images = torch.arange(len(crops[0])).repeat(2)
        distance = metrics.get("loss_anchor_gram")
        return {
            "teacher_entropy": _entropy(raw).item() / ln_k,
            "target_entropy": _entropy(targets.cls_targets.take(slice(None))).mean().item() / ln_k,
            "ln_k": ln_k,
            **feature_health_metrics(torch.cat(crops), images),
            **({} if distance is None else {"gram_distance": distance.item()}),
        }

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        heads = {f"{name}_head": list(head.parameters()) for name, head in self.distilled.heads.items()}
        return {"backbone": list(self.distilled.encoder.parameters()), **heads}

    def flops(self, num_slices: int) -> StepFlops:
        student, teacher, drop_path = self.distilled, self.teacher, self.recipe.drop_path
        num_large, num_small, num_patches = 2 * num_slices, self.views.num_local * num_slices, self.num_patches
        small_patches = (self.views.local_size // student.encoder.patch_size) ** 2
        masked = self._num_masked(num_slices)
        num_masked, num_unmasked_crops = sum(masked), masked.count(0)
        own = encoder_flops(student.encoder, num_large, num_patches, backward=True, drop_path=drop_path)
        own += encoder_flops(student.encoder, num_small, small_patches, backward=True, drop_path=drop_path)
        own += matmul_flops(student.heads["dino"], num_large + num_small, backward=True)
        own += matmul_flops(student.ibot_head, num_masked, backward=True)
        targets = encoder_flops(teacher.encoder, num_large, num_patches)
        targets += matmul_flops(teacher.heads["dino"], num_large, backward=False)
        targets += matmul_flops(teacher.ibot_head, num_masked, backward=False)
        return StepFlops(own, targets) + self.anchor_flops(num_unmasked_crops, num_patches, num_patches)


def select_views(views: Views, rows: slice | Int[Tensor, "n"]) -> Views:
    return Views(views.pixels[rows], views.contrast_mask[rows])


def _encode(encoder: SliceEncoder, views: Views) -> Float[Tensor, "m T D"]:
    (tokens,) = encoder.transform([encoder.embed(views.pixels, views.contrast_mask)])
    return tokens


def _entropy(probs: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows"]:
    return -torch.special.xlogy(probs, probs).sum(dim=-1)
