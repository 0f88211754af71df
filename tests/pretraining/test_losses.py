"""The losses against loops that follow the published formulas, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfound.pretraining.objectives import losses


def sinkhorn_by_loops(logits: torch.Tensor, temperature: float, num_iterations: int) -> torch.Tensor:
    scores = torch.exp(logits.double() / temperature)
    num_rows, num_prototypes = scores.shape
    total = float(scores.sum())
    table = [[float(scores[b, k]) / total for k in range(num_prototypes)] for b in range(num_rows)]
    for _ in range(num_iterations):
        for k in range(num_prototypes):
            mass = sum(table[b][k] for b in range(num_rows))
            for b in range(num_rows):
                table[b][k] /= mass * num_prototypes
        for b in range(num_rows):
            mass = sum(table[b])
            table[b] = [value / (mass * num_rows) for value in table[b]]
    return torch.tensor(table, dtype=torch.float64) * num_rows


@pytest.mark.parametrize(
    ("rows", "prototypes", "scale", "temperature"), [(6, 9, 0.3, 0.05), (4, 3, 1.0, 0.07), (1, 5, 1, 1)]
)
@pytest.mark.parametrize("num_iterations", [1, 3, 5])
def test_sinkhorn_equals_the_published_loop(rows, prototypes, scale, temperature, num_iterations):
    logits = torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(rows)) * scale
    expected = sinkhorn_by_loops(logits, temperature, num_iterations)
    result = losses.sinkhorn_knopp(logits, temperature, num_iterations)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(result.sum(dim=1), torch.ones(rows))


def test_sinkhorn_balances_prototypes_where_softmax_does_not():
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += 3
    balanced = losses.sinkhorn_knopp(logits, 0.5, 50).sum(dim=0)
    torch.testing.assert_close(balanced, torch.full((8,), 8.0), atol=1e-2, rtol=0)
    assert torch.softmax(logits / 0.5, dim=1).sum(dim=0)[0] > 40


@settings(max_examples=40, deadline=None)
@given(st.floats(-4e4, 4e4), st.floats(0.1, 1e4), st.integers(0, 10_000))
def test_sinkhorn_is_finite_for_any_logits(offset, scale, seed):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) * scale
    logits[2] += offset
    result = losses.sinkhorn_knopp(logits, 0.04)
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result.sum(dim=1), torch.ones(5), atol=1e-4, rtol=0)


def test_sinkhorn_refuses_what_cannot_be_meant():
    for arguments in ((0.0, 3), (0.1, 0)):
        with pytest.raises(ValueError, match="must be positive"):
            losses.sinkhorn_knopp(torch.zeros(2, 2), *arguments)


def test_cross_entropy_and_its_gradient():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 11, generator=generator, requires_grad=True)
    probs = torch.softmax(torch.randn(5, 11, generator=generator), dim=1)
    result = losses.cross_entropy(logits, probs, 0.1)
    for n in range(5):
        scaled = [float(value) / 0.1 for value in logits.detach()[n]]
        peak = max(scaled)
        log_total = peak + math.log(sum(math.exp(value - peak) for value in scaled))
        expected = -sum(float(p) * (s - log_total) for p, s in zip(probs[n], scaled, strict=True))
        assert result[n].item() == pytest.approx(expected, rel=1e-5)
    result.sum().backward()
    torch.testing.assert_close(
        logits.grad, (torch.softmax(logits.detach() / 0.1, dim=1) - probs) / 0.1, atol=1e-5, rtol=1e-5
    )


def koleo_by_loops(embeddings: torch.Tensor, groups: list[int] | None) -> float:
    rows = [[float(v) for v in row] for row in embeddings.double()]
    unit = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]
    logs = []
    for i, row in enumerate(unit):
        others = [j for j in range(len(unit)) if j != i and (groups is None or groups[j] != groups[i])]
        if others:
            nearest = max(others, key=lambda j: sum(a * b for a, b in zip(row, unit[j], strict=True)))
            logs.append(math.log(math.dist(row, unit[nearest]) + 1e-8))
    return -sum(logs) / len(logs)


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 1, 2, 2, 3, 0], [0, 0, 0, 0, 0, 0, 0, 1]])
def test_koleo_equals_loops(groups):
    embeddings = torch.randn(8, 6, generator=torch.Generator().manual_seed(2)) * 3
    result = losses.koleo(embeddings, None if groups is None else torch.tensor(groups))
    assert float(result) == pytest.approx(koleo_by_loops(embeddings, groups), rel=1e-5)


def test_koleo_never_pairs_within_a_group():
    """Two near-duplicates of one session would dominate; as a group they do not see each other."""
    embeddings = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    embeddings[1] = embeddings[0] + 1e-4
    groups = torch.tensor([0, 0, 1, 2, 3, 4])
    assert losses.koleo(embeddings) > losses.koleo(embeddings, groups) + 1
    one_group = losses.koleo(embeddings, torch.zeros(6, dtype=torch.long))
    assert float(one_group) == 0


def test_koleo_of_duplicates_is_finite_with_a_bounded_gradient():
    base = torch.randn(1, 8, generator=torch.Generator().manual_seed(4))
    for spread in (0.0, 1e-7, 1e-5):
        noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(5)) * spread
        embeddings = (base.repeat(4, 1) + noise).requires_grad_()
        loss = losses.koleo(embeddings)
        loss.backward()
        assert torch.isfinite(loss)
        assert embeddings.grad.norm() <= 4 / losses.KOLEO_STEEPEST_DISTANCE


def test_koleo_gradient_is_that_of_the_formula_away_from_duplicates():
    embeddings = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6), requires_grad=True)
    assert torch.autograd.gradcheck(losses.koleo, (embeddings,), eps=1e-6, atol=1e-5)


def test_koleo_left_to_autocast_mistakes_near_neighbours():
    """Rows that differ by less than bfloat16 can tell: float32 finds the nearest, and the other does not."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, 16, generator=generator) + 1e-3 * torch.randn(40, 16, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact, left = losses.koleo(embeddings), losses.koleo(embeddings, in_float32=False)
    assert exact == losses.koleo(embeddings, in_float32=False)  # outside autocast there is nothing to be lost
    assert left < exact - 0.1  # a wrong neighbour is farther


def test_koleo_is_float32_under_autocast():
    embeddings = torch.randn(8, 16, generator=torch.Generator().manual_seed(7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.koleo(embeddings), losses.koleo(embeddings.clone()))
        inside = losses.koleo(embeddings)
    assert torch.equal(inside, losses.koleo(embeddings))


def test_rows_may_have_several_targets():
    generator = torch.Generator().manual_seed(8)
    student, teacher = torch.randn(4, 5, generator=generator), torch.randn(3, 5, generator=generator).softmax(dim=-1)
    rows, weights = torch.tensor([[0, 1], [1, 2], [2, 2], [0, 2]]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = sum(losses.cross_entropy(student, teacher[rows[:, j]], 0.1) for j in (0, 1))
    torch.testing.assert_close(losses.cross_entropy(student, teacher, 0.1, target_rows=rows), expected)
    torch.testing.assert_close(losses.cross_entropy(student, teacher, 0.1, weights, rows), (expected * weights).sum())


def test_weights_of_masks_count_every_crop_alike():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(9))
    probs = torch.softmax(logits * 0.3, dim=1)
    per_token = losses.cross_entropy(logits, probs, 0.1)
    weights = torch.tensor([1.0, 0.25, 0.25, 0.25, 0.25])  # one crop with one masked token, one with four
    expected = (per_token[0] + per_token[1:].mean()) / 3  # and one without any
    torch.testing.assert_close(losses.cross_entropy(logits, probs, 0.1, weights / 3), expected)


def test_gram_and_cosine_losses():
    generator = torch.Generator().manual_seed(10)
    student, anchor = torch.randn(2, 4, 6, generator=generator), torch.randn(2, 4, 6, generator=generator)
    expected = 0.0
    for n in range(2):
        for i in range(4):
            for j in range(4):
                cosines = [torch.cosine_similarity(x[n, i], x[n, j], dim=0) for x in (student, anchor)]
                expected += float((cosines[0] - cosines[1]) ** 2) / (2 * 16)
    assert float(losses.gram_loss(student, anchor)) == pytest.approx(expected, rel=1e-4)
    assert float(losses.gram_loss(student, student * 3)) == pytest.approx(0, abs=1e-10)
    assert float(losses.cosine_loss(student[0], -student[0])) == pytest.approx(2)
