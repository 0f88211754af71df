"""The losses against the published formulas, written slowly in numpy and double precision.

Each reference below is the formula of a paper, read row by row, and shares no code and no trick with
`brainfound.pretraining.objectives.losses`: Sinkhorn-Knopp divides the whole table by its sum first and knows the number
of rows; the cross-entropies are sums over prototypes; KoLeo looks at every pair; a gradient is the
derivative by hand. The losses are asked in float32 (to 1e-5) and in float64 (to 1e-9).

Sources: SwAV (arXiv 2006.09882, appendix A.1) and DINOv2 (2304.07193, section 4) for Sinkhorn-Knopp,
DINO (2104.14294, equations 2 and 3), iBOT (2111.07832, equation 2), KoLeo (1806.03198, section 3.3),
DINOv3 (2508.10104, section 4.2) for the Gram loss.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainfound.pretraining.objectives import losses

PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])


def draw(*shape: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Numbers that are the same in float32 and float64."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32).astype(np.float64)


def cosines(rows: int, prototypes: int, seed: int) -> np.ndarray:
    """Scores as a head gives them: between -1 and 1, but spread wider than those of a random head."""
    return np.clip(draw(rows, prototypes, seed=seed, scale=0.4), -1, 1)


def same(result: torch.Tensor, expected: np.ndarray | float, tolerance: float) -> None:
    scale = float(np.abs(expected).max()) if np.size(expected) else 1.0
    np.testing.assert_allclose(result.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance * scale)


def probabilities(scores: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp(scores / temperature - (scores / temperature).max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def published_sinkhorn(scores: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """The table of all rows, prototypes first, with the total mass divided out before the first iteration."""
    rows, prototypes = scores.shape
    table = np.exp(scores.T / temperature)
    table /= table.sum()
    for _ in range(iterations):
        for k in range(prototypes):
            table[k] /= table[k].sum() * prototypes
        for b in range(rows):
            table[:, b] /= table[:, b].sum() * rows
    return (table * rows).T


def published_cross_entropy(student: np.ndarray, target: np.ndarray, temperature: float) -> float:
    """H(target, student) of one row."""
    scaled = student / temperature
    peak = scaled.max()
    log_total = peak + np.log(np.exp(scaled - peak).sum())
    return float(sum(t * (log_total - s) for t, s in zip(target, scaled, strict=True)))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows**2).sum(axis=-1, keepdims=True))


# Sinkhorn-Knopp


@PRECISIONS
@pytest.mark.parametrize("iterations", [1, 3, 5])
@pytest.mark.parametrize(("rows", "prototypes"), [(1, 4), (3, 17), (40, 7), (24, 300)])
@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_sinkhorn_is_that_of_the_paper(rows, prototypes, iterations, temperature, dtype, tolerance):
    scores = cosines(rows, prototypes, seed=rows)
    result = losses.sinkhorn_knopp(torch.tensor(scores, dtype=dtype), temperature, iterations)
    assert result.dtype == dtype
    same(result, published_sinkhorn(scores, temperature, iterations), tolerance)


def test_sinkhorn_of_no_rows_is_no_rows():
    assert losses.sinkhorn_knopp(torch.zeros(0, 5), 0.05).shape == (0, 5)


def test_sinkhorn_does_not_see_the_order_of_rows():
    """The teacher's two crops may be swapped before or after."""
    scores = torch.tensor(cosines(10, 6, seed=1), dtype=torch.float64)
    whole = losses.sinkhorn_knopp(scores, 0.05)
    swapped = losses.sinkhorn_knopp(scores.roll(5, 0), 0.05)
    torch.testing.assert_close(swapped, whole.roll(5, 0), rtol=1e-12, atol=1e-14)


# DINO


def published_dino(student_global, student_local, teacher, temperature) -> tuple[float, float]:
    """Every pair of different crops with a teacher's global crop, as one mean over pairs and images."""
    num_local, num_images = len(student_local), student_global.shape[1]
    pairs = 2 + 2 * num_local
    crossed = local = 0.0
    for image in range(num_images):
        for crop in (0, 1):
            other = teacher[1 - crop, image]
            crossed += published_cross_entropy(student_global[crop, image], other, temperature)
            for small in range(num_local):
                local += published_cross_entropy(student_local[small, image], teacher[crop, image], temperature)
    return crossed / (pairs * num_images), local / (pairs * num_images)


def dino_parts(student_global, student_local, teacher, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """As self-distillation asks for it: rows crop by crop, the teacher's other crop or both of them as targets."""
    num_local, num_images = len(student_local), student_global.shape[1]
    share = 1 / ((2 + 2 * num_local) * num_images)
    targets, image = teacher.flatten(0, 1), torch.arange(num_images)
    both = torch.stack((image, image + num_images), dim=1)
    parts = []
    for rows, target_rows in (
        (student_global.flatten(0, 1), torch.cat((image + num_images, image))[:, None]),
        (student_local.flatten(0, 1), both.repeat(num_local, 1)),
    ):
        weights = rows.new_full((len(rows),), share)
        parts.append(losses.cross_entropy(rows, targets, temperature, weights, target_rows))
    return parts[0], parts[1]


@PRECISIONS
@pytest.mark.parametrize("num_local", [0, 1, 3, 8])
def test_dino_loss_and_its_gradient(num_local, dtype, tolerance):
    images, prototypes, temperature = 5, 23, 0.1
    student_global = np.clip(draw(2, images, prototypes, seed=2, scale=0.3), -1, 1)
    student_local = np.clip(draw(num_local, images, prototypes, seed=3, scale=0.3), -1, 1)
    # A teacher whose two crops differ much, so that a loss that is not swapped would be another number.
    teacher = probabilities(draw(2, images, prototypes, seed=4, scale=2), 1.0)
    large = torch.tensor(student_global, dtype=dtype, requires_grad=True)
    small = torch.tensor(student_local, dtype=dtype, requires_grad=True)
    parts = dino_parts(large, small, torch.tensor(teacher, dtype=dtype), temperature)
    expected = published_dino(student_global, student_local, teacher, temperature)
    for part, value in zip(parts, expected, strict=True):
        same(part, value, tolerance)
    unswapped = published_dino(student_global, student_local, teacher[::-1], temperature)
    assert abs(unswapped[0] - expected[0]) > 100 * tolerance

    (parts[0] + parts[1]).backward()
    scale = 1 / ((2 + 2 * num_local) * images * temperature)
    own = probabilities(student_global, temperature)
    same(large.grad, (own - teacher[::-1]) * scale, tolerance)
    if num_local:
        own = probabilities(student_local, temperature)
        same(small.grad, (2 * own - teacher.sum(axis=0)) * scale, tolerance)


# iBOT


@PRECISIONS
def test_ibot_loss_is_the_mean_over_crops_of_the_mean_over_their_masked_tokens(dtype, tolerance):
    """The published form: per crop, the sum of mask · H over the mask's size; a crop without a mask counts as 0."""
    prototypes, temperature = 19, 0.1
    mask = np.zeros((6, 12), dtype=bool)
    for crop, count in enumerate([0, 1, 5, 12, 0, 3]):
        mask[crop, np.random.default_rng(crop).permutation(12)[:count]] = True
    scores = np.clip(draw(6, 12, prototypes, seed=5, scale=0.4), -1, 1)
    targets = probabilities(draw(6, 12, prototypes, seed=6), 1.0)
    expected, gradient = 0.0, np.zeros_like(scores)
    for crop in range(6):
        for patch in range(12):
            if mask[crop, patch]:
                row, target = scores[crop, patch], targets[crop, patch]
                weight = 1 / max(mask[crop].sum(), 1) / 6
                expected += weight * published_cross_entropy(row, target, temperature)
                gradient[crop, patch] = weight * (probabilities(row, temperature) - target) / temperature
    weights = (1 / np.maximum(mask.sum(axis=1), 1))[:, None].repeat(12, axis=1)[mask]
    rows = torch.tensor(scores[mask], dtype=dtype, requires_grad=True)
    loss = losses.cross_entropy(
        rows, torch.tensor(targets[mask], dtype=dtype), temperature, torch.tensor(weights, dtype=dtype) / 6
    )
    same(loss, expected, tolerance)
    loss.backward()
    same(rows.grad, gradient[mask], tolerance)


def test_ibot_loss_of_no_masked_token_is_zero():
    rows = torch.zeros(0, 5, requires_grad=True)
    loss = losses.cross_entropy(rows, torch.zeros(0, 5), 0.1, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0


# KoLeo


def published_koleo(embeddings: np.ndarray, groups: np.ndarray) -> tuple[float, np.ndarray]:
    """−mean log distance to the nearest admissible neighbour, and its gradient, pair by pair.

    A row is moved by its own term and by the terms of those that have it as their neighbour.
    """
    unit = unit_rows(embeddings)
    num = len(unit)
    nearest = {}
    for i in range(num):
        others = [j for j in range(num) if groups[j] != groups[i]]
        if others:
            nearest[i] = min(others, key=lambda j: np.linalg.norm(unit[i] - unit[j]))
    if not nearest:
        return 0.0, np.zeros_like(embeddings)
    total, by_unit = 0.0, np.zeros_like(unit)
    for i, j in nearest.items():
        difference = unit[i] - unit[j]
        distance = np.linalg.norm(difference)
        total -= np.log(distance + 1e-8) / len(nearest)
        pull = difference / (distance * (distance + 1e-8)) / len(nearest)
        by_unit[i] -= pull
        by_unit[j] += pull
    # Through the normalisation: what is along the row is lost.
    along = (by_unit * unit).sum(axis=1, keepdims=True) * unit
    return total, (by_unit - along) / np.linalg.norm(embeddings, axis=1, keepdims=True)


@PRECISIONS
@pytest.mark.parametrize(
    "groups",
    [range(9), [0, 0, 0, 1, 1, 2, 3, 4, 4], [0, 0, 0, 0, 0, 0, 0, 0, 1], [5] * 9],
    ids=["apart", "sessions", "one against all", "one session"],
)
def test_koleo_and_its_gradient(groups, dtype, tolerance):
    embeddings = draw(9, 5, seed=7, scale=3)
    groups = np.array(list(groups))
    expected, gradient = published_koleo(embeddings, groups)
    rows = torch.tensor(embeddings, dtype=dtype, requires_grad=True)
    loss = losses.koleo(rows, torch.tensor(groups))
    loss.backward()
    same(loss, expected, tolerance)
    same(rows.grad, gradient, tolerance)


@PRECISIONS
def test_koleo_without_groups_excludes_only_the_row_itself(dtype, tolerance):
    embeddings = draw(7, 4, seed=8)
    expected, _ = published_koleo(embeddings, np.arange(7))
    same(losses.koleo(torch.tensor(embeddings, dtype=dtype)), expected, tolerance)


def test_koleo_differs_from_the_published_gradient_only_below_its_steepest_distance():
    """Two rows at 2e-3 follow the formula; at 1e-5 the value does, and the gradient is a hundredth of it."""
    base = unit_rows(draw(1, 6, seed=9))
    across = unit_rows(draw(1, 6, seed=10))
    for gap, share in ((2e-3, 1.0), (1e-5, 1e-5 / losses.KOLEO_STEEPEST_DISTANCE)):
        embeddings = np.concatenate([base, base + gap * across])
        expected, gradient = published_koleo(embeddings, np.arange(2))
        distance = np.linalg.norm(np.diff(unit_rows(embeddings), axis=0))
        share = min(share, distance / losses.KOLEO_STEEPEST_DISTANCE)
        rows = torch.tensor(embeddings, requires_grad=True)
        loss = losses.koleo(rows)
        loss.backward()
        same(loss, expected, 1e-9)
        same(rows.grad, gradient * share, 2e-3)


# The anchors


@PRECISIONS
def test_gram_loss_and_its_gradient(dtype, tolerance):
    student, anchor = draw(3, 7, 5, seed=11, scale=2), draw(3, 7, 5, seed=12)
    expected, gradient = 0.0, np.zeros_like(student)
    for n in range(3):
        own, other = unit_rows(student[n]), unit_rows(anchor[n])
        for i in range(7):
            for j in range(7):
                gap = own[i] @ own[j] - other[i] @ other[j]
                expected += gap**2 / (3 * 7 * 7)
                by_unit = 4 * gap * own[j] / (3 * 7 * 7)
                gradient[n, i] += (by_unit - (by_unit @ own[i]) * own[i]) / np.linalg.norm(student[n, i])
    rows = torch.tensor(student, dtype=dtype, requires_grad=True)
    loss = losses.gram_loss(rows, torch.tensor(anchor, dtype=dtype))
    loss.backward()
    same(loss, expected, tolerance)
    same(rows.grad, gradient, tolerance)


@PRECISIONS
def test_cosine_loss_and_its_gradient(dtype, tolerance):
    student, anchor = draw(6, 5, seed=13, scale=2), draw(6, 5, seed=14)
    own, other = unit_rows(student), unit_rows(anchor)
    expected = 1 - np.mean([a @ b for a, b in zip(own, other, strict=True)])
    along = (own * other).sum(axis=1, keepdims=True) * own
    rows = torch.tensor(student, dtype=dtype, requires_grad=True)
    loss = losses.cosine_loss(rows, torch.tensor(anchor, dtype=dtype))
    loss.backward()
    same(loss, expected, tolerance)
    same(rows.grad, -(other - along) / np.linalg.norm(student, axis=1, keepdims=True) / 6, tolerance)
