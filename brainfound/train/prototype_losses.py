"""The losses over prototypes, computed in pieces: what `brainfound.train.losses` defines, without its traffic.

Axis legend: ``N`` rows (crops or masked tokens), ``D`` width in front of the prototypes, ``K`` prototypes.

With 65,536 prototypes a row of scores is 256 KiB, and a batch has thousands of rows: written down once per
operation, they cost more time than the backbone's attention and most of the memory. Both losses can do
without, exactly:

- Sinkhorn-Knopp only ever scales rows and columns. `Assignments` holds the exponentials once, and two vectors.
- Prototypes are brought to length 1 once per pass; the gradient of that, written out, needs one new tensor of their
  size in place of eight.
- Cross-entropy is ``mass · lse(s) − ⟨t, s⟩`` and its gradient ``softmax(s) · mass − t``; both follow from a few rows
  of scores at a time, which are forgotten at once. Gradients are computed in the forward pass, so nothing is
  computed twice.

The parity with the plain formulas is tested; sources of the methods are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from brainfound.models.blocks import compute_dtype
from brainfound.train import ranks

_PIECE_BYTES = {"cpu": 64 * 2**20}
_PIECE_BYTES_ELSEWHERE = 512 * 2**20
# exp() of anything above −80 is an ordinary float32; cosines over a temperature span 2 / temperature.
_SAFE_SPAN = 80.0
_SHORTEST = 1e-12  # that a row is divided by
_ROWS_IN_CACHE = 4096


def unit_rows(weight: Float[Tensor, "K D"]) -> Float[Tensor, "K D"]:
    """Rows at length 1, as `torch.nn.functional.normalize` makes them, with a gradient that costs a third."""
    return _UnitRows.apply(weight)


class _UnitRows(torch.autograd.Function):
    """The gradient of w / |w| is (g − w ⟨g, w⟩ / |w|²) / |w|."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(weight, dim=-1, keepdim=True).clamp_min_(_SHORTEST)
        ctx.save_for_backward(weight, length)
        return weight / length

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        weight, length = ctx.saved_tensors
        found = torch.empty_like(gradient)
        size = _ROWS_IN_CACHE if gradient.device.type == "cpu" else max(1, len(gradient))
        parts = zip(*(part.split(size) for part in (gradient, weight, length, found)), strict=True)
        for of_gradient, of_weight, of_length, of_found in parts:
            along = (of_gradient * of_weight).sum(dim=-1, keepdim=True) / of_length.square()
            torch.addcmul(of_gradient, of_weight, along, value=-1, out=of_found).div_(of_length)
        return found


class Projection(NamedTuple):
    """What a head makes of embeddings; the scores are the cosines ``unit @ prototypes.T``."""

    unit: Float[Tensor, "N D"]
    """Rows of length 1."""
    prototypes: Float[Tensor, "K D"]
    """Rows of length 1."""

    def scores(self) -> Float[Tensor, "N K"]:
        """All scores at once: for a few rows."""
        return self.unit @ self.prototypes.T


@dataclass(frozen=True)
class Assignments:
    """Targets ``diag(row_scale) · mass · diag(prototype_scale)``, whose rows sum to 1."""

    mass: Float[Tensor, "N K"]
    row_scale: Float[Tensor, "N"]
    prototype_scale: Float[Tensor, "K"]

    def take(self, rows: slice | Int[Tensor, "n"]) -> Float[Tensor, "n K"]:
        """The targets of some rows."""
        return (self.mass[rows] * self.prototype_scale).mul_(self.row_scale[rows, None])

    def part(self, rows: slice) -> Assignments:
        """Those of some rows; the masses are not copied."""
        return Assignments(self.mass[rows], self.row_scale[rows], self.prototype_scale)


def _pieces(num_rows: int, num_prototypes: int, device: torch.device) -> list[slice]:
    """Rows that are worked on together."""
    size = max(1, _PIECE_BYTES.get(device.type, _PIECE_BYTES_ELSEWHERE) // (4 * num_prototypes))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


@torch.no_grad()
def assign(projection: Projection, temperature: float, num_iterations: int = 3) -> Assignments:
    """Sinkhorn-Knopp of a projection's scores, as `losses.sinkhorn_knopp` defines it, over the rows of all ranks.

    The shift that keeps exponentials finite is a constant, since scores are cosines; where the temperature is
    so low that a constant would not do, each prototype's and each row's maximum is used, as the definition does.
    """
    unit, prototypes = projection
    dtype = compute_dtype(unit)
    wide = torch.promote_types(unit.dtype, torch.float32)
    with torch.autocast(unit.device.type, enabled=False):
        transposed = prototypes.to(dtype).T
        scaled = (unit / temperature).to(dtype)
        mass = torch.empty(len(unit), len(prototypes), dtype=wide, device=unit.device)
        is_safe = 2 / temperature <= _SAFE_SPAN
        for rows in _pieces(len(mass), len(prototypes), mass.device):
            piece = mass[rows]
            if dtype == wide:
                torch.mm(scaled[rows], transposed, out=piece)
            else:
                piece.copy_(scaled[rows] @ transposed)
            if is_safe:
                piece.sub_(1 / temperature).exp_()
        row_scale = torch.ones(len(mass), dtype=wide, device=mass.device)
        if not is_safe:
            # A rank without rows still takes part in the maximum.
            floor = mass.new_full((mass.shape[1],), float("-inf"))
            mass.sub_(ranks.max_over_ranks(mass.amax(dim=0) if len(mass) else floor))
            highest = mass.amax(dim=1) if len(mass) else mass.new_zeros(0)
            mass.sub_(highest[:, None]).exp_()
            row_scale = highest.exp()
        for _ in range(num_iterations):
            prototype_mass = ranks.sum_over_ranks(row_scale @ mass)
            # The mean cancels in the row scaling; it keeps the scales near 1 over many iterations.
            prototype_scale = prototype_mass.mean() / prototype_mass
            row_scale = 1 / (mass @ prototype_scale)
    return Assignments(mass, row_scale, prototype_scale)


def cross_entropy_sum(
    projection: Projection,
    targets: Assignments,
    weights: Float[Tensor, "N"],
    temperature: float,
    target_rows: Int[Tensor, "N targets"] | None = None,
) -> Float[Tensor, ""]:
    """Σᵢ weightᵢ · Σⱼ CE(targets of row ``target_rows[i, j]``, softmax(scoresᵢ / temperature)).

    Cross-entropy is linear in the target, so a row that answers several targets needs one pass.

    Args:
        weights: of the rows.
        target_rows: for each row the rows of `targets` that it answers; None: row i answers target i.
    """
    return _CrossEntropySum.apply(*projection, targets, weights, temperature, target_rows)


class _CrossEntropySum(torch.autograd.Function):
    """With gradients for the unit vectors and the prototypes, made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        prototypes: Tensor,
        targets: Assignments,
        weights: Tensor,
        temperature: float,
        target_rows: Tensor | None,
    ) -> Tensor:
        dtype = compute_dtype(unit)
        wide = torch.promote_types(unit.dtype, torch.float32)
        num_targets = 1 if target_rows is None else target_rows.shape[1]
        with torch.autocast(unit.device.type, enabled=False):
            columns, scaled, weights = prototypes.to(dtype), (unit / temperature).to(dtype), weights.to(wide)
            total = torch.zeros((), dtype=wide, device=unit.device)
            wants_unit, wants_prototypes = ctx.needs_input_grad[:2]
            unit_gradient = torch.zeros_like(unit, dtype=wide) if wants_unit else None
            prototype_gradient = torch.zeros_like(prototypes, dtype=wide) if wants_prototypes else None
            for rows in _pieces(len(unit), len(prototypes), unit.device):
                scores = (scaled[rows] @ columns.T).to(wide)
                target = targets.take(rows if target_rows is None else target_rows[rows, 0])
                for column in range(1, num_targets):
                    target += targets.take(target_rows[rows, column])  # type: ignore[index]
                weight = weights[rows, None]
                agreement = torch.linalg.vecdot(target, scores)
                highest = scores.amax(dim=1, keepdim=True)
                exponentials = scores.sub_(highest).exp_()
                partition = exponentials.sum(dim=1, keepdim=True)
                total += (weights[rows] * (num_targets * (highest + partition.log())[:, 0] - agreement)).sum()
                if not (wants_unit or wants_prototypes):
                    continue
                gradient = exponentials.mul_(weight * num_targets / partition).addcmul_(target, -weight).to(dtype)
                if unit_gradient is not None:
                    unit_gradient[rows] = (gradient @ columns).to(wide) / temperature
                if prototype_gradient is not None:
                    _add_product(prototype_gradient, gradient.T, scaled[rows])
        ctx.save_for_backward(
            *(
                None if part is None else part.to(like.dtype)
                for part, like in ((unit_gradient, unit), (prototype_gradient, prototypes))
            )
        )
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        found = [None if part is None else part * gradient for part in ctx.saved_tensors]
        return *found, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a copy of the product where types allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
