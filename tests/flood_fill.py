"""Connected components by an own search, to hold others against."""

from __future__ import annotations

import itertools

import numpy as np


def flood_fill(mask: np.ndarray, reach: int) -> list[set[tuple[int, ...]]]:
    """Components as sets of voxels; neighbours differ along at most `reach` axes."""
    steps = [s for s in itertools.product((-1, 0, 1), repeat=mask.ndim) if 0 < np.count_nonzero(s) <= reach]
    left, components = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        component, edge = set(), [left.pop()]
        while edge:
            voxel = edge.pop()
            component.add(voxel)
            neighbours = {tuple(v + d for v, d in zip(voxel, step, strict=True)) for step in steps} & left
            left -= neighbours
            edge += neighbours
        components.append(component)
    return components
