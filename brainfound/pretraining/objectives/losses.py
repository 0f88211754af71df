"""The losses of self-distillation, as pure functions.

Axis legend: ``B`` images (rows), ``N`` rows of any kind, ``P`` patch tokens, ``D`` width,
``K`` prototypes, ``L`` local crops, ``M`` masked patch tokens.

Sources: DINO (arXiv 2104.14294), iBOT (2111.07832), SwAV (2006.09882, appendix A.1) for
Sinkhorn-Knopp, KoLeo (1806.03198, section 3.3), DINOv2 (2304.07193, section 4) for their
combination, DINOv3 (2508.10104, section 4.2) for the Gram loss.

Everything here is computed in float32 or wider, also under autocast: a bfloat16 Sinkhorn or a
bfloat16 nearest-neighbour distance loses the small differences that these losses live on.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from brainfound.training import distributed as ranks

KOLEO_EPS = 1e-8
# Below this distance between two unit vectors the gradient of log(distance) stops growing: rounding
# of float32 unit vectors is near 1e-7, so steeper gradients would be noise that drowns the batch.
KOLEO_STEEPEST_DISTANCE = 1e-3


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor in float32, or float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@torch.no_grad()
def sinkhorn_knopp(logits: Float[Tensor, "B K"], temperature: float, num_iterations: int = 3) -> Float[Tensor, "B K"]:
    """Teacher targets: assignments of rows to prototypes that use all prototypes equally.

    Starting from ``exp(logits / temperature)``, each iteration scales the prototypes to equal
    mass, then the rows to equal mass; rows of the result sum to 1. The batch is that of all ranks:
    the mass of a prototype is summed over them. Without a process group it is the local batch.

    It is computed as scaling vectors, ``diag(r) E diag(c)``, with E written once. Subtracting each
    prototype's maximum and then each row's maximum from the logits is exact, because the first
    cancels in the first scaling and the second is carried in ``r``; with it no sum can be zero
    or overflow, whatever the logits.

    Raises:
        ValueError: if the temperature or the number of iterations is not positive.

    Source: SwAV, appendix A.1, in the order of DINOv2 (prototypes first).
    """
    if temperature <= 0 or num_iterations < 1:
        raise ValueError(f"temperature {temperature} and num_iterations {num_iterations} must be positive")
    scores = at_least_float32(logits) / temperature
    num_rows, num_prototypes = scores.shape
    with torch.autocast(scores.device.type, enabled=False):
        # A rank without rows still takes part in the sums.
        floor = torch.full((num_prototypes,), float("-inf"), dtype=scores.dtype, device=scores.device)
        highest = scores.amax(dim=0) if num_rows else floor
        scores = scores - ranks.max_over_ranks(highest)
        row_highest = scores.amax(dim=1) if num_rows else scores.new_zeros(0)
        assignments = (scores - row_highest[:, None]).exp_()
        row_scale = row_highest.exp()
        for _ in range(num_iterations):
            prototype_mass = ranks.sum_over_ranks(row_scale @ assignments)
            # The mean cancels in the row scaling; it keeps the scales near 1 over many iterations.
            prototype_scale = prototype_mass.mean() / prototype_mass
            row_scale = 1 / (assignments @ prototype_scale)
        return assignments.mul_(prototype_scale).mul_(row_scale[:, None])


def cross_entropy(
    student_logits: Float[Tensor, "N K"], teacher_probs: Float[Tensor, "N K"], temperature: float
) -> Float[Tensor, "N"]:
    """−Σₖ teacher · log softmax(student / temperature), one value per row (DINO, equation 2)."""
    log_probs = F.log_softmax(at_least_float32(student_logits) / temperature, dim=-1)
    return -(teacher_probs * log_probs).sum(dim=-1)


def koleo(
    embeddings: Float[Tensor, "B D"], groups: Int[Tensor, "B"] | None = None, in_float32: bool = True
) -> Float[Tensor, ""]:
    """Spread embeddings over the sphere: −mean log distance to the nearest neighbour.

    Args:
        embeddings: any length; they are L2-normalised here.
        groups: rows of one group (slices of one session, say) are never neighbours, because pushing
            near-duplicates apart tears the features. A row without any admissible neighbour is
            left out; if that leaves nothing, the loss is 0.
        in_float32: False leaves the search for neighbours to autocast, as published code that loses it there does.

    Duplicates are finite: the distance has ``1e-8`` added, and below a distance of ``1e-3`` the
    gradient stops growing (the value does not change).

    Source: Sablayrolles et al. 2019, equation 2, in the form of DINOv2 (neighbour by dot product).
    """
    with torch.autocast(embeddings.device.type, enabled=False) if in_float32 else nullcontext():
        unit = F.normalize(at_least_float32(embeddings) if in_float32 else embeddings, dim=-1, eps=KOLEO_EPS)
        with torch.no_grad():
            similarity = unit @ unit.T
            if groups is None:
                excluded = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
            else:
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


def dino_loss(
    student_global: Float[Tensor, "2 B K"],
    student_local: Float[Tensor, "L B K"],
    teacher_probs: Float[Tensor, "2 B K"],
    temperature: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The CLS loss as its (global, local) parts; their sum is the mean over all 2 + 2·L pairs of crops.

    The teacher's crops are swapped for the global part: crop A of the student answers crop B of the
    teacher. Every local crop answers both (DINO, equation 3; normalised as in DINOv2).
    """
    num_local = student_local.shape[0]
    num_pairs = 2 + 2 * num_local
    crossed = [
        cross_entropy(student, teacher, temperature).mean()
        for student, teacher in zip(student_global, teacher_probs.flip(0), strict=True)
    ]
    global_part = torch.stack(crossed).sum() / num_pairs
    if not num_local:
        return global_part, global_part.new_zeros(())
    # Cross-entropy is linear in the target: the sum over both teacher crops needs one pass.
    both = teacher_probs.sum(dim=0)
    local = torch.stack([cross_entropy(student, both, temperature).mean() for student in student_local])
    return global_part, local.sum() / num_pairs


def ibot_loss(
    student_logits: Float[Tensor, "M K"],
    teacher_probs: Float[Tensor, "M K"],
    weights: Float[Tensor, "M"],
    num_crops: int,
    temperature: float,
) -> Float[Tensor, ""]:
    """The masked-patch loss: each token weighted by 1 / (masked tokens of its crop), summed, divided by the crops."""
    return (cross_entropy(student_logits, teacher_probs, temperature) * weights).sum() / num_crops


def gram_loss(student: Float[Tensor, "N P D"], anchor: Float[Tensor, "N P D"]) -> Float[Tensor, ""]:
    """Mean squared difference between the Gram matrices (P, P) of L2-normalised patch tokens (DINOv3, equation 2)."""
    with torch.autocast(student.device.type, enabled=False):
        student = F.normalize(at_least_float32(student), dim=-1)
        anchor = F.normalize(at_least_float32(anchor), dim=-1)
        return F.mse_loss(student @ student.mT, anchor @ anchor.mT)


def cosine_loss(student: Float[Tensor, "N D"], anchor: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """1 − mean cosine between matching rows."""
    return 1 - F.cosine_similarity(at_least_float32(student), at_least_float32(anchor), dim=-1).mean()
