"""The kernels of the losses over prototypes, which `losses` calls: exact, without materialising all scores.

Axis legend: ``N`` rows (crops or masked tokens), ``D`` width in front of the prototypes, ``K`` prototypes.

With 65,536 prototypes a row of scores is 256 KiB, and a batch has thousands of rows: one copy per operation would cost
more time than the backbone's attention and most of the memory. Instead, Sinkhorn-Knopp keeps the exponentials once and
only scales rows and columns, and cross-entropy, ``mass · lse(s) − ⟨t, s⟩`` with the gradient ``softmax(s) · mass − t``,
needs a few rows of scores at a time; gradients are computed in the forward pass, so nothing is computed twice.

Sources of the methods: see `losses`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from brainfound.models.block_runner import compute_dtype
from brainfound.training import distributed

# Size of the scores of one product: enough rows to be worth reading all prototypes.
_PIECE_BYTES = {"cpu": 64 * 2**20}
_PIECE_BYTES_ELSEWHERE = 512 * 2**20
# Size of the blocks of its rows that all other operations work on: one pass over memory instead of a dozen.
_BLOCK_BYTES = {"cpu": 2**20}
# exp(−80) is still a normal float32; cosines over a temperature span 2 / temperature.
_SAFE_SPAN = 80.0
_MIN_NORM = 1e-12
_ROWS_IN_CACHE = 4096


def normalise_rows(weight: Float[Tensor, "K D"]) -> Float[Tensor, "K D"]:
    """`torch.nn.functional.normalize` over rows, with a gradient that costs a third and needs one new tensor."""
    return _NormaliseRows.apply(weight)


class _NormaliseRows(torch.autograd.Function):
    """The gradient of w / |w| is (g − w ⟨g, w⟩ / |w|²) / |w|."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(weight, dim=-1, keepdim=True).clamp_min_(_MIN_NORM)
        ctx.save_for_backward(weight, length)
        return weight / length

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        weight, length = ctx.saved_tensors
        result = torch.empty_like(gradient)
        size = _ROWS_IN_CACHE if gradient.device.type == "cpu" else max(1, len(gradient))
        parts = zip(*(part.split(size) for part in (gradient, weight, length, result)), strict=True)
        for gradient_rows, weight_rows, length_rows, result_rows in parts:
            along = (gradient_rows * weight_rows).sum(dim=-1, keepdim=True) / length_rows.square()
            torch.addcmul(gradient_rows, weight_rows, along, value=-1, out=result_rows).div_(length_rows)
        return result


class Projection(NamedTuple):
    """Embeddings through a projection head, and the prototypes, both with rows of length 1."""

    unit: Float[Tensor, "N D"]
    prototypes: Float[Tensor, "K D"]

    def scores(self) -> Float[Tensor, "N K"]:
        """All cosines at once, for a few rows."""
        return self.unit @ self.prototypes.T


@dataclass(frozen=True)
class Assignments:
    """Targets ``diag(row_scale) · mass · diag(prototype_scale)``, whose rows sum to 1."""

    mass: Float[Tensor, "N K"]
    row_scale: Float[Tensor, "N"]
    prototype_scale: Float[Tensor, "K"]

    def take(self, rows: slice | Int[Tensor, "n"], out: Float[Tensor, "n K"] | None = None) -> Float[Tensor, "n K"]:
        """The targets of some rows, written into `out` if it is given."""
        if isinstance(rows, slice):
            chosen = torch.mul(self.mass[rows], self.prototype_scale, out=out)
        else:
            chosen = torch.index_select(self.mass, 0, rows, out=out).mul_(self.prototype_scale)
        return chosen.mul_(self.row_scale[rows, None])

    def part(self, rows: slice) -> Assignments:
        """The assignments of some rows, without a copy."""
        return Assignments(self.mass[rows], self.row_scale[rows], self.prototype_scale)


def _product_chunks(num_rows: int, num_prototypes: int, device: torch.device) -> list[slice]:
    """Ranges of rows whose scores are computed as one product."""
    return _slices(num_rows, _PIECE_BYTES.get(device.type, _PIECE_BYTES_ELSEWHERE) // (4 * num_prototypes))


def _blocks(rows: slice, num_prototypes: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Blocks of a piece that fit into cache: their range among all rows, and within the piece."""
    for within in _slices(rows.stop - rows.start, _block_rows(num_prototypes, device)):
        yield slice(rows.start + within.start, rows.start + within.stop), within


def _block_rows(num_prototypes: int, device: torch.device) -> int:
    return max(1, _BLOCK_BYTES.get(device.type, _PIECE_BYTES_ELSEWHERE) // (4 * num_prototypes))


def _slices(count: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@torch.no_grad()
def sinkhorn_assign(projection: Projection, temperature: float, num_iterations: int = 3) -> Assignments:
    """`losses.sinkhorn_knopp` of a projection's scores, over the rows of all ranks."""
    unit, prototypes = projection
    dtype = compute_dtype(unit)
    wide = torch.promote_types(unit.dtype, torch.float32)
    with torch.autocast(unit.device.type, enabled=False):
        transposed = prototypes.to(dtype).T
        scaled = (unit / temperature).to(dtype)
        mass = torch.empty(len(unit), len(prototypes), dtype=wide, device=unit.device)
        # A constant shift keeps the exponentials of cosines finite, unless the temperature is very low.
        is_safe = 2 / temperature <= _SAFE_SPAN
        pieces = _product_chunks(len(mass), len(prototypes), mass.device)
        longest = max((rows.stop - rows.start for rows in pieces), default=0)
        buffer = _empty_scores(0 if dtype == wide else longest, prototypes, dtype)
        for rows in pieces:
            scores = mass[rows] if dtype == wide else buffer[: rows.stop - rows.start]
            torch.mm(scaled[rows], transposed, out=scores)
            for block, within in _blocks(rows, len(prototypes), mass.device):
                part = mass[block]
                if dtype != wide:
                    part.copy_(scores[within])
                if is_safe:
                    part.sub_(1 / temperature).exp_()
        row_scale = mass.new_ones(len(mass)) if is_safe else exponentials_in_place(mass)
        return equal_mass(mass, row_scale, num_iterations)


def exponentials_in_place(scores: Float[Tensor, "N K"]) -> Float[Tensor, "N"]:
    """Replace scores by their exponentials, up to factors of rows and prototypes; returns the row factors.

    Each prototype's maximum (cancels in the first scaling) and then each row's (in the result) is subtracted, so no sum
    is zero or overflows.
    """
    # A rank without rows still takes part in the maximum.
    floor = scores.new_full((scores.shape[1],), float("-inf"))
    scores.sub_(distributed.max_over_ranks(scores.amax(dim=0) if len(scores) else floor))
    highest = scores.amax(dim=1) if len(scores) else scores.new_zeros(0)
    scores.sub_(highest[:, None]).exp_()
    return highest.exp()


def equal_mass(mass: Float[Tensor, "N K"], row_scale: Float[Tensor, "N"], num_iterations: int) -> Assignments:
    """Alternately scale the prototypes, over the rows of all ranks, and the rows to equal mass."""
    for _ in range(num_iterations):
        prototype_mass = distributed.sum_over_ranks(row_scale @ mass)
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
    """Σᵢ weightᵢ · Σⱼ CE(targets of row ``target_rows[i, j]``, softmax(scoresᵢ / temperature)), in one pass."""
    return _CrossEntropySum.apply(*projection, targets, weights, temperature, target_rows)


class _CrossEntropySum(torch.autograd.Function):
    """Computes the gradients for unit vectors and prototypes in the forward pass."""

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
        with torch.autocast(unit.device.type, enabled=False):
            columns, scaled, weights = prototypes.to(dtype), (unit / temperature).to(dtype), weights.to(wide)
            total = torch.zeros((), dtype=wide, device=unit.device)
            wants_unit, wants_prototypes = ctx.needs_input_grad[:2]
            unit_gradient = torch.zeros_like(unit, dtype=wide) if wants_unit else None
            prototype_gradient = torch.zeros_like(prototypes, dtype=wide) if wants_prototypes else None
            pieces = _product_chunks(len(unit), len(prototypes), unit.device)
            longest = max((rows.stop - rows.start for rows in pieces), default=0)
            buffer = _empty_scores(longest, prototypes, dtype)
            num_targets = 1 if target_rows is None else target_rows.shape[1]
            block_rows = min(longest, _block_rows(len(prototypes), unit.device))
            workspace = _Workspace.of(prototypes, block_rows, wide, num_targets, dtype != wide)
            for rows in pieces:
                scores = buffer[: rows.stop - rows.start]
                torch.mm(scaled[rows], columns.T, out=scores)
                for block, within in _blocks(rows, len(prototypes), unit.device):
                    chosen = block if target_rows is None else target_rows[block]
                    losses = _cross_entropy(
                        scores[within], targets, chosen, weights[block], workspace, wants_unit or wants_prototypes
                    )
                    total += (weights[block] * losses).sum()
                # The scores are gradients now.
                if unit_gradient is not None:
                    unit_gradient[rows] = (scores @ columns).to(wide) / temperature
                if prototype_gradient is not None:
                    _add_product(prototype_gradient, scores.T, scaled[rows])
        pairs = ((unit_gradient, unit), (prototype_gradient, prototypes))
        ctx.save_for_backward(*(None if part is None else part.to(like.dtype) for part, like in pairs))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = [None if part is None else part * gradient for part in ctx.saved_tensors]
        return *gradients, None, None, None, None


def _cross_entropy(
    scores: Float[Tensor, "n K"],
    targets: Assignments,
    target_rows: slice | Int[Tensor, "n targets"],
    weights: Float[Tensor, "n"],
    workspace: _Workspace,
    wants_gradient: bool,
) -> Float[Tensor, "n"]:
    """The cross-entropy of each row, summed over its targets; overwrites `scores` with their gradient, if wanted."""
    columns = [target_rows] if isinstance(target_rows, slice) else target_rows.unbind(dim=1)
    wide = scores if workspace.scores is None else workspace.scores[: len(scores)].copy_(scores)
    target = targets.take(columns[0], out=workspace.target[: len(scores)])
    for column in columns[1:]:
        target += targets.take(column, out=workspace.extra_target[: len(scores)])
    agreement = torch.linalg.vecdot(target, wide)
    highest = wide.amax(dim=1, keepdim=True)
    exponentials = wide.sub_(highest).exp_()
    partition = exponentials.sum(dim=1, keepdim=True)
    if wants_gradient:
        weight = weights[:, None]
        gradient = exponentials.mul_(weight * len(columns) / partition).addcmul_(target, -weight)
        if gradient is not scores:
            scores.copy_(gradient)
    return len(columns) * (highest + partition.log())[:, 0] - agreement


class _Workspace(NamedTuple):
    """Memory for one block of rows, reused: fresh pages cost as much as writing to them."""

    scores: Tensor | None
    """None if the scores are wide enough already."""
    target: Tensor
    extra_target: Tensor

    @classmethod
    def of(cls, prototypes: Tensor, rows: int, wide: torch.dtype, num_targets: int, is_narrow: bool) -> _Workspace:
        return cls(
            _empty_scores(rows, prototypes, wide) if is_narrow else None,
            _empty_scores(rows, prototypes, wide),
            _empty_scores(rows if num_targets > 1 else 0, prototypes, wide),
        )


def _empty_scores(rows: int, prototypes: Tensor, dtype: torch.dtype) -> Tensor:
    return prototypes.new_empty((rows, len(prototypes)), dtype=dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a copy of the product where types allow."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
