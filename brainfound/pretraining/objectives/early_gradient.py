"""Gradients that are computed as soon as a part of the loss is known.

The losses of the local crops, and of each global crop, need nothing of the student's other passes. Their
gradients can therefore be taken before the next pass begins, and what a pass keeps for its backward pass is gone by
then: the memory of a step is that of its largest pass, not of all, at the same number of operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def sum_with_eager_backward(
    values: Sequence[Callable[[], Tensor]], parameters: Iterable[nn.Parameter]
) -> Float[Tensor, ""]:
    """The sum of ``value()``, with its gradients for `parameters` computed now and handed on in the backward pass.

    What a value depends on besides `parameters` gets no gradient. Without gradients (in evaluation) it is
    the plain sum. Of a parameter that no value depends on nothing is handed on.
    """
    if not torch.is_grad_enabled():
        return torch.stack([value() for value in values]).sum()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    collected: dict[int, Tensor] = {}
    total = torch.stack([_collect(collected, value(), trained) for value in values]).sum()
    return _PrecomputedGradients.apply(total, list(collected.values()), *(trained[place] for place in collected))


def _collect(
    collected: dict[int, Tensor], value: Float[Tensor, ""], parameters: Sequence[nn.Parameter]
) -> Float[Tensor, ""]:
    """Add the gradients of a value to those collected, by the place of the parameter; gives the value alone.

    What is new lies in one piece of memory: scattered, it would keep the room of its pass from the next one.
    """
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    reached = {place: gradient for place, gradient in enumerate(gradients) if gradient is not None}
    known = [place for place in reached if place in collected]
    new = [place for place in reached if place not in collected]
    if known:
        torch._foreach_add_([collected[place] for place in known], [reached[place] for place in known])
    if new:
        pieces = torch.cat([reached[place].flatten() for place in new]).split([reached[p].numel() for p in new])
        collected.update({place: piece.view_as(reached[place]) for place, piece in zip(new, pieces, strict=True)})
    return value.detach()


class _PrecomputedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("gradients that were computed early can be handed on once")
        # In place: a second copy of them would lie beside what the other pass keeps.
        torch._foreach_mul_(ctx.gradients, gradient)
        found, ctx.gradients = ctx.gradients, None
        return None, None, *found
