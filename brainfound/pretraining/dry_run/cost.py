"""How much memory a forward pass takes: on a GPU by its allocator, on a CPU by following tensors.

How many floating-point operations a training step needs: its matrix products, counted from the sizes.

Axis legend: ``n`` slices of a micro-batch, ``P`` patches of a crop, ``T`` tokens of a crop, ``D`` width.

A product of (a, b) and (b, c) counts 2·a·b·c. Backward, a matrix costs as much again for the gradient of
its input, and once more for its own where it is trained. What is computed twice to save memory is not
counted twice: this is the work that the model asks for, by which utilisation is measured (PaLM, arXiv
2204.02311, appendix B). Left out, because memory and not arithmetic limits them: norms, softmaxes,
Sinkhorn's sums, the optimiser and the EMA.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brainfound.data.augmentation import ViewsRecipe
from brainfound.models.blocks import kept_packing
from brainfound.models.encoder import SliceEncoder
from brainfound.models.kernels import Packing
from brainfound.pretraining.objectives.base import Objective
from brainfound.pretraining.objectives.heads import PixelDecoder
from brainfound.pretraining.objectives.hybrid import Hybrid
from brainfound.pretraining.objectives.masked_autoencoder import MaskedAutoencoder, PatchMasking
from brainfound.pretraining.objectives.masking import num_masked_per_crop
from brainfound.pretraining.objectives.self_distillation import SelfDistillation


@dataclass(frozen=True)
class StepFlops:
    """The operations of one micro-batch by who does them; the student's are forward and backward."""

    student: float
    teacher: float = 0.0
    anchor: float = 0.0

    @property
    def total(self) -> float:
        return self.student + self.teacher + self.anchor

    def __add__(self, other: StepFlops) -> StepFlops:
        return StepFlops(self.student + other.student, self.teacher + other.teacher, self.anchor + other.anchor)


def step_flops(objective: Objective, views: ViewsRecipe, num_slices: int) -> StepFlops:
    """The operations of a micro-batch of `num_slices`.

    Raises:
        TypeError: for an objective that this does not know.
    """
    if isinstance(objective, SelfDistillation):
        return _self_distillation(objective, views, num_slices)
    if isinstance(objective, MaskedAutoencoder):
        return _masked_autoencoder(objective, num_slices)
    if isinstance(objective, Hybrid):
        encoder, decoder = objective.distillation.student.encoder, objective.student.heads["decoder"]
        reconstruction = StepFlops(_reconstruction(encoder, decoder, objective.patch_masking, num_slices))
        return _self_distillation(objective.distillation, views, num_slices) + reconstruction
    raise TypeError(f"the operations of a {type(objective).__name__} are not known")


def encoder_flops(
    encoder: SliceEncoder,
    num_crops: int,
    num_patches: int,
    *,
    num_visible_patches: int | None = None,
    backward: bool = False,
    drop_path: float = 0.0,
) -> float:
    """Crops through an encoder.

    Args:
        num_patches: of each crop, all of which are embedded.
        seen: of them, how many go through the blocks; None: all.
        backward: count the backward pass too.
        drop_path: part of the crops that each residual branch leaves out.
    """
    num_tokens = encoder.num_prefix_tokens + (num_patches if num_visible_patches is None else num_visible_patches)
    if drop_path and num_crops:
        ((through, _),) = kept_packing(Packing(((num_crops, num_tokens),)), drop_path).runs
    else:
        through = num_crops
    kernel = encoder.backbone.embeddings.patch_embeddings.projection.weight
    # Pixels need no gradient.
    embedding = 2 * num_crops * num_patches * kernel.numel() * (1 + (backward and kernel.requires_grad))
    attention = 4 * num_tokens**2 * encoder.embed_dim * encoder.num_layers * through * (3 if backward else 1)
    return embedding + attention + matmul_flops(encoder.blocks, through * num_tokens, backward)


def matmul_flops(module: nn.Module, num_rows: int, backward: bool) -> float:
    """`num_rows` rows through every matrix of a module once."""
    return sum(
        2.0 * num_rows * matrix.numel() * (1 + backward * (1 + matrix.requires_grad))
        for matrix in module.parameters()
        if matrix.ndim == 2
    )


def _self_distillation(objective: SelfDistillation, views: ViewsRecipe, num_slices: int) -> StepFlops:
    recipe, student, teacher = objective.recipe, objective.student, objective.teacher
    num_large, num_small = 2 * num_slices, views.num_local * num_slices
    num_patches = objective.grid[0] * objective.grid[1]
    small_patches = (views.local_size // student.encoder.patch_size) ** 2
    masked = num_masked_per_crop(num_large, num_patches, recipe.mask_probability, recipe.mask_ratio)
    num_masked, num_visible = sum(masked), masked.count(0)

    own = encoder_flops(student.encoder, num_large, num_patches, backward=True, drop_path=recipe.drop_path)
    own += encoder_flops(student.encoder, num_small, small_patches, backward=True, drop_path=recipe.drop_path)
    own += matmul_flops(student.heads["dino"], num_large + num_small, backward=True)
    own += matmul_flops(student.ibot_head, num_masked, backward=True)
    answers = encoder_flops(teacher.encoder, num_large, num_patches)
    answers += matmul_flops(teacher.heads["dino"], num_large, backward=False)
    answers += matmul_flops(teacher.ibot_head, num_masked, backward=False)
    if objective.anchor is None:
        return StepFlops(own, answers)
    gram = 2.0 * num_visible * num_patches**2 * student.encoder.embed_dim if recipe.anchor_gram_weight else 0.0
    anchor = encoder_flops(objective.anchor, num_visible, num_patches) + gram
    return StepFlops(own + 3 * gram, answers, anchor)


def _masked_autoencoder(objective: MaskedAutoencoder, num_slices: int) -> StepFlops:
    encoder, decoder = objective.student.encoder, objective.student.heads["decoder"]
    own = _reconstruction(encoder, decoder, objective.patch_masking, num_slices)
    if objective.anchor is None:
        return StepFlops(own)
    num_patches = objective.patch_masking.grid[0] * objective.patch_masking.grid[1]
    num_kept = num_patches - objective.patch_masking.num_hidden
    gram = 2.0 * num_slices * num_kept**2 * encoder.embed_dim if objective.recipe.anchor_gram_weight else 0.0
    anchor = encoder_flops(objective.anchor, num_slices, num_patches, num_visible_patches=num_kept) + gram
    return StepFlops(own + 3 * gram, anchor=anchor)


def _reconstruction(encoder: SliceEncoder, decoder: nn.Module, patch_masking: PatchMasking, num_slices: int) -> float:
    assert isinstance(decoder, PixelDecoder)
    num_patches, num_hidden = decoder.num_patches, patch_masking.num_hidden
    num_kept = num_patches - num_hidden
    flops = encoder_flops(encoder, num_slices, num_patches, num_visible_patches=num_kept, backward=True)
    flops += matmul_flops(decoder.embed, num_slices * (1 + num_kept), backward=True)
    flops += matmul_flops(decoder.blocks, num_slices * (1 + num_patches), backward=True)
    flops += 12.0 * num_slices * (1 + num_patches) ** 2 * decoder.embed.out_features * len(decoder.blocks)
    return flops + matmul_flops(decoder.predict, num_slices * num_hidden, backward=True)


_PLAIN = (Tensor, nn.Parameter)


class ForwardMemory:
    """Measures what the first forward pass of a task takes, by standing in the place of its `loss`.

    On a GPU the allocator knows; on a CPU every tensor that an operation makes is followed until it goes.

    Args:
        loss: called with a model, a batch and whatever follows them.
        part: makes a smaller batch of a batch, which is measured before it; None: it is not.
    """

    def __init__(
        self, loss: Callable[..., Any], device: torch.device, part: Callable[[Any], Any] | None = None
    ) -> None:
        self.loss, self.device, self.part = loss, device, part
        self.peak_bytes = 0
        self.part_peak_bytes: int | None = None
        self._done = False

    def __call__(self, *arguments: Any) -> Any:
        if self._done:
            return self.loss(*arguments)
        self._done = True
        if self.part is not None:
            model, batch, *others = arguments
            # What the first call leaves behind, such as the grid of a crop size, would count in one measurement only.
            self.loss(model, self.part(batch), *others)
            _, self.part_peak_bytes = self._measure_peak(model, self.part(batch), *others)
            model.zero_grad()
        answer, self.peak_bytes = self._measure_peak(*arguments)
        return answer

    def _measure_peak(self, *arguments: Any) -> tuple[Any, int]:
        """The loss, and the most bytes that it took at any time."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            answer = self.loss(*arguments)
            return answer, torch.cuda.max_memory_allocated(self.device) - before
        with LiveTensors() as live:
            answer = self.loss(*arguments)
        return answer, live.peak_bytes


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors made inside it and still there; `peak_bytes` is the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if type(t) in _PLAIN}
        for tensor in tree_leaves(result):
            if type(tensor) in _PLAIN:
                storage = tensor.untyped_storage()
                if storage._cdata not in old:  # neither a view nor changed in place
                    old.add(storage._cdata)
                    self._track(storage)
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.num_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        weakref.finalize(storage, self._untrack, size)

    def _untrack(self, size: int) -> None:
        self.num_bytes -= size
