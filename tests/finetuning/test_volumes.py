"""Which slices a training volume shows, and how it is varied."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brainfound.data.augmentation import IntensityRecipe
from brainfound.data.batches import VolumeBatch
from brainfound.finetuning.volumes import (
    VolumeAugmentation,
    VolumeReader,
    augment_volumes,
    sample_contiguous_slices,
    sample_foreground_slices,
    sample_jittered_slices,
)
from brainfound.training.randomness import StepKey

KEY = StepKey(seed=0, step=3, micro_batch=0, rank=0)
QUIET = IntensityRecipe(gamma_probability=0, contrast_probability=0, blur_probability=0, noise_probability=0)
STRONG = VolumeAugmentation(rotation_degrees=30, scale=0.2, shear=0.1, contrast_dropout=0, intensity=QUIET)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 1000))
def test_one_slice_of_each_stretch(num_slices, wanted, seed):
    index = sample_jittered_slices(num_slices, wanted, np.random.default_rng(seed))
    if wanted >= num_slices:
        assert index.tolist() == list(range(num_slices))
        return
    assert len(index) == wanted
    # A slice on the edge of two stretches may be drawn for both.
    assert (np.diff(index) >= 0).all()
    edges = np.arange(wanted + 1) * num_slices / wanted
    assert ((index >= np.floor(edges[:-1])) & (index < np.ceil(edges[1:]))).all()


def test_every_slice_has_its_turn():
    rng = np.random.default_rng(0)
    seen = np.concatenate([sample_jittered_slices(10, 4, rng) for _ in range(200)])
    assert set(seen) == set(range(10))


@given(st.floats(0, 1), st.integers(1, 12), st.integers(0, 1000))
def test_the_requested_share_shows_the_structure(share, wanted, seed):
    mask = np.zeros((20, 4, 4), dtype=np.uint8)
    mask[[3, 4, 11], 1, 1] = 2
    index = sample_foreground_slices(mask, wanted, share, np.random.default_rng(seed))
    assert len(index) == wanted
    assert (np.diff(index) >= 0).all()
    assert np.isin(index, [3, 4, 11]).sum() >= round(wanted * share)
    empty = sample_foreground_slices(np.zeros_like(mask), wanted, share, np.random.default_rng(seed))
    assert len(empty) == wanted


@given(st.floats(0, 1), st.integers(1, 25), st.integers(0, 1000))
def test_a_run_of_slices_has_no_gap_and_stays_inside(share, wanted, seed):
    mask = np.zeros((20, 4, 4), dtype=np.uint8)
    mask[[3, 4, 19], 1, 1] = 2
    rng = np.random.default_rng(seed)
    for content in (mask, np.zeros_like(mask)):
        index = sample_contiguous_slices(content, wanted, share, rng)
        assert len(index) == min(wanted, 20)
        assert (np.diff(index) == 1).all()
        assert index[0] >= 0
        assert index[-1] < 20
    assert np.isin(sample_contiguous_slices(mask, wanted, 1.0, rng), [3, 4, 19]).any()


def test_every_place_of_a_run_has_its_turn():
    rng = np.random.default_rng(0)
    seen = np.concatenate([sample_contiguous_slices(np.zeros((10, 2, 2)), 3, 0.5, rng) for _ in range(300)])
    assert set(seen) == set(range(10))


def test_neighbours_may_be_requested_from_a_reader(small_store):
    batch, sessions = VolumeReader(small_store, [1, 5], 3, 1.0, neighbours=True).read([1, 0], KEY)
    for row, session in enumerate(sessions):
        own = small_store[int(session)].positions_mm
        place = int(np.flatnonzero(np.isclose(own, float(batch.positions_mm[row, 0])))[0])
        np.testing.assert_allclose(batch.positions_mm[row], own[place : place + 3])
        assert batch.masks[row].any()


def test_runs_meet_the_structure_as_often_as_requested():
    mask = np.zeros((100, 2, 2), dtype=np.uint8)
    mask[40] = 1
    rng = np.random.default_rng(0)
    met = np.mean([mask[sample_contiguous_slices(mask, 5, 0.6, rng)].any() for _ in range(2000)])
    assert 0.6 < met < 0.68


def test_a_reader_for_a_model_that_mixes_slices_reads_runs(small_store):
    batch, _ = VolumeReader(small_store, [1, 5, 9], 4, foreground_share=0.5, neighbours=True).read([2, 0], KEY)
    np.testing.assert_allclose(np.diff(batch.positions_mm.numpy(), axis=1), 4.0, atol=1e-4)


def test_reader_gives_sessions_of_its_part_with_their_masks(small_store):
    reader = VolumeReader(small_store, [1, 5, 9], 6, foreground_share=0.5)
    batch, sessions = reader.read([2, 0], KEY)
    assert sessions.tolist() == [9, 1]
    assert batch.pixel_values.shape[:2] == (2, 6)
    assert (batch.masks.flatten(2).any(dim=2).sum(dim=1) >= 3).all()
    for row, session in enumerate(sessions):
        stack = small_store[int(session)]
        for position, pixels, mask in zip(
            batch.positions_mm[row], batch.pixel_values[row], batch.masks[row], strict=True
        ):
            place = int(np.flatnonzero(np.isclose(stack.positions_mm, float(position)))[0])
            assert np.array_equal(pixels, stack.pixels[place])
            assert np.array_equal(mask, stack.mask[place])


def test_reading_and_varying_are_functions_of_the_key(small_store):
    reader = VolumeReader(small_store, range(12), 4)

    def variant(key: StepKey) -> VolumeBatch:
        torch.manual_seed(np.random.randint(1000))  # nothing may hang on global generators
        return augment_volumes(reader.read([0, 1], key)[0], VolumeAugmentation(), key)

    first, again = variant(KEY), variant(KEY)
    assert torch.equal(first.pixel_values, again.pixel_values)
    assert torch.equal(first.contrast_mask, again.contrast_mask)
    assert torch.equal(first.positions_mm, again.positions_mm)
    for other in (StepKey(1, 3, 0, 0), StepKey(0, 4, 0, 0), StepKey(0, 3, 1, 0), StepKey(0, 3, 0, 1)):
        assert not torch.equal(first.pixel_values, variant(other).pixel_values)


def test_autocast_changes_no_view(small_store):
    batch, _ = VolumeReader(small_store, range(12), 4).read([0, 1], KEY)
    always = VolumeAugmentation(intensity=IntensityRecipe(low_resolution_probability=1.0, gibbs_probability=1.0))
    plain = augment_volumes(batch, always, KEY)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment_volumes(batch, always, KEY).pixel_values, plain.pixel_values)


def blob_batch(num_volumes: int = 4, side: int = 64) -> VolumeBatch:
    """A bright ellipse off the middle, and its mask."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    mask = (((rows - 22) / 9) ** 2 + ((columns - 40) / 14) ** 2 < 1).long().expand(num_volumes, 3, side, side)
    return VolumeBatch(
        pixel_values=(mask[:, :, None] * 255).to(torch.uint8).repeat(1, 1, 2, 1, 1),
        contrast_mask=torch.ones(num_volumes, 2, dtype=torch.bool),
        slice_mask=torch.ones(num_volumes, 3, dtype=torch.bool),
        positions_mm=torch.zeros(num_volumes, 3),
        masks=mask.clone(),
    )


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def test_masks_move_with_the_pixels():
    batch = blob_batch()
    moved = augment_volumes(batch, STRONG, KEY)
    for volume in range(4):
        bright = moved.pixel_values[volume, :, 0] > 0.5
        assert overlap(bright, moved.masks[volume] == 1) > 0.97
        assert overlap(moved.masks[volume] == 1, batch.masks[volume] == 1) < 0.95
        # All slices and contrasts of a volume move alike; two volumes do not.
        assert torch.equal(moved.masks[volume, 0], moved.masks[volume, 2])
        assert torch.allclose(moved.pixel_values[volume, 0, 0], moved.pixel_values[volume, 2, 1])
    assert not torch.equal(moved.masks[0], moved.masks[1])
    assert moved.masks.dtype == torch.long


def test_blur_does_not_cross_from_one_slice_to_the_next():
    """A stack of evenly grey slices must stay one, however different neighbouring slices are."""
    greys = torch.tensor([20, 220, 60, 140], dtype=torch.uint8)
    batch = VolumeBatch(
        pixel_values=greys[None, :, None, None, None].expand(2, 4, 2, 24, 24).contiguous(),
        contrast_mask=torch.ones(2, 2, dtype=torch.bool),
        slice_mask=torch.ones(2, 4, dtype=torch.bool),
        positions_mm=torch.arange(4.0).repeat(2, 1),
    )
    blur = QUIET.model_copy(update={"blur_probability": 1.0, "gibbs_probability": 1.0})
    still = VolumeAugmentation(rotation_degrees=0, scale=0, shear=0, contrast_dropout=0, intensity=blur)
    blurred = augment_volumes(batch, still, KEY).pixel_values
    torch.testing.assert_close(blurred, batch.pixel_values / 255, atol=1e-4, rtol=0)


def test_withheld_and_absent_contrasts_are_empty_and_one_always_stays():
    batch = blob_batch(num_volumes=64, side=16)
    batch.contrast_mask[::2, 1] = False
    seen = augment_volumes(batch, VolumeAugmentation(contrast_dropout=0.7), KEY)
    assert seen.contrast_mask.any(dim=1).all()
    assert not (seen.contrast_mask & ~batch.contrast_mask).any()
    assert (~seen.contrast_mask & batch.contrast_mask).any()
    empty = ~seen.contrast_mask[:, None, :].expand(-1, 3, -1)
    assert (seen.pixel_values[empty] == 0).all()


def test_an_impossible_augmentation_is_refused():
    with pytest.raises(ValueError, match="scale"):
        VolumeAugmentation(scale=1.5)
