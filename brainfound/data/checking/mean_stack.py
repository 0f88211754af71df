"""The mean stack: the training scans of a contrast, averaged on a grid of 10 mm, as text in the input contract.

A scan is compared with it by cross-correlation over small shifts, in each of the 24 orientations of a cube that a
left-right symmetric head can take. Mirrored left and right cannot be seen in it.

Axis legend: S slices (inferior → superior), H rows (anterior → posterior), W columns (left → right); G cells of the
grid along each axis.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np
from jaxtyping import Complex, Float, Num, UInt
from scipy import ndimage

from brainfound.data.store import Store

CELL_MM, GRID = 10.0, 24
"""Edge of a cell, and cells along each axis: 240 mm hold a head; no face or fold of one person shows."""
SAMPLE_MM = 3.0
"""Pixels are read about this far apart: finer ones do not change the mean of a cell."""
MIN_SESSIONS, MAX_SESSIONS = 3, 64
"""Fewer sessions are no mean of a cohort; more of them change nothing and take time to read."""
HEAD_SHARE = 0.1
"""Share of the brightest cell above which a cell belongs to the head."""
MAX_SHIFT = 5
"""Cells that a scan may be shifted: a long neck moves the centre of its box by up to 5 cm."""
_PADDED = 32

_UPRIGHT = ((0, 1, 2), (1, 1, 1))
_ORIENTATIONS = tuple(
    (axes, signs)
    for axes in permutations(range(3))
    for signs in product((1, -1), repeat=3)
    if signs[axes.index(2)] == 1  # the reference is symmetric along W
)


@dataclass(frozen=True)
class Likeness:
    """How alike a scan and a mean stack are; correlations between −1 and 1.

    Attributes:
        upright: as the scan is stored.
        turned: in the best of all other orientations.
        inner: of the values within the head, as stored.
        inverted: the same with the grey values inverted.
    """

    upright: float
    turned: float
    inner: float
    inverted: float


def coarse_volume(pixels: Num[np.ndarray, "S H W"], spacing_mm: Float[np.ndarray, "3"]) -> Float[np.ndarray, "G G G"]:
    """The mean of the pixels in each cell of the grid, centred on the stack; outside of the stack they count as 0."""
    step = [max(int(SAMPLE_MM / spacing), 1) for spacing in spacing_mm]
    volume = pixels[:: step[0], :: step[1], :: step[2]].astype(np.float32)
    for axis in range(3):
        weights = _cell_weights(volume.shape[axis], float(spacing_mm[axis]) * step[axis])
        volume = np.moveaxis(np.tensordot(weights, volume, (1, axis)), 0, axis)
    return volume


def measure_mean_stacks(store: Store, sessions: np.ndarray) -> dict[str, str]:
    """The mean stack of each contrast that at least `MIN_SESSIONS` of these sessions have, as `encode` writes it."""
    means = {}
    top = store.preprocessing.max_pixel_value
    for channel, contrast in enumerate(store.contrasts):
        having = [int(row) for row in sessions if contrast in store.shown and store.present[row, channel]]
        if len(having) < MIN_SESSIONS:
            continue
        chosen = np.unique(np.linspace(0, len(having) - 1, min(len(having), MAX_SESSIONS)).round().astype(int))
        total = np.zeros((GRID,) * 3)
        for row in (having[place] for place in chosen):
            spacing = np.linalg.norm(store.table.affine[row][:3, :3], axis=0)
            step = max(int(SAMPLE_MM / spacing[0]), 1)
            pixels = store.read_slices(store.session_rows(row)[::step])[:, channel]
            total += coarse_volume(pixels, spacing * [step, 1, 1])
        means[contrast] = encode(total / len(chosen) * (255 / top))
    return means


def encode(volume: Num[np.ndarray, "G G G"]) -> str:
    """A mean stack as text: bytes S H W, compressed by zlib, in base64."""
    pixels = np.clip(np.rint(volume), 0, 255).astype(np.uint8)
    return base64.b64encode(zlib.compress(pixels.tobytes(), 9)).decode("ascii")


def decode(text: str) -> UInt[np.ndarray, "G G G"]:
    """The volume of `encode`; ValueError if the text is damaged."""
    try:
        raw = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), GRID**3 + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(raw) != GRID**3:
        raise ValueError(f"a mean stack has {GRID**3} bytes, not {len(raw)}")
    return np.frombuffer(raw, np.uint8).reshape((GRID,) * 3)


def compare(pixels: Num[np.ndarray, "S H W"], spacing_mm: Float[np.ndarray, "3"], mean: str) -> Likeness | None:
    """Compare a contrast of a stack with an encoded mean stack; None if there is nothing to compare."""
    volume = coarse_volume(pixels, spacing_mm)
    if not volume.any():
        return None
    inner, outline = _spectra(volume)
    scores = {}
    for orientation, (mean_inner, mean_outline) in zip(_ORIENTATIONS, _mean_spectra(mean), strict=True):
        both = 0.5 * (inner * np.conj(mean_inner) + outline * np.conj(mean_outline))
        scores[orientation] = float(_correlation(both).max())
    upright = scores.pop(_UPRIGHT)
    values = _correlation(inner * np.conj(_mean_spectra(mean)[_ORIENTATIONS.index(_UPRIGHT)][0]))
    return Likeness(upright, max(scores.values()), float(values.max()), float(-values.min()))


@lru_cache(maxsize=64)
def _cell_weights(count: int, spacing_mm: float) -> Float[np.ndarray, "G count"]:
    """The share of each cell that each of ``count`` centred samples fills along one axis."""
    edges = (np.arange(count + 1) - count / 2) * spacing_mm
    cells = (np.arange(GRID + 1) - GRID / 2) * CELL_MM
    low, high = np.maximum(edges[None, :-1], cells[:-1, None]), np.minimum(edges[None, 1:], cells[1:, None])
    return (np.clip(high - low, 0, None) / CELL_MM).astype(np.float32)


@lru_cache(maxsize=32)
def _mean_spectra(mean: str) -> list[tuple[np.ndarray, np.ndarray]]:
    stored = decode(mean).astype(np.float32)
    volume = (stored + stored[:, :, ::-1]) * np.float32(0.5)
    turned = (volume.transpose(axes)[tuple(slice(None, None, s) for s in signs)] for axes, signs in _ORIENTATIONS)
    return [_spectra(each) for each in turned]


def _spectra(volume: Float[np.ndarray, "G G G"]) -> tuple[Complex[np.ndarray, "..."], Complex[np.ndarray, "..."]]:
    """Spectra of two views of a volume: its values within the head around their mean, and its blurred edges."""
    head = volume > HEAD_SHARE * volume.max()
    inner = np.where(head, volume - volume[head].mean(), 0) if head.any() else np.zeros_like(volume)
    views = (inner, ndimage.gaussian_laplace(volume, 1.0))
    first, second = (np.fft.rfftn(v / (np.linalg.norm(v) or 1.0), (_PADDED,) * 3, axes=(0, 1, 2)) for v in views)
    return first, second


def _correlation(spectrum: Complex[np.ndarray, "..."]) -> Float[np.ndarray, "shifts shifts shifts"]:
    """The correlation at each shift, from the product of two spectra."""
    near = np.arange(-MAX_SHIFT, MAX_SHIFT + 1)
    return np.fft.irfftn(spectrum, (_PADDED,) * 3, axes=(0, 1, 2))[np.ix_(near, near, near)]
