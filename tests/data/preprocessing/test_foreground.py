"""The foreground against the plain way of computing it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from brainfound.data.preprocessing.foreground import _block_means_3d, _constant_background, _otsu, foreground
from brainfound.data.preprocessing.grids import bounding_box


def plain_background(data: np.ndarray) -> float | None:
    """The commonest value of all faces, if it fills nearly all of most of them."""
    faces = [np.take(data, index, axis=axis).ravel() for axis in range(3) for index in (0, -1)]
    values, counts = np.unique(np.concatenate(faces), return_counts=True)
    value = values[counts.argmax()]
    return float(value) if np.median([(face == value).mean() for face in faces]) >= 0.98 else None


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(2, 9)] * 3), st.integers(1, 3), st.integers(0, 6))
def test_the_exact_background_is_the_commonest_value_of_the_faces(seed, shape, num_values, num_noisy):
    rng = np.random.default_rng(seed)
    data = rng.normal(0, 1, shape).astype(np.float32)
    for number, (axis, index) in enumerate((axis, index) for axis in range(3) for index in (0, -1)):
        if number >= num_noisy:
            data[(slice(None),) * axis + (index,)] = rng.integers(num_values)
    assert _constant_background(data) == plain_background(data)


def test_two_large_faces_may_outweigh_four_small_ones():
    data = np.zeros((40, 40, 3), np.float32)
    data[1:-1, 1:-1, 0] = data[1:-1, 1:-1, -1] = 5
    assert _constant_background(data) is None
    assert plain_background(data) is None


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(2, 20)] * 3), st.tuples(*[st.integers(1, 6)] * 3), st.permutations(range(3)))
def test_means_of_blocks_are_a_uniform_filter_sampled(shape, size, axes):
    data = np.random.default_rng(0).normal(5, 1, shape).astype(np.float32).transpose(axes)[::-1]
    expected = ndimage.uniform_filter(data, size=size, mode="nearest")[:: size[0], :: size[1], :: size[2]]
    np.testing.assert_allclose(_block_means_3d(data, list(size)), expected, rtol=1e-5)


def test_the_threshold_leaves_the_least_variance_within_its_two_classes():
    """Otsu's criterion the other way round, over all thresholds."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(20, 6, 6000), rng.normal(80, 15, 3000), [900.0]]).clip(0)
    clipped = np.minimum(values, np.percentile(values, 99.9))
    edges = np.linspace(clipped.min(), clipped.max(), 65)
    centres = (edges[:-1] + edges[1:]) / 2
    binned = centres[(np.searchsorted(edges, clipped, side="right") - 1).clip(max=63)]

    def variance_within(threshold: float) -> float:
        low = binned <= threshold
        return low.mean() * binned[low].var() + (~low).mean() * binned[~low].var()

    assert _otsu(values, bins=64) == pytest.approx(min(centres[:-1], key=variance_within))


@pytest.mark.parametrize("noise", [0.0, 8.0])
def test_the_head_is_found_in_air_and_in_an_exact_background(head, centred, noise):
    shape, affine = (60, 70, 50), centred((60, 70, 50), np.eye(3) * 2)
    image = head.image(shape, affine, noise=noise)
    truth = head.image(shape, affine) > 0
    found = foreground(image, affine)
    if noise:
        # Coarse, and never less than the head: the border of air belongs to it.
        assert (found & truth).sum() > 0.99 * truth.sum()
        assert found.sum() < 1.5 * truth.sum()
    else:
        np.testing.assert_array_equal(found, truth)
    for axis, part in enumerate(bounding_box(found)):
        low, high = part.start, part.stop - 1
        line = np.flatnonzero(truth.any(axis=tuple(a for a in range(3) if a != axis)))
        assert line[0] - 8 <= low <= line[0]
        assert line[-1] <= high <= line[-1] + 8


def test_air_that_was_padded_with_zeros_is_not_the_head(head, centred):
    shape, affine = (110, 120, 110), centred((110, 120, 110), np.eye(3) * 2)
    truth = head.image(shape, affine) > 0
    image = np.abs(head.image(shape, affine, noise=8.0)) + 1
    padded = np.zeros_like(image)
    padded[4:-4, 4:-4, 4:-4] = image[4:-4, 4:-4, 4:-4]
    assert _constant_background(padded) == 0
    found = foreground(padded, affine)
    assert (found & truth).sum() > 0.99 * truth.sum()
    assert found.sum() < 1.5 * truth.sum()
