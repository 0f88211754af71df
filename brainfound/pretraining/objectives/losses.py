"""The losses of the objectives, as pure functions.

`sinkhorn_knopp` and `cross_entropy` take scores as tensors, or as the `Projection` of a head, whose scores are
computed piece by piece (`prototypes`), with the same result. Sums are float32 or wider, also under autocast: bfloat16
loses the small differences that these losses depend on.

Axis legend: ``B`` images (rows), ``N`` rows of any kind, ``P`` patch tokens, ``D`` width, ``K`` prototypes.

Sources: DINO (arXiv 2104.14294), iBOT (2111.07832), SwAV (2006.09882, appendix A.1) for Sinkhorn-Knopp, KoLeo
(1806.03198, section 3.3), DINOv2 (2304.07193, section 4) for their combination, DINOv3 (2508.10104, section 4.2).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from brainfound.pretraining.objectives.prototypes import (
    Assignments,
    Projection,
    cross_entropy_sum,
    equal_mass,
    exponentials_in_place,
    sinkhorn_assign,
)

KOLEO_EPS = 1e-8
# Below this distance between two unit vectors the gradient of log(distance) stops growing: rounding
# of float32 unit vectors is near 1e-7, so steeper gradients would be noise that drowns the batch.
KOLEO_STEEPEST_DISTANCE = 1e-3


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@overload
def sinkhorn_knopp(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor: ...
@overload
def sinkhorn_knopp(logits: Projection, temperature: float, num_iterations: int = 3) -> Assignments: ...
@torch.no_grad()
def sinkhorn_knopp(
    logits: Float[Tensor, "B K"] | Projection, temperature: float, num_iterations: int = 3
) -> Float[Tensor, "B K"] | Assignments:
    """Teacher targets: assignments of rows to prototypes that use all prototypes equally.

    Starting from ``exp(logits / temperature)``, each iteration scales the prototypes, over the rows of all ranks, and
    then the rows to equal mass; rows of the result sum to 1. A ValueError if a setting is not positive.

    Source: SwAV, appendix A.1, in the order of DINOv2 (prototypes first).
    """
    if temperature <= 0 or num_iterations < 1:
        raise ValueError(f"temperature {temperature} and num_iterations {num_iterations} must be positive")
    if isinstance(logits, Projection):
        return sinkhorn_assign(logits, temperature, num_iterations)
    scores = at_least_float32(logits) / temperature
    with torch.autocast(scores.device.type, enabled=False):
        row_scale = exponentials_in_place(scores)
        return equal_mass(scores, row_scale, num_iterations).take(slice(None))


def cross_entropy(
    student_logits: Float[Tensor, "N K"] | Projection,
    teacher_probs: Float[Tensor, "M K"] | Assignments,
    temperature: float,
    weights: Float[Tensor, "N"] | None = None,
    target_rows: Int[Tensor, "N targets"] | None = None,
) -> Float[Tensor, "N"] | Float[Tensor, ""]:
    """−Σₖ teacher · log softmax(student / temperature) (DINO, equation 2).

    Args:
        weights: None gives one value per row, (N,), otherwise the result is their weighted sum.
        target_rows: for each row those of `teacher_probs` whose cross-entropies are added; None: row i with target i.
    """
    if isinstance(student_logits, Projection) and isinstance(teacher_probs, Assignments) and weights is not None:
        return cross_entropy_sum(student_logits, teacher_probs, weights, temperature, target_rows)
    logits = student_logits.scores() if isinstance(student_logits, Projection) else student_logits
    probs = teacher_probs.take(slice(None)) if isinstance(teacher_probs, Assignments) else teacher_probs
    # Cross-entropy is linear in the target.
    probs = probs if target_rows is None else probs[target_rows].sum(dim=1)
    log_probs = F.log_softmax(at_least_float32(logits) / temperature, dim=-1)
    rows = -(probs * log_probs).sum(dim=-1)
    return rows if weights is None else (rows * weights).sum()


def koleo(
    embeddings: Float[Tensor, "B D"], groups: Int[Tensor, "B"] | None = None, in_float32: bool = True
) -> Float[Tensor, ""]:
    """Spread L2-normalised embeddings over the sphere: −mean log distance to the nearest neighbour.

    Args:
        groups: rows of one group (such as slices of one session) are never neighbours, because pushing near-duplicates
            apart tears the features. Rows without an admissible neighbour are left out; without any row the loss is 0.
        in_float32: False leaves the search for neighbours to autocast, as published code does.

    Source: Sablayrolles et al. 2019, equation 2, in the form of DINOv2 (neighbour by dot product).
    """
    with torch.autocast(embeddings.device.type, enabled=False) if in_float32 else nullcontext():
        unit = F.normalize(at_least_float32(embeddings) if in_float32 else embeddings, dim=-1, eps=KOLEO_EPS)
        with torch.no_grad():
            similarity = unit @ unit.T
            groups = torch.arange(len(unit), device=unit.device) if groups is None else groups
            excluded = groups[:, None] == groups[None, :]
            similarity.masked_fill_(excluded, float("-inf"))
            counted = ~excluded.all(dim=1)
            neighbour = similarity.argmax(dim=1) if len(unit) else counted.long()
        distance = torch.linalg.vector_norm(unit - unit[neighbour], dim=-1)
        steepness = ((distance.detach() + KOLEO_EPS) / KOLEO_STEEPEST_DISTANCE).clamp(max=1)
        distance = distance.detach() + (distance - distance.detach()) * steepness
        # A weighted mean, not indexing: the number of counted rows stays on the device.
        spread = (distance + KOLEO_EPS).log() * counted
        return -spread.sum() / counted.sum().clamp(min=1)


def gram_loss(student: Float[Tensor, "N P D"], anchor: Float[Tensor, "N P D"]) -> Float[Tensor, ""]:
    """Mean squared difference between the Gram matrices (P, P) of L2-normalised patch tokens (DINOv3, equation 2)."""
    with torch.autocast(student.device.type, enabled=False):
        student = F.normalize(at_least_float32(student), dim=-1)
        anchor = F.normalize(at_least_float32(anchor), dim=-1)
        return F.mse_loss(student @ student.mT, anchor @ anchor.mT)


def cosine_loss(student: Float[Tensor, "N D"], anchor: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """1 − mean cosine between matching rows."""
    return 1 - F.cosine_similarity(at_least_float32(student), at_least_float32(anchor), dim=-1).mean()
