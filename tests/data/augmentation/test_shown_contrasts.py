"""Which contrasts the views of a slice show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brainfound.data.augmentation import contrast_masks, drop_contrasts

PRESENT = torch.tensor([[True, True, True], [True, False, False], [False, True, True], [True, True, True]])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_contrasts_drop_but_never_all_and_never_appear():
    present = PRESENT[:3].repeat(200, 1)
    kept = drop_contrasts(present, 0.5, seeded(0))
    assert (kept <= present).all()
    assert kept.any(dim=1).all()
    share = kept[present].float().mean()
    # Three contrasts keep 1 + 2 · ½ of 3, two keep 1 + ½ of 2, one keeps itself.
    assert float(share) == pytest.approx(0.75, abs=0.03)
    assert torch.equal(drop_contrasts(present, 0.0, seeded(0)), present)


@given(
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4).filter(any), min_size=1, max_size=12),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.4]),
)
def test_split_views_are_disjoint_and_never_empty(rows, seed, dropout):
    present = torch.tensor(rows)
    large, local = contrast_masks(present, 5, dropout, 1.0, seeded(seed))
    several = present.sum(dim=1) >= 2
    first, second = large.unbind(dim=1)
    assert not (first & second)[several].any()
    assert torch.equal(first[~several], present[~several])
    assert torch.equal(second[~several], present[~several])
    for shown in (first, second, *local.unbind(dim=1)):
        assert shown.any(dim=1).all()
        assert (shown <= present).all()
    if dropout == 0:
        assert torch.equal(first | second, present)


def test_every_division_and_every_local_subset_has_its_turn():
    present = torch.ones(400, 3, dtype=torch.bool)
    large, local = contrast_masks(present, 2, 0.0, 1.0, seeded(0))
    assert len({tuple(row) for row in large[:, 0].int().tolist()}) == 6  # all but none and all
    assert len({tuple(row) for row in local.flatten(0, 1).int().tolist()}) == 7  # all but none
    sizes = local.sum(dim=2).flatten().bincount(minlength=4)[1:] / 800
    assert sizes.tolist() == pytest.approx([1 / 3] * 3, abs=0.06)


def test_the_asked_part_is_split_and_the_rest_shows_everything():
    present = PRESENT.repeat(20, 1)
    large, local = contrast_masks(present, 3, 0.0, 0.5, seeded(1))
    is_split = (large[:, 0] != present).any(dim=1)
    assert int(is_split.sum()) == 30  # half of those with two or more
    assert torch.equal(large[~is_split, 1], present[~is_split])
    assert torch.equal(local[~is_split], present[~is_split, None].expand(-1, 3, -1))
    assert (local[is_split] != present[is_split, None]).any()
    none, _ = contrast_masks(present, 3, 0.0, 0.0, seeded(1))
    assert torch.equal(none, present[:, None].expand(-1, 2, -1))
