"""Slices → volume: padding, order, any number of slices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfound.models import BrainFoundConfig
from brainfound.models.aggregators import AGGREGATORS, num_heads_for, sinusoidal_positions

WIDTH = 24


def make(name):
    torch.manual_seed(3)
    backbone = {"model_type": "dinov2", "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    aggregator = AGGREGATORS[name](BrainFoundConfig(backbone_config=backbone, aggregator_layers=2))
    with torch.no_grad():
        for parameter in aggregator.parameters():
            parameter.normal_(std=0.3)
    return aggregator.eval()


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(list(AGGREGATORS)),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    more=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_neither_content_nor_amount_nor_place_of_padding_changes_a_bit(name, counts, more, seed):
    aggregator = make(name)
    generator = torch.Generator().manual_seed(seed)
    num_slices = max(counts) + more
    mask = torch.zeros(len(counts), num_slices, dtype=torch.bool)
    slices = torch.full((len(counts), num_slices, WIDTH), float("nan"))
    positions = torch.full((len(counts), num_slices), float("nan"))
    alone = []
    with torch.no_grad():
        for row, count in enumerate(counts):
            places = torch.randperm(num_slices, generator=generator)[:count].sort().values
            volume = torch.randn(count, WIDTH, generator=generator)
            where = torch.randn(count, generator=generator).sort().values * 60
            mask[row, places], slices[row, places], positions[row, places] = True, volume, where
            alone.append((volume, where))
        together = aggregator(slices, mask, positions)
        for row, count in enumerate(counts):
            # Volumes with equal numbers of slices are pooled as one batch, so their peers come along.
            peers = [index for index, other in enumerate(counts) if other == count]
            expected = aggregator(
                torch.stack([alone[index][0] for index in peers]),
                None,
                torch.stack([alone[index][1] for index in peers]),
            )
            assert torch.equal(together.embedding[row], expected.embedding[peers.index(row)])
    if together.weights is not None:
        torch.testing.assert_close(together.weights.sum(dim=1), torch.ones(len(counts)))
        assert not together.weights[~mask].any()


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("num_slices", [1, 2, 33, 180])
def test_any_number_of_slices(name, num_slices):
    with torch.no_grad():
        embedding = make(name)(torch.randn(2, num_slices, WIDTH)).embedding
    assert embedding.shape == (2, WIDTH * make(name).num_statistics)
    assert embedding.isfinite().all()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_slices_may_come_in_any_order_with_their_positions(name):
    aggregator, slices, order = make(name), torch.randn(1, 7, WIDTH), torch.randperm(7)
    positions = torch.linspace(-30, 30, 7)[None]
    with torch.no_grad():
        expected = aggregator(slices, None, positions).embedding
        torch.testing.assert_close(aggregator(slices[:, order], None, positions[:, order]).embedding, expected)


def test_only_the_transformer_sees_positions():
    slices = torch.randn(1, 7, WIDTH)
    near, far = torch.linspace(-3, 3, 7)[None], torch.linspace(-30, 30, 7)[None]
    for name in AGGREGATORS:
        aggregator = make(name)
        with torch.no_grad():
            same = torch.allclose(aggregator(slices, None, near).embedding, aggregator(slices, None, far).embedding)
        assert same == (name != "transformer")


@settings(max_examples=20, deadline=None)
@given(num_slices=st.integers(2, 60), spacing_mm=st.sampled_from([0.5, 1.0, 3.0, 6.5]), seed=st.integers(0, 99))
def test_the_order_of_slices_matters_to_the_transformer_alone(num_slices, spacing_mm, seed):
    """Other slices at the same places: another anatomy for the transformer, the same set for all others."""
    generator = torch.Generator().manual_seed(seed)
    slices = torch.randn(1, num_slices, WIDTH, generator=generator)
    positions = ((torch.arange(num_slices) - (num_slices - 1) / 2) * spacing_mm)[None]
    for name in AGGREGATORS:
        aggregator = make(name)
        with torch.no_grad():
            upright, upside_down = aggregator(slices, None, positions), aggregator(slices.flip(1), None, positions)
        same = torch.allclose(upright.embedding, upside_down.embedding, atol=1e-5)
        assert same == (name != "transformer")
        if upright.weights is not None and name != "transformer":
            torch.testing.assert_close(upright.weights, upside_down.weights.flip(1))


def test_thin_and_thick_slices_of_one_place_agree():
    """Positions in mm: every second of the thin slices at its own place is what thick slices are."""
    aggregator, slices = make("transformer"), torch.randn(1, 1, WIDTH).expand(-1, 81, -1)
    thin = torch.linspace(-40, 40, 81)[None]
    with torch.no_grad():
        whole = aggregator(slices, None, thin).embedding
        by_mm = aggregator(slices[:, ::2], None, thin[:, ::2]).embedding
        by_number = aggregator(slices[:, ::2], None, None).embedding
    assert (by_mm - whole).norm() < 0.3 * (by_number - whole).norm()


def test_positions_default_to_a_centred_millimetre():
    aggregator, slices = make("transformer"), torch.randn(1, 3, WIDTH)
    with torch.no_grad():
        given_positions = aggregator(slices, None, torch.tensor([[-1.0, 0.0, 1.0]])).embedding
        assert torch.equal(aggregator(slices).embedding, given_positions)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_autocast_rounds_no_aggregator(name):
    """What subjects share is rounded by more than what tells them apart."""
    slices = torch.randn(1, 1, WIDTH) + 0.001 * torch.randn(4, 9, WIDTH)
    aggregator = make(name)
    with torch.no_grad():
        plain = aggregator(slices).embedding
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = aggregator(slices).embedding
    torch.testing.assert_close(mixed, plain, rtol=0, atol=0)


def test_the_mean_is_the_mean():
    slices, mask = torch.randn(2, 5, WIDTH), torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]]).bool()
    aggregation = make("mean")(slices, mask)
    torch.testing.assert_close(aggregation.embedding[0], slices[0, [0, 2, 3]].mean(dim=0))
    torch.testing.assert_close(aggregation.embedding[1], slices[1, 4])
    torch.testing.assert_close(aggregation.weights[0], torch.tensor([1, 0, 1, 1, 0]) / 3)


def test_the_max_is_the_largest_of_the_valid_slices():
    slices, mask = torch.randn(2, 5, WIDTH), torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]]).bool()
    aggregation = make("max")(slices.masked_fill(~mask[..., None], 99.0), mask)
    assert torch.equal(aggregation.embedding[0], slices[0, [0, 2, 3]].max(dim=0).values)
    assert torch.equal(aggregation.embedding[1], slices[1, 4])
    assert aggregation.weights is None
    assert not list(make("max").parameters())


def test_weights_of_the_transformer_sum_to_one_and_pass_no_gradient():
    """What they are is held against the formula in the tests of explanations."""
    slices = torch.randn(3, 6, WIDTH, requires_grad=True)
    weights = make("transformer")(slices).weights
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    assert (weights >= 0).all()
    assert (weights.amax(dim=1) > weights.amin(dim=1)).all()
    assert not weights.requires_grad


def test_attention_weights_make_the_embedding():
    slices = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        aggregation = make("attention")(slices)
    torch.testing.assert_close(aggregation.embedding, (aggregation.weights[..., None] * slices).sum(dim=1))
    assert aggregation.weights.std() > 0


@pytest.mark.parametrize(
    ("width", "heads"), [(32, 1), (50, 1), (96, 1), (130, 2), (200, 2), (384, 6), (768, 12), (1024, 16), (1536, 24)]
)
def test_heads_are_about_64_wide_and_divide_the_width(width, heads):
    assert num_heads_for(width) == heads


def test_positions_are_sines_and_cosines_from_4_mm_to_1_m_and_differ():
    positions = np.arange(-90.0, 91.0)
    codes = sinusoidal_positions(torch.tensor(positions)[None], 25)[0]
    wavelengths = 4.0 * 250.0 ** (np.arange(13) / 12)
    angles = 2 * np.pi * positions[:, None] / wavelengths
    expected = np.concatenate([np.sin(angles), np.cos(angles)[:, :12]], axis=1)
    np.testing.assert_allclose(codes.numpy(), expected, atol=1e-4)
    assert torch.cdist(codes, codes).add(torch.eye(181) * 9).min() > 0.1


def test_statistics_are_concatenated_and_padding_is_none_of_them():
    slices, mask = torch.randn(1, 5, WIDTH), torch.tensor([[1, 0, 1, 1, 0]]).bool()
    embedding = make("mean_std_max")(slices, mask).embedding
    valid = slices[0, [0, 2, 3]]
    expected = torch.cat([valid.mean(dim=0), valid.std(dim=0, correction=0), valid.amax(dim=0)])
    torch.testing.assert_close(embedding[0], expected)
    single = torch.randn(1, 1, WIDTH, requires_grad=True)
    make("mean_std")(single).embedding.sum().backward()
    assert single.grad.isfinite().all()
