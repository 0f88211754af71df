"""Random grey values: the formula of each, how often it comes, and what must not change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from brainfound.data.augmentation import IntensityRecipe, vary_intensity
from brainfound.data.augmentation.intensity import IntensityPlan, add_noise, bias_fields, random_coefficients
from brainfound.data.augmentation.transforms import random_selection

OFF = {f"{effect}_probability": 0.0 for effect in ("gamma", "contrast", "blur", "noise")}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heads(num: int = 6, num_contrasts: int = 2) -> torch.Tensor:
    """A bright disc of random grey values in air."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 24), torch.linspace(-1, 1, 20), indexing="ij")
    values = 0.3 + 0.3 * torch.rand(num, num_contrasts, 24, 20, generator=seeded(9))
    return values * (x**2 + y**2 < 0.7)


def varied(seed: int = 0, **settings) -> torch.Tensor:
    return vary_intensity(heads(), IntensityRecipe(**(OFF | settings)), seeded(seed), seeded(seed + 1))


def changed(result: torch.Tensor) -> int:
    return int((result != heads()).flatten(2).any(dim=2).sum())


@pytest.mark.parametrize("effect", ["gamma", "contrast", "bias_field", "blur", "low_resolution", "gibbs", "noise"])
def test_each_effect_comes_to_the_requested_part_of_the_images_and_never_to_the_air(effect):
    for probability, expected in ((0.0, 0), (0.5, 6), (1.0, 12)):
        result = varied(**{f"{effect}_probability": probability})
        assert changed(result) == expected
        assert (result[heads() == 0] == 0).all()
        assert float(result.max()) <= 1
        assert (result > 0).float().mean() > 0.4
    assert torch.equal(varied(**{f"{effect}_probability": 0.5}), varied(**{f"{effect}_probability": 0.5}))
    assert not torch.equal(varied(1, **{f"{effect}_probability": 1.0}), varied(2, **{f"{effect}_probability": 1.0}))


def test_gamma_is_one_power_per_image():
    result, before = varied(gamma_probability=1.0).flatten(0, 1), heads().flatten(0, 1)
    powers = []
    for image, original in zip(result.double(), before.double(), strict=True):
        inside = original > 0
        power = image[inside].log() / original[inside].log()
        assert float(power.std()) < 1e-4
        powers.append(float(power.mean()))
    assert 0.7 <= min(powers) < max(powers) <= 1.5


def test_gain_scales_the_mean_and_contrast_the_distance_from_it():
    result, before = varied(contrast_probability=1.0).flatten(0, 1), heads().flatten(0, 1)
    gains, spreads = [], []
    for image, original in zip(result.double(), before.double(), strict=True):
        inside = original > 0
        new, old = image[inside], original[inside]
        gains.append(float(new.mean() / old.mean()))
        spreads.append(float(new.std() / old.std()) / gains[-1])
        torch.testing.assert_close(new - new.mean(), (old - old.mean()) * gains[-1] * spreads[-1], atol=1e-6, rtol=0)
    assert 0.8 <= min(gains) < max(gains) <= 1.2
    assert 0.75 <= min(spreads) < max(spreads) <= 1.25


def test_a_change_of_contrast_does_not_reach_the_brain_by_way_of_the_air():
    """In an even image there is no contrast to change; blur at its border must find air of 0 all the same."""
    even = (heads() > 0) * 0.5
    blur = OFF | {"blur_probability": 1.0, "brightness": 0.0}
    only_blurred, both = (
        vary_intensity(even.clone(), IntensityRecipe(**(blur | change)), seeded(0), seeded(1))
        for change in ({}, {"contrast_probability": 1.0})
    )
    assert (only_blurred != even).any()
    torch.testing.assert_close(both, only_blurred)


def test_effects_are_not_done_on_images_that_nobody_sees():
    images = heads().view(12, 1, 24, 20)
    visible = torch.arange(12) % 3 > 0
    everything = IntensityRecipe(gamma_probability=1, bias_field_probability=1, blur_probability=1, noise_probability=1)
    plan = IntensityPlan.draw(
        12, (24, 20), everything.model_copy(update={"contrast_probability": 0}), seeded(0), visible
    )
    plan.apply(images, seeded(1))
    same = (images == heads().view(12, 1, 24, 20)).flatten(1).all(dim=1)
    assert torch.equal(same, ~visible)


def test_slices_of_a_volume_vary_alike_and_apart_from_each_other():
    """Every slice of a volume gets what it would get if all slices of the volume were it."""
    recipe = IntensityRecipe(**(OFF | {f"{e}_probability": 1.0 for e in ("gamma", "bias_field", "blur", "gibbs")}))
    slices = heads(5, 1)[:, 0]
    together = vary_intensity(slices[None, None].clone(), recipe, seeded(3), seeded(4))
    for index in range(5):
        same = slices[index].expand(1, 1, 5, -1, -1).clone()
        alone = vary_intensity(same, recipe, seeded(3), seeded(4))
        torch.testing.assert_close(together[0, 0, index], alone[0, 0, 0], atol=1e-6, rtol=0)


def test_a_part_is_rounded_at_random_so_that_its_mean_is_right():
    sizes = [int(random_selection(5, 0.3, seeded(seed)).sum()) for seed in range(400)]
    assert set(sizes) == {1, 2}
    assert sum(sizes) / 400 == pytest.approx(1.5, abs=0.1)
    often = torch.stack([random_selection(5, 0.3, seeded(seed)) for seed in range(400)]).float().mean(dim=0)
    assert often.tolist() == pytest.approx([0.3] * 5, abs=0.1)


def test_impossible_ranges_are_refused():
    for settings in ({"gamma": (1.5, 0.7)}, {"low_resolution": (0.5, 2.0)}, {"gibbs_kept": (0.5, 1.5)}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            IntensityRecipe(**settings)


def test_bias_fields_are_smooth_and_have_mean_one():
    strength = torch.tensor([0.1, 0.4, 0.8])
    fields = bias_fields(random_coefficients(3, seeded(0)), strength, (24, 36))
    torch.testing.assert_close(fields.mean(dim=(1, 2)), torch.ones(3))
    y, x = np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-1, 1, 36), indexing="ij")
    polynomial = np.stack([y**i * x**j for i in range(4) for j in range(4 - i)], axis=-1).reshape(-1, 10)
    for field, most in zip(fields.double(), strength, strict=True):
        logarithm = field.log().numpy().ravel()
        fit, *_ = np.linalg.lstsq(polynomial, logarithm, rcond=None)
        np.testing.assert_allclose(polynomial @ fit, logarithm, atol=1e-5)
        assert float(most) * 0.99 <= np.ptp(logarithm) <= 2 * float(most) + 1e-5


def test_bias_fields_differ_between_images_and_no_strength_is_no_field():
    coefficients = random_coefficients(2, seeded(0))
    fields = bias_fields(coefficients, torch.tensor([0.4, 0.4]), (16, 16))
    assert (fields[0] - fields[1]).abs().max() > 0.05
    assert torch.equal(bias_fields(coefficients, torch.zeros(2), (16, 16)), torch.ones(2, 16, 16))


def test_noise_is_gaussian_or_rician():
    std = torch.tensor([0.02, 0.1])

    def noisy(level: float, kind) -> torch.Tensor:
        return add_noise(torch.full((2, 1, 200, 200), level), std, kind, seeded(0))

    gaussian = noisy(0.5, "gaussian")
    assert gaussian.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.5, 0.5], abs=2e-3)
    assert gaussian.std(dim=(1, 2, 3)).tolist() == pytest.approx(std.tolist(), rel=0.02)
    # Without signal it is the Rayleigh distribution, with much signal Gaussian around √(signal² + std²).
    empty = noisy(0.0, "rician")
    assert empty.mean(dim=(1, 2, 3)).tolist() == pytest.approx((std * math.sqrt(math.pi / 2)).tolist(), rel=0.02)
    bright = noisy(0.8, "rician")
    assert bright.std(dim=(1, 2, 3)).tolist() == pytest.approx(std.tolist(), rel=0.02)
    assert bright.square().mean(dim=(1, 2, 3)).tolist() == pytest.approx((0.64 + 2 * std**2).tolist(), rel=2e-3)
