"""Losses of a segmentation against independent formulas, and their limits."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from brainfound.errors import ModelError
from brainfound.models import BrainFoundConfig, BrainFoundForSegmentation
from brainfound.models.losses import compute_segmentation_loss, dice_loss, focal_loss, segmentation_loss, tversky_loss


@pytest.fixture(params=[False, True], ids=["classes", "overlapping"])
def case(request):
    """Logits, labels with unknown ones among them, and whether labels overlap."""
    logits = 2 * torch.randn(3, 4, 6, 5)
    labels = torch.randint(0, 2, (3, 4, 6, 5)) if request.param else torch.randint(0, 4, (3, 6, 5))
    labels[0, ..., :2, :] = -100
    return logits, labels, request.param


def regions(logits, labels, overlapping):
    """Probabilities and truth of every region in NumPy: two arrays (regions, known pixels)."""
    scores, labels = logits.double().numpy(), labels.numpy()
    if overlapping:
        probabilities = np.moveaxis(1 / (1 + np.exp(-scores)), 1, 0)
        truth = np.moveaxis(labels, 1, 0)
        known = truth[0] >= 0
        return probabilities[:, known], truth[:, known].astype(float)
    scores = np.moveaxis(np.exp(scores), 1, 0)
    known = labels >= 0
    return (scores / scores.sum(axis=0))[:, known], np.eye(4)[labels[known]].T


def of_foreground(values, overlapping):
    return values if overlapping else values[1:]


def test_tversky_against_numpy(case):
    logits, labels, overlapping = case
    probabilities, truth = regions(*case)
    found = (probabilities * truth).sum(axis=1)
    too_much, missed = (probabilities * (1 - truth)).sum(axis=1), ((1 - probabilities) * truth).sum(axis=1)
    index = of_foreground((found + 0.5) / (found + 0.2 * too_much + 0.9 * missed + 0.5), overlapping)
    plain = tversky_loss(logits, labels, 0.2, 0.9, overlapping=overlapping)
    assert plain.item() == pytest.approx((1 - index).mean(), rel=1e-5)
    focal = tversky_loss(logits, labels, 0.2, 0.9, 4 / 3, overlapping)
    assert focal.item() == pytest.approx(((1 - index) ** 0.75).mean(), rel=1e-5)


def test_tversky_with_equal_halves_is_dice(case):
    logits, labels, overlapping = case
    expected = dice_loss(logits, labels, overlapping)
    torch.testing.assert_close(tversky_loss(logits, labels, 0.5, 0.5, overlapping=overlapping), expected)


def test_dice_against_numpy(case):
    probabilities, truth = regions(*case)
    dice = (2 * (probabilities * truth).sum(axis=1) + 1) / (probabilities.sum(axis=1) + truth.sum(axis=1) + 1)
    assert dice_loss(*case).item() == pytest.approx((1 - of_foreground(dice, case[2])).mean(), rel=1e-5)


def test_focal_against_numpy(case):
    logits, labels, overlapping = case
    probabilities, truth = regions(*case)
    of_truth = np.where(truth == 1, probabilities, 1 - probabilities) if overlapping else (probabilities * truth).sum(0)
    expected = ((1 - of_truth) ** 2.5 * -np.log(of_truth)).mean()
    assert focal_loss(logits, labels, 2.5, overlapping).item() == pytest.approx(expected, rel=1e-4)


def test_focal_without_focus_is_the_cross_entropy(case):
    logits, labels, overlapping = case
    cross_entropy = segmentation_loss(*case) - dice_loss(*case)
    torch.testing.assert_close(focal_loss(logits, labels, 0.0, overlapping), cross_entropy, atol=1e-5, rtol=1e-5)


def test_overlapping_cross_entropy_is_the_binary_one():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 2, (2, 3, 4, 4))
    expected = F.binary_cross_entropy_with_logits(logits, labels.float()) + dice_loss(logits, labels, True)
    torch.testing.assert_close(segmentation_loss(logits, labels, True), expected)


def test_what_is_missed_is_dearer_than_what_is_too_much():
    truth = torch.zeros(1, 8, 8, dtype=torch.long)
    truth[0, 2:6, 2:6] = 1
    half, double = torch.zeros_like(truth), torch.zeros_like(truth)
    half[0, 2:4, 2:6], double[0, 2:6, 2:8] = 1, 1
    missed, too_much = (20.0 * F.one_hot(one, 2).movedim(-1, 1) for one in (half, double))
    assert tversky_loss(missed, truth, 0.1, 0.9) > 3 * tversky_loss(too_much, truth, 0.1, 0.9)
    assert tversky_loss(missed, truth, 0.9, 0.1) < tversky_loss(too_much, truth, 0.9, 0.1)


KINDS = {
    "dice_cross_entropy": lambda *case: segmentation_loss(*case),
    "dice_focal": lambda *case: focal_loss(*case[:2], 3.0, case[2]) + dice_loss(*case),
    "tversky": lambda *case: tversky_loss(*case[:2], 0.2, 0.8, 1.0, case[2]),
    "focal_tversky": lambda *case: tversky_loss(*case[:2], 0.2, 0.8, 2.0, case[2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_chooses(case, kind):
    logits, labels, overlapping = case
    config = BrainFoundConfig(
        segmentation_loss=kind,
        overlapping_labels=overlapping,
        tversky_alpha=0.2,
        tversky_beta=0.8,
        tversky_gamma=2.0,
        focal_gamma=3.0,
    )
    assert torch.equal(compute_segmentation_loss(config, logits, labels), KINDS[kind](*case))


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_answers_and_nothing_known_have_finite_gradients(case, kind):
    logits, labels, overlapping = case
    config = BrainFoundConfig(segmentation_loss=kind, overlapping_labels=overlapping, focal_gamma=0.5)
    perfect = (
        torch.where(labels == 1, 90.0, -90.0) if overlapping else 90.0 * F.one_hot(labels.clamp(0), 4).movedim(-1, 1)
    )
    for scores, truth in ((perfect, labels), (-perfect, labels), (logits, torch.full_like(labels, -100))):
        scores = scores.clone().requires_grad_()
        loss = compute_segmentation_loss(config, scores, truth)
        loss.backward()
        assert loss.isfinite()
        assert scores.grad.isfinite().all()
    assert compute_segmentation_loss(config, perfect, labels) < 1e-3
    assert compute_segmentation_loss(config, -perfect, labels) > 0.4


def test_unknown_pixels_do_not_count(case):
    logits, labels, overlapping = case
    unknown = labels == -100 if overlapping else (labels == -100)[:, None].expand_as(logits)
    changed = torch.where(unknown, 30 * torch.randn_like(logits), logits)
    for loss in (segmentation_loss, dice_loss):
        torch.testing.assert_close(loss(changed, labels, overlapping), loss(logits, labels, overlapping))
    for loss in (tversky_loss, focal_loss):
        expected = loss(logits, labels, overlapping=overlapping)
        torch.testing.assert_close(loss(changed, labels, overlapping=overlapping), expected)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("segmentation_loss", "tverski", "dice_cross_entropy, dice_focal, tversky, focal_tversky"),
        ("tversky_alpha", -0.1, "at least 0"),
        ("tversky_beta", float("nan"), "at least 0"),
        ("tversky_gamma", 0.5, "at least 1"),
        ("focal_gamma", -1, "at least 0"),
    ],
)
def test_wrong_settings_are_named(field, value, told):
    with pytest.raises(ModelError, match=f"config.{field}") as refused:
        BrainFoundConfig(**{field: value})
    assert told in str(refused.value)


def test_a_model_of_overlapping_labels(backbone_folder):
    model = BrainFoundForSegmentation.from_backbone(
        backbone_folder, num_labels=2, decoder_width=8, overlapping_labels=True
    )
    pixels, labels = torch.rand(1, 3, 3, 16, 16), torch.randint(0, 2, (1, 3, 2, 16, 16))
    mask = torch.tensor([[True, True, False]])
    output = model(pixels, slice_mask=mask, labels=labels)
    assert output.logits.shape == labels.shape
    torch.testing.assert_close(output.loss, segmentation_loss(output.logits[0, :2], labels[0, :2], True))
    with pytest.raises(ModelError, match=r"labels.*\(1, 3, 16, 16\).*\(1, 3, 2, 16, 16\)"):
        model(pixels, labels=labels[:, :, 0])
