"""Volumes and label maps on another grid, against the plain way of computing it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainfound.data.preprocessing.grids import resample, resample_labels


def halving(offset: float) -> np.ndarray:
    """Index on a grid of half the resolution → index on the fine grid."""
    matrix = np.diag([2.0, 2.0, 2.0, 1.0])
    matrix[:3, 3] = offset
    return matrix


@pytest.mark.parametrize("offset", [0.25, 0.5])
def test_small_objects_keep_their_volume_on_average(offset):
    rng = np.random.default_rng(0)
    fine = np.zeros((80, 80, 80), dtype=np.uint8)
    for corner in rng.integers(2, 70, size=(60, 3)):
        size = rng.integers(3, 8, size=3)
        fine[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = 1
    coarse = resample_labels(fine, halving(offset), (40, 40, 40))
    assert int(coarse.sum()) * 8 == pytest.approx(int(fine.sum()), rel=0.07)


def test_where_three_labels_meet_there_is_no_hole():
    """No label reaches one half there; the background has no part in it at all."""
    labels = np.ones((20, 20, 20), dtype=np.uint8)
    labels[10:, :10] = 2
    labels[10:, 10:] = 3
    labels[:10, 10:] = 4
    coarse = resample_labels(labels, halving(1.5), (9, 9, 9))
    assert (coarse > 0).all()


def test_equal_grids_copy():
    labels = np.random.default_rng(0).integers(0, 4, (9, 8, 7)).astype(np.uint8)
    np.testing.assert_array_equal(resample_labels(labels, np.eye(4), (9, 8, 7)), labels)


def _weights(scale: float, offset: float, length: int, size: int) -> np.ndarray:
    """Linear interpolation along one axis as a matrix ``(length, size)``; half a voxel beyond the ends answers."""
    matrix = np.zeros((length, size))
    for row in range(length):
        position = scale * row + offset
        if -0.5 <= position <= size - 0.5:
            lower = int(np.floor(position))
            matrix[row, max(lower, 0)] += 1 - (position - lower)
            matrix[row, min(lower + 1, size - 1)] += position - lower
    return matrix


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(1, 12)] * 3),
    st.permutations(range(3)),
    st.tuples(*[st.sampled_from([1.0, -1.0, 0.5, -0.5, 2.0, 1.25])] * 3),
    st.tuples(*[st.sampled_from([0.0, 0.5, -0.25, 3.0, 8.0, -20.0])] * 3),
    st.booleans(),
)
def test_parallel_grids_are_sampled_axis_by_axis(size, shape, axes, scales, offsets, fortran):
    volume = np.random.default_rng(0).normal(0, 1, size).astype(np.float32)
    volume = np.asfortranarray(volume) if fortran else volume
    matrix = np.zeros((4, 4))
    matrix[list(axes), range(3)] = scales
    matrix[list(axes), 3] = offsets
    matrix[3, 3] = 1
    found = resample(volume, matrix, shape, order=1)
    ways = [_weights(scales[a], offsets[a], shape[a], size[axes[a]]) for a in range(3)]
    expected = np.einsum("ai,bj,ck,ijk->abc", *ways, volume.transpose(axes))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from([0, 1]))
def test_an_oblique_grid_is_sampled_only_where_there_is_something_and_nothing_is_lost(seed, empty, order):
    rng = np.random.default_rng(seed)
    volume = rng.normal(0, 1, rng.integers(2, 12, 3)).astype(np.float32)
    volume[: int(empty * len(volume))] = 0
    volume[:, :, int((1 - empty) * volume.shape[2]) :] = 0
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.random(random_state=seed).as_matrix() * rng.uniform(0.4, 2.0)
    matrix[:3, 3] = rng.uniform(-6, 6, 3)
    shape = tuple(int(n) for n in rng.integers(1, 14, 3))
    expected = ndimage.affine_transform(
        volume, matrix[:3, :3], matrix[:3, 3], output_shape=shape, order=order, mode="constant"
    )
    np.testing.assert_allclose(resample(volume, matrix, shape, order), expected, atol=1e-5)
