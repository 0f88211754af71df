"""Label maps on another grid: volumes, borders between labels, and equal grids."""

from __future__ import annotations

import numpy as np
import pytest

from brainfound.data.grids import resample_labels


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
