"""Gradients that are computed as soon as a part of the loss is known.

The losses of the local crops, and of each global crop, need nothing of the student's other passes. Their gradients
are computed before the next pass begins, and the activations of the pass are freed: the memory of a step is that of
its largest pass, at the same number of operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def backward_per_pass(passes: Sequence[Callable[[], Tensor]], parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """The sum of the losses of `passes`, whose gradients for `parameters` are computed now, pass by pass.

    The backward pass of the sum hands these gradients on, once. Anything else that a loss depends on gets no gradient,
    nor does a parameter on which no loss depends. Without gradients (in evaluation) it is the plain sum.
    """
    if not torch.is_grad_enabled():
        return torch.stack([compute() for compute in passes]).sum()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    collected: dict[int, Tensor] = {}
    total = torch.stack([_collect(collected, compute(), trained) for compute in passes]).sum()
    return _PrecomputedGradients.apply(total, list(collected.values()), *(trained[place] for place in collected))


def _collect(
    collected: dict[int, Tensor], loss: Float[Tensor, ""], parameters: Sequence[nn.Parameter]
) -> Float[Tensor, ""]:
    """Add the gradients of a loss to those collected, by the place of the parameter; returns the loss without graph.

    New gradients share one piece of memory: scattered, they would keep the allocator from reusing that of the pass.
    """
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    reached = {place: gradient for place, gradient in enumerate(gradients) if gradient is not None}
    known = [place for place in reached if place in collected]
    new = [place for place in reached if place not in collected]
    if known:
        torch._foreach_add_([collected[place] for place in known], [reached[place] for place in known])
    if new:
        pieces = torch.cat([reached[place].flatten() for place in new]).split([reached[p].numel() for p in new])
        collected.update({place: piece.view_as(reached[place]) for place, piece in zip(new, pieces, strict=True)})
    return loss.detach()


class _PrecomputedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("gradients that were computed early can be handed on once")
        # In place: a copy would double their memory while the last pass still holds its activations.
        torch._foreach_mul_(ctx.gradients, gradient)
        found, ctx.gradients = ctx.gradients, None
        return None, None, *found
