"""Blur, thick pixels and Gibbs ringing against an independent formula or a physical property."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import fft, ndimage

from brainfound.data.augmentation.resolution import (
    filter_columns,
    filter_rows,
    gaussian_blur,
    kspace_hann_weights,
    kspace_truncation_weights,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mirrored_spectrum(image: torch.Tensor) -> np.ndarray:
    """|FFT| down the columns of an image continued by its mirror; index k is k half periods per image height."""
    values = image.double().numpy()
    return np.abs(np.fft.rfft(np.concatenate([values, values[::-1]]), axis=0))


@pytest.mark.parametrize("size", [(32, 32), (27, 40)])
def test_a_sharp_cutoff_leaves_nothing_beyond_and_everything_below(size):
    images = torch.rand(2, 1, *size, generator=seeded(0))
    kept = torch.tensor([0.5, 0.8])
    filtered = filter_rows(images, kspace_truncation_weights(kept, size[0]))
    for image, result, part in zip(images[:, 0], filtered[:, 0], kept.tolist(), strict=True):
        before, after = mirrored_spectrum(image), mirrored_spectrum(result)
        first_lost = math.ceil(part * size[0])
        assert after[first_lost:].max() < 1e-4
        np.testing.assert_allclose(after[:first_lost], before[:first_lost], atol=1e-4)
    turned = filter_columns(images.mT.contiguous(), kspace_truncation_weights(kept, size[0])).mT
    torch.testing.assert_close(turned, filtered, atol=1e-5, rtol=0)


def test_filters_are_those_of_the_cosine_transform():
    images = torch.rand(3, 2, 20, 26, generator=seeded(1))
    rows = torch.rand(3, 20, generator=seeded(2))
    columns = torch.rand(3, 26, generator=seeded(3))
    result = filter_columns(filter_rows(images, rows), columns)
    spectrum = fft.dctn(images.double().numpy(), axes=(2, 3), norm="ortho")
    spectrum *= rows.numpy()[:, None, :, None] * columns.numpy()[:, None, None, :]
    expected = fft.idctn(spectrum, axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_an_edge_rings_by_the_gibbs_constant():
    step = torch.zeros(1, 1, 512, 4)
    step[:, :, 256:] = 1
    ringing = filter_rows(step, kspace_truncation_weights(torch.tensor([0.06]), 512))
    # The Wilbraham–Gibbs overshoot is 8.95% of the jump.
    assert float(ringing.max()) - 1 == pytest.approx(0.0895, abs=0.002)


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
def test_thick_pixels_hold_nothing_beyond_their_nyquist_frequency_and_do_not_ring(factor):
    length = 96
    images = torch.rand(1, 1, length, 3, generator=seeded(0))
    weights = kspace_hann_weights(torch.tensor([factor]), length)
    result = filter_rows(images, weights)
    # 1 / (2 · factor) periods per pixel are length / factor half periods per image.
    assert mirrored_spectrum(result[0, 0])[math.ceil(length / factor) :].max() < 1e-4
    torch.testing.assert_close(result.mean(dim=2), images.mean(dim=2))
    step = torch.zeros(1, 1, length, 1)
    step[:, :, length // 2 :] = 1
    edge = filter_rows(step, weights)
    assert float(edge.max()) < 1.01
    point = torch.zeros(1, 1, length, 1)
    point[:, :, length // 2] = 1
    spread = filter_rows(point, weights)[0, 0, :, 0]
    # A Hann window of half-width 1 / (2 f) has a point response of full width 2 f at half its height.
    fine = np.interp(np.linspace(0, length - 1, 20 * length), np.arange(length), spread.numpy())
    assert (fine > fine.max() / 2).mean() * length == pytest.approx(2 * factor, rel=0.1)


def test_filters_leave_an_even_image_alone():
    even = torch.full((2, 1, 30, 40), 0.7)
    for weights in (
        kspace_truncation_weights(torch.tensor([0.4, 0.8]), 30),
        kspace_hann_weights(torch.tensor([1.3, 3.0]), 30),
    ):
        torch.testing.assert_close(filter_rows(even, weights), even)
    torch.testing.assert_close(gaussian_blur(even, torch.tensor([0.5, 1.2])), even)


def test_blur_is_gaussian_per_image():
    images = torch.rand(3, 2, 20, 15, generator=seeded(0))
    sigma = [0.0, 0.7, 1.2]
    blurred = gaussian_blur(images, torch.tensor(sigma))
    assert torch.equal(blurred[0], images[0])
    for index in (1, 2):
        for part in range(2):
            expected = ndimage.gaussian_filter(
                images[index, part].double().numpy(), sigma[index], mode="nearest", radius=4
            )
            np.testing.assert_allclose(blurred[index, part].numpy(), expected, atol=1e-6)
