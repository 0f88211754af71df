"""Properties of the losses; `test_exactness_losses.py` compares them with the published formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfound.pretraining.objectives import losses


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


def test_koleo_of_duplicates_is_finite_with_a_bounded_gradient():
    base = torch.randn(1, 8, generator=torch.Generator().manual_seed(4))
    for spread in (0.0, 1e-7, 1e-5):
        noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(5)) * spread
        embeddings = (base.repeat(4, 1) + noise).requires_grad_()
        loss = losses.koleo(embeddings)
        loss.backward()
        assert torch.isfinite(loss)
        assert embeddings.grad.norm() <= 4 / losses.KOLEO_STEEPEST_DISTANCE


def test_koleo_left_to_autocast_mistakes_near_neighbours():
    """Rows that differ by less than bfloat16 can tell: float32 finds the nearest, and the other does not."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, 16, generator=generator) + 1e-3 * torch.randn(40, 16, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact, left = losses.koleo(embeddings), losses.koleo(embeddings, in_float32=False)
    assert exact == losses.koleo(embeddings, in_float32=False)  # outside autocast there is nothing to be lost
    assert left < exact - 0.1  # a wrong neighbour is farther


def test_rows_may_have_several_targets():
    generator = torch.Generator().manual_seed(8)
    student, teacher = torch.randn(4, 5, generator=generator), torch.randn(3, 5, generator=generator).softmax(dim=-1)
    rows, weights = torch.tensor([[0, 1], [1, 2], [2, 2], [0, 2]]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = sum(losses.cross_entropy(student, teacher[rows[:, j]], 0.1) for j in (0, 1))
    torch.testing.assert_close(losses.cross_entropy(student, teacher, 0.1, target_rows=rows), expected)
    torch.testing.assert_close(losses.cross_entropy(student, teacher, 0.1, weights, rows), (expected * weights).sum())
