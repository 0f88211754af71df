"""Floating-point operations of a training step: its matrix products, counted from the sizes.

A product of (a, b) and (b, c) counts 2·a·b·c. Backward, a matrix costs as much again for the gradient of
its input, and once more for its own where it is trained. What is computed twice to save memory is not
counted twice: this is the work that the model asks for, by which utilisation is measured (PaLM, arXiv
2204.02311, appendix B). Norms, softmaxes, Sinkhorn's sums, the optimiser and the EMA are left out: memory limits
them, not arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from brainfound.models.blocks import kept_packing
from brainfound.models.encoder import SliceEncoder
from brainfound.models.kernels import Packing


@dataclass(frozen=True)
class StepFlops:
    """The operations of one micro-batch by model; the student's are forward and backward."""

    student: float
    teacher: float = 0.0
    anchor: float = 0.0

    @property
    def total(self) -> float:
        return self.student + self.teacher + self.anchor

    def __add__(self, other: StepFlops) -> StepFlops:
        return StepFlops(self.student + other.student, self.teacher + other.teacher, self.anchor + other.anchor)


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
        num_patches: of each crop; all of them are embedded.
        num_visible_patches: how many of them go through the blocks; None: all.
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
