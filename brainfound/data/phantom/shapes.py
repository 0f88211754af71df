"""Shapes as depth fields: positive inside, negative outside, in mm near the surface.

A depth field divided by the voxel size gives the fraction of a voxel that lies inside, so edges carry
partial volume instead of stairs. Depths combine by smooth minimum (both) and maximum (either).

`points` is (3, …) coordinates in mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np


def ellipsoid(points: np.ndarray, center: Sequence[float], radii: Sequence[float], boxy: bool = False) -> np.ndarray:
    """Depth of an ellipsoid, or of a superellipsoid of exponent 2.5, to first order: (1 − F)/|∇F|."""
    scaled = [np.abs((points[axis] - np.float32(center[axis])) * np.float32(1 / radii[axis])) for axis in range(3)]
    powers = [s * np.sqrt(s) for s in scaled] if boxy else scaled  # s^(k−1)
    total = scaled[0] * powers[0] + scaled[1] * powers[1] + scaled[2] * powers[2] + np.float32(1e-6)
    level = total ** np.float32(0.4) if boxy else np.sqrt(total)
    steep = [power * np.float32(1 / radius) for power, radius in zip(powers, radii, strict=True)]
    slope = np.sqrt(steep[0] * steep[0] + steep[1] * steep[1] + steep[2] * steep[2])
    # F = total^(1/k), so |∇F| = slope · F / total.
    return ((1 - level) * total / (slope * level + np.float32(1e-4) * total)).astype(np.float32, copy=False)


def tube(points: np.ndarray, path: Sequence[Sequence[float]], radii: Sequence[float]) -> np.ndarray:
    """Depth of a chain of tapered capsules through the points of `path` (mm), with a radius at each."""
    segments = []
    for start, end, first, last in zip(path[:-1], path[1:], radii[:-1], radii[1:], strict=True):
        along = np.subtract(end, start)
        offset = [points[axis] - np.float32(start[axis]) for axis in range(3)]
        direction = (along / float(along @ along)).astype(np.float32)
        position = offset[0] * direction[0] + offset[1] * direction[1] + offset[2] * direction[2]
        position = np.clip(position, 0.0, 1.0, out=position)
        miss = [o - position * np.float32(a) for o, a in zip(offset, along, strict=True)]
        distance = np.sqrt(miss[0] * miss[0] + miss[1] * miss[1] + miss[2] * miss[2])
        segments.append((first + (last - first) * position - distance).astype(np.float32, copy=False))
    return reduce(lambda depth, segment: either(depth, segment, 1.0), segments)


def both(first: np.ndarray, second: np.ndarray, blend_mm: float = 0.0) -> np.ndarray:
    """Intersection; `blend_mm` rounds the edge (polynomial smooth minimum)."""
    smaller = np.minimum(first, second)
    if blend_mm <= 0:
        return smaller
    overlap = np.maximum(blend_mm - np.abs(first - second), 0) / blend_mm
    return smaller - overlap**2 * (blend_mm / 4)


def either(first: np.ndarray, second: np.ndarray, blend_mm: float = 0.0) -> np.ndarray:
    """Union; `blend_mm` fillets the joint."""
    return -both(-first, -second, blend_mm)


def ramp(values: np.ndarray, start: float, end: float) -> np.ndarray:
    """Smooth step from 0 at `start` to 1 at `end`."""
    t = np.clip((values - start) / (end - start), 0, 1)
    return t * t * (3 - 2 * t)


def inside_fraction(depth_mm: np.ndarray, voxel_mm: float) -> np.ndarray:
    """The fraction of a voxel of that width that lies inside a surface at that depth."""
    fraction = depth_mm * np.float32(1 / voxel_mm)
    fraction += 0.5
    return np.clip(fraction, 0.0, 1.0, out=fraction)
