"""Gradients that are computed as soon as a part of the loss is known.

The loss of the local crops needs nothing of the student's global crops. Its gradient can therefore be taken
before those are encoded, and what the first pass keeps for its backward pass is gone before the second begins:
the memory of a step is that of its larger pass, not of both, at the same number of operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def with_early_gradient(value: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """``value()``, with its gradients for `parameters` computed now and handed on in the backward pass.

    What the value depends on besides `parameters` gets no gradient. Without gradients (in evaluation) it is
    the plain value. Of a parameter that the value does not depend on nothing is handed on.
    """
    if not torch.is_grad_enabled():
        return value()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    now = value()
    gradients = torch.autograd.grad(now, trained, allow_unused=True)
    reached = [parameter for parameter, gradient in zip(trained, gradients, strict=True) if gradient is not None]
    return _HandOn.apply(now.detach(), _packed([g for g in gradients if g is not None]), *reached)


def _packed(gradients: list[Tensor]) -> list[Tensor]:
    """The same, next to each other in memory: scattered, they would keep the room of the pass that made them."""
    if not gradients:
        return []
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    parts = flat.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]


class _HandOn(torch.autograd.Function):
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
