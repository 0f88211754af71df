"""Small pieces of a label, by their volume in cubic millimetres."""

from __future__ import annotations

import numpy as np
import pytest

from brainfound.inference.segmentation import without_small_components
from tests.flood_fill import flood_fill


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("min_volume_mm3", [0.0, 4.0, 11.0, 1e9])
def test_against_a_search_of_its_own(dtype, min_volume_mm3):
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 0, 0, 0, 0, 0, 2, 7], (9, 10, 8)).astype(dtype)
    before = labels.copy()
    expected, lost = labels.copy(), {2: 0, 7: 0}
    for code in lost:
        for piece in flood_fill(labels == code, reach=3):
            if len(piece) * 2.0 < min_volume_mm3:
                lost[code] += 1
                expected[tuple(np.transpose(list(piece)))] = 0
    kept, removed = without_small_components(labels, 2.0, min_volume_mm3)
    np.testing.assert_array_equal(kept, expected)
    assert removed == lost
    assert kept.dtype == dtype
    np.testing.assert_array_equal(labels, before)


def test_volume_counts_and_not_voxels():
    """Voxels of 0.9 × 0.9 × 5 mm: 4.05 mm³ each, as a header in float32 would say."""
    voxel_mm3 = float(abs(np.linalg.det(np.diag(np.array([0.9, 0.9, 5.0], dtype=np.float32)))))
    labels = np.zeros((8, 8, 4), dtype=np.uint8)
    labels[0, 0, 0] = 1
    labels[3, 3, 1:3] = 1
    labels[6, 5:8, 3] = 1
    for min_volume_mm3, sizes in (
        (4.05, [1, 2, 3]),
        (4.06, [2, 3]),
        (8.1, [2, 3]),
        (8.2, [3]),
        (12.15, [3]),
        (12.2, []),
    ):
        kept, removed = without_small_components(labels, voxel_mm3, min_volume_mm3)
        assert sorted(len(piece) for piece in flood_fill(kept > 0, reach=3)) == sizes
        assert removed == {1: 3 - len(sizes)}


def test_corners_connect_and_other_codes_do_not():
    labels = np.zeros((4, 4, 4), dtype=np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[2, 2, 2] = 3
    labels[3, 3, 3] = 4
    kept, removed = without_small_components(labels, 1.0, 3.0)
    assert removed == {3: 0, 4: 1}
    assert (kept == 3).sum() == 3
    assert not (kept == 4).any()


def test_an_empty_map_stays_empty():
    kept, removed = without_small_components(np.zeros((3, 3, 3), dtype=np.uint8), 1.0, 5.0)
    assert not kept.any()
    assert removed == {}
