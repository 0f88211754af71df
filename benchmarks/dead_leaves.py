"""Images without brains: textured shapes that hide each other ("dead leaves"), three channels as three contrasts.

A starting checkpoint should know images, not brains. Released ones were trained on photographs; where none are
available, these images stand in for them. Shapes of many sizes lie on top of each other, each with its own texture.

Source: Baradad et al. 2021 (arXiv 2106.05963), "Dead leaves – textures", who show that features learnt from such
images carry over to photographs: sizes r fall as r^−3, shapes are mixed, textures are coloured noise.

Axes: C channels, H W pixels, S slices.
"""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

CHANNELS = ("T1w", "T2w", "FLAIR")
_FRAME = 6  # dark pixels around each image, as air around a head: `prepare` looks for an object
_LARGEST_SHARE = 0.4  # radius of the largest leaf, as a part of the image's side
_SMALLEST_PIXELS = 2.0


def dead_leaves_image(rng: np.random.Generator, side: int, num_leaves: int = 90) -> np.ndarray:
    """(C, side, side) float32 in 0.15–1: leaves painted over a textured ground, the last one on top."""
    image = _texture(rng, side)
    smallest, largest = _SMALLEST_PIXELS, _LARGEST_SHARE * side
    # The density r^−3 by its inverse distribution function.
    uniform = rng.random(num_leaves)
    radii = (smallest**-2 - uniform * (smallest**-2 - largest**-2)) ** -0.5
    textures = [_texture(rng, side) for _ in range(6)]
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    for radius in radii:
        center = rng.uniform(0, side, 2)
        inside = _leaf(rng, rows - center[0], columns - center[1], float(radius))
        texture = np.roll(textures[rng.integers(len(textures))], rng.integers(side, size=2), axis=(1, 2))
        colour = rng.uniform(0.15, 1.0, (len(CHANNELS), 1))
        depth = rng.uniform(0.0, 0.6)
        image[:, inside] = colour * (1 - depth) + depth * texture[:, inside]
    return np.clip(image, 0.15, 1.0)


def _leaf(rng: np.random.Generator, down: np.ndarray, right: np.ndarray, radius: float) -> np.ndarray:
    """A disc, an ellipse, a rectangle or a convex polygon around the origin, turned at random."""
    angle = rng.uniform(0, np.pi)
    along = down * np.cos(angle) + right * np.sin(angle)
    across = right * np.cos(angle) - down * np.sin(angle)
    stretch = rng.uniform(0.35, 1.0)
    kind = rng.integers(3)
    if kind == 0:
        return (along / radius) ** 2 + (across / (radius * stretch)) ** 2 < 1
    if kind == 1:
        return np.maximum(np.abs(along) / radius, np.abs(across) / (radius * stretch)) < 1
    inside = np.ones(down.shape, bool)
    for side_angle in np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7))):
        inside &= along * np.cos(side_angle) + across * np.sin(side_angle) < radius * rng.uniform(0.4, 1.0)
    return inside & (along**2 + across**2 < (1.5 * radius) ** 2)


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """(C, side, side) float32 in 0.15–1: noise with a random spectrum, drawn out in a random direction."""
    frequency_down = np.fft.fftfreq(side)[:, None]
    frequency_right = np.fft.rfftfreq(side)[None]
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 4.0)
    along = frequency_down * np.cos(angle) + frequency_right * np.sin(angle)
    across = frequency_right * np.cos(angle) - frequency_down * np.sin(angle)
    frequency = np.sqrt((along * stretch) ** 2 + (across / stretch) ** 2)
    frequency[0, 0] = 1.0
    amplitude = frequency ** -rng.uniform(0.5, 2.5)
    amplitude[0, 0] = 0.0
    white = rng.standard_normal((len(CHANNELS), side, side))
    # Channels of one texture resemble each other, as contrasts of one tissue do.
    white[1:] = 0.6 * white[:1] + 0.8 * white[1:]
    noise = np.fft.irfft2(np.fft.rfft2(white) * amplitude, s=(side, side))
    noise /= noise.std(axis=(1, 2), keepdims=True) + 1e-9
    middle = rng.uniform(0.3, 0.85, (len(CHANNELS), 1, 1))
    return np.clip(middle + 0.15 * noise, 0.15, 1.0).astype(np.float32)


def write_dead_leaves(
    out: Path, num_sessions: int, slices_per_session: int, side: int, pixel_mm: float, seed: int
) -> Path:
    """Writes a cohort that `prepare` takes: each "session" a stack of unrelated images, each channel one scan."""
    out.mkdir(parents=True, exist_ok=True)
    affine = np.diag([pixel_mm, pixel_mm, pixel_mm, 1.0])
    rows = []
    for session in range(num_sessions):
        rng = np.random.default_rng([seed, session])
        images = np.stack([dead_leaves_image(rng, side) for _ in range(slices_per_session)], axis=-1)
        framed = np.pad(images, ((0, 0), (_FRAME, _FRAME), (_FRAME, _FRAME), (0, 0)))
        for channel, name in enumerate(CHANNELS):
            file = f"leaves-{session:04d}_{name}.nii.gz"
            nib.save(nib.Nifti1Image(np.rint(framed[channel] * 1000).astype(np.int16), affine), out / file)
            rows.append({"subject": f"leaves-{session:04d}", "contrast": name, "path": file})
    pd.DataFrame(rows).to_csv(out / "manifest.tsv", sep="\t", index=False)
    return out
