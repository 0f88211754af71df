"""Connected pieces of a label that are too small to be believed.

Axis legend: X Y Z voxels of the scan as stored.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Integer
from scipy import ndimage

# The volume of a voxel comes from an affine in float32, so that 27 mm³ may read as 27.000001.
_ROUNDING = 1e-6


def without_small_components(
    labels: Integer[np.ndarray, "X Y Z"], voxel_mm3: float, min_volume_mm3: float
) -> tuple[Integer[np.ndarray, "X Y Z"], dict[int, int]]:
    """Labels without their connected pieces of less than a volume, and how many pieces each label code lost.

    Voxels of one code that share a face, an edge or a corner are connected (26 neighbours). What is removed becomes 0.

    Args:
        labels: label codes, 0 for background.
        voxel_mm3: volume of a voxel.
        min_volume_mm3: the smallest volume that stays.
    """
    kept = labels.copy()
    removed: dict[int, int] = {}
    for code, box in enumerate(ndimage.find_objects(labels.astype(np.int32)), start=1):
        if box is None:
            continue
        pieces, count = ndimage.label(labels[box] == code, structure=np.ones((3, 3, 3)))
        volumes_mm3 = np.bincount(pieces.ravel(), minlength=count + 1) * voxel_mm3
        small = volumes_mm3 < min_volume_mm3 * (1 - _ROUNDING)
        small[0] = False  # what is not of this code
        kept[box][small[pieces]] = 0
        removed[code] = int(small.sum())
    return kept, removed
