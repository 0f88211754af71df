"""The losses in pieces against the plain ones, which are tested against the published formulas."""

import pytest
import torch
import torch.nn.functional as F

from brainfound.pretraining.objectives import losses
from brainfound.pretraining.objectives import prototypes as prototype_losses
from brainfound.pretraining.objectives.losses import cross_entropy, sinkhorn_knopp
from brainfound.pretraining.objectives.networks import backward_per_pass
from brainfound.pretraining.objectives.prototypes import Assignments, Projection, normalise_rows


def projection(num_rows, seed, num_prototypes=37, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows, prototypes = (torch.randn(n, width, generator=generator).to(dtype) for n in (num_rows, num_prototypes))
    return Projection(F.normalize(rows, dim=1), F.normalize(prototypes, dim=1))


@pytest.fixture(params=[(None, None), (3, 3), (5, 2)], ids=["one piece", "pieces of three rows", "blocks of two"])
def piece_rows(request, monkeypatch):
    piece, block = request.param
    if piece:
        monkeypatch.setitem(prototype_losses._PIECE_BYTES, "cpu", piece * 4 * 37)
        monkeypatch.setitem(prototype_losses._BLOCK_BYTES, "cpu", block * 4 * 37)


@pytest.mark.usefixtures("piece_rows")
@pytest.mark.parametrize("temperature", [0.07, 0.04, 0.01, 0.002])
@pytest.mark.parametrize("num_iterations", [1, 3, 20])
def test_assignments_are_sinkhorn_knopp(temperature, num_iterations):
    found = sinkhorn_knopp(projection(11, 0), temperature, num_iterations).take(slice(None))
    expected = losses.sinkhorn_knopp(projection(11, 0).scores(), temperature, num_iterations)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=2e-4)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(11))


def test_assignments_of_no_rows_are_empty():
    assert sinkhorn_knopp(projection(0, 0), 0.05).take(slice(None)).shape == (0, 37)


@pytest.mark.usefixtures("piece_rows")
@pytest.mark.parametrize("crossed", [False, True])
def test_cross_entropy_and_both_gradients(crossed):
    targets = sinkhorn_knopp(projection(6, 1), 0.05)
    dense = targets.take(slice(None))
    rows = torch.tensor([[0, 3], [1, 4], [2, 5], [0, 3], [5, 5], [4, 0]]) if crossed else None
    weights = torch.rand(6, generator=torch.Generator().manual_seed(2))
    fused, plain = (Projection(*(part.clone().requires_grad_() for part in projection(6, 3))) for _ in range(2))
    found = cross_entropy(fused, targets, 0.1, weights, rows)
    wanted = dense if rows is None else dense[rows].sum(dim=1)
    expected = (losses.cross_entropy(plain.scores(), wanted, 0.1) * weights).sum()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # One value per row, and plain tensors with weights and rows of targets.
    torch.testing.assert_close((cross_entropy(plain, targets, 0.1, target_rows=rows) * weights).sum(), expected)
    torch.testing.assert_close(cross_entropy(plain.scores(), dense, 0.1, weights, rows), expected)
    for value in (found, expected):
        (value * 0.7).backward()
    for mine, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5)


def test_gradients_in_double_precision_by_finite_differences():
    targets = sinkhorn_knopp(projection(4, 1, dtype=torch.float64), 0.05)
    weights = torch.tensor([0.1, 0.5, 0.2, 0.9], dtype=torch.float64)
    parts = [part.requires_grad_() for part in projection(4, 3, dtype=torch.float64)]

    def value(unit, prototypes):
        return cross_entropy(Projection(unit, prototypes), targets, 0.1, weights)

    assert torch.autograd.gradcheck(value, parts)


def test_under_autocast_scores_are_narrow_and_sums_wide():
    targets, weights = sinkhorn_knopp(projection(6, 1), 0.05), torch.full((6,), 1 / 6)
    fused = Projection(*(part.clone().requires_grad_() for part in projection(6, 3)))
    expected = cross_entropy(fused, targets, 0.1, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cross_entropy(fused, targets, 0.1, weights)
        narrow = sinkhorn_knopp(projection(6, 1), 0.05)
    assert found.dtype == narrow.mass.dtype == torch.float32
    assert found.item() != expected.item()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    found.backward()
    assert fused.unit.grad.dtype == torch.float32


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(prototype_losses, "_add_product", refuse)
    targets = Assignments(torch.rand(6, 37), torch.ones(6), torch.ones(37))
    cross_entropy(projection(6, 3), targets, 0.1, torch.ones(6))


def test_early_gradients_are_those_of_the_backward_pass():
    torch.manual_seed(0)
    layer, unused = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    first, second = torch.randn(4, 3), torch.randn(5, 3)
    everything = [*layer.parameters(), *unused.parameters()]
    other, third = torch.nn.Linear(3, 2), torch.randn(5, 3)
    everything += other.parameters()
    (layer(first).square().sum() * 0.3 + (layer(third) * other(third)).sum() * 0.3).backward()
    layer(second).exp().sum().backward()
    expected_of_other = other.weight.grad.clone()
    expected = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    other.zero_grad()
    # The second reaches parameters that the first did not.
    values = [lambda: layer(first).square().sum(), lambda: (layer(third) * other(third)).sum()]
    early = backward_per_pass(values, everything)
    torch.testing.assert_close(early, layer(first).square().sum() + (layer(third) * other(third)).sum())
    (early * 0.3 + layer(second).exp().sum()).backward()
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch.testing.assert_close(other.weight.grad, expected_of_other)
    assert unused.weight.grad is None


def test_early_gradients_free_what_they_needed():
    kept = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            ctx.save_for_backward(value)
            kept.append(1)
            return value * 2

        @staticmethod
        def backward(ctx, gradient):
            kept.pop()
            return gradient * 2

    weight = torch.nn.Parameter(torch.ones(2))
    value = backward_per_pass([lambda: Watched.apply(weight).sum()], [weight])
    assert not kept
    value.backward()
    assert weight.grad.tolist() == [2, 2]
    with torch.no_grad():
        assert not backward_per_pass([lambda: weight.sum()], [weight]).requires_grad
    constant = backward_per_pass([lambda: torch.ones((), requires_grad=True) * 2], [weight])
    assert constant.item() == 2


def test_unit_rows_are_those_of_normalize():
    torch.manual_seed(0)
    weight = torch.randn(37, 5, dtype=torch.float64) * torch.logspace(-3, 3, 37, dtype=torch.float64)[:, None]
    weight = weight.requires_grad_()
    gradient = torch.randn_like(weight)
    expected = F.normalize(weight, dim=-1)
    assert torch.equal(normalise_rows(weight), expected)
    (wanted,) = torch.autograd.grad(expected, weight, gradient)
    (found,) = torch.autograd.grad(normalise_rows(weight), weight, gradient)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(normalise_rows, weight[15:20].detach().requires_grad_())


def test_unit_rows_in_pieces(monkeypatch):
    weight, gradient = torch.randn(10, 3, requires_grad=True), torch.randn(10, 3)
    (whole,) = torch.autograd.grad(normalise_rows(weight), weight, gradient)
    monkeypatch.setattr(prototype_losses, "_ROWS_IN_CACHE", 4)
    (pieces,) = torch.autograd.grad(normalise_rows(weight), weight, gradient)
    assert torch.equal(whole, pieces)
