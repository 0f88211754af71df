"""The last layer of a decoder, fitted before training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from brainfound.errors import TrainingError
from brainfound.finetuning import fitted_heads
from brainfound.finetuning.fitted_heads import AugmentedPasses, fit_decoder
from brainfound.finetuning.linear_models import fit_pixel_logistic
from brainfound.finetuning.tasks import Segmentation, SegmentationRecipe, resolve
from brainfound.finetuning.volumes import PRESETS, VolumeReader
from brainfound.models import BrainFoundForSegmentation
from brainfound.training.randomness import StepKey

TRAIN, TEST = [0, 1, 2, 3, 5, 6, 8, 9, 11], [4, 7, 10]
KEY = StepKey(seed=0, step=0, micro_batch=0, rank=0)
REGIONS = {"whole": [1, 2], "core": [1]}


def make(small_store, tiny_backbone, regions=None, **fields) -> tuple[BrainFoundForSegmentation, Segmentation]:
    target = resolve(small_store, TRAIN, "mask", SegmentationRecipe(regions=regions or {}))
    fields = {"decoder_width": 16, "num_labels": len(target.names), "overlapping_labels": bool(regions)} | fields
    return BrainFoundForSegmentation.from_backbone(tiny_backbone, contrasts=small_store.contrasts, **fields), target


def reader_of(small_store, sessions=TRAIN) -> VolumeReader:
    return VolumeReader(small_store, sessions, 6, foreground_share=0.5)


def fit(model, small_store, target, augmentation="none", num_passes=2, seed=0) -> None:
    fit_decoder(model, target, AugmentedPasses(reader_of(small_store), PRESETS[augmentation], num_passes, 4, seed))


def loss(model, small_store, target) -> float:
    volumes, _ = VolumeReader(small_store, TEST, 50).read(range(len(TEST)), KEY)
    labels = torch.from_numpy(target.encode_mask(np.asarray(volumes.masks)).astype(np.int64))
    with torch.no_grad():
        return float(model.eval()(**volumes.inputs(), labels=labels).loss)


@pytest.mark.parametrize("regions", [None, REGIONS])
@pytest.mark.parametrize("decoder", ["linear", "fpn", "unetr"])
def test_a_fitted_decoder_starts_better_than_a_random_one(small_store, tiny_backbone, decoder, regions):
    model, target = make(small_store, tiny_backbone, regions, decoder=decoder)
    before = loss(model, small_store, target)
    fit(model, small_store, target)
    assert loss(model, small_store, target) < 0.7 * before


def test_only_the_last_layer_changes_and_the_same_seed_gives_the_same(small_store, tiny_backbone):
    def fitted(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model, target = make(small_store, tiny_backbone)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        fit(model, small_store, target, "strong", num_passes=1, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        after = model.state_dict()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == {"decoder.score.weight", "decoder.score.bias"}
        return after

    first, second, other = fitted(3), fitted(3), fitted(4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["decoder.score.weight"], other["decoder.score.weight"])


@pytest.mark.parametrize("mixing", [False, True])
def test_features_at_pixels_give_the_scores_of_the_model(small_store, tiny_backbone, mixing, monkeypatch):
    """In the order of volumes and slices, with padded slices left out, chunk by chunk."""
    model, _ = make(small_store, tiny_backbone, decoder_slice_mixing=mixing, slice_chunk=4)
    short = small_store[TRAIN[0]]
    monkeypatch.setattr(type(small_store), "__getitem__", _shortened(type(small_store).__getitem__, TRAIN[0], 5))
    assert len(small_store[TRAIN[0]].pixels) == 5 < len(short.pixels)
    reader = VolumeReader(small_store, TRAIN[:3], 50, foreground_share=0.5, neighbours=True)
    volumes, _ = next(AugmentedPasses(reader, PRESETS["none"], 1, 3, 0).batches(torch.device("cpu")))
    assert not volumes.slice_mask.all()
    with torch.no_grad():
        maps = fitted_heads._capture_layer_input(model.decoder.score, model.eval(), volumes.inputs())
        logits = model(**volumes.inputs()).logits[volumes.slice_mask]
    rng = np.random.default_rng(0)
    pixels = np.stack([rng.integers(0, side, 200) for side in (len(maps), 32, 32)])
    found = torch.from_numpy(fitted_heads._sample_at_pixels(maps, pixels, (32, 32)))
    scores = torch.nn.functional.linear(found, model.decoder.score.weight[:, :, 0, 0], model.decoder.score.bias)
    torch.testing.assert_close(scores, logits[pixels[0], :, pixels[1], pixels[2]], atol=1e-4, rtol=1e-4)


def _shortened(read, session: int, num_slices: int):
    def shortened(self, index):
        stack = read(self, index)
        if index != session:
            return stack
        middle = slice(len(stack.pixels) // 2, len(stack.pixels) // 2 + num_slices)
        return replace(
            stack, pixels=stack.pixels[middle], mask=stack.mask[middle], positions_mm=stack.positions_mm[middle]
        )

    return shortened


@pytest.mark.parametrize(("most", "read"), [(500, 27), (20, 18), (9, 9), (4, 4)])
def test_of_a_large_cohort_a_part_is_read(small_store, tiny_backbone, monkeypatch, most, read):
    monkeypatch.setattr(fitted_heads, "MAX_VOLUMES", most)
    model, target = make(small_store, tiny_backbone)
    sessions = []
    one = VolumeReader.read
    monkeypatch.setattr(VolumeReader, "read", lambda *given: sessions.extend((made := one(*given))[1]) or made)
    fit(model, small_store, target, num_passes=3)
    assert len(sessions) == read
    assert set(sessions) <= set(TRAIN)
    assert len(set(sessions)) == min(read, len(TRAIN))


def test_chosen_pixels_stand_for_all():
    rng = np.random.default_rng(0)
    labels = rng.choice(4, size=(5, 8, 8, 1), p=[0.9, 0.06, 0.03, 0.01])
    pixels, weights = fitted_heads._choose_pixels(labels, 10, rng)
    truth = labels[tuple(pixels)][:, 0]
    for k, size in zip(*np.unique(labels, return_counts=True), strict=True):
        assert (truth == k).sum() == min(size, 10)
        assert weights[truth == k].sum() == pytest.approx(size)
    assert len({tuple(pixel) for pixel in pixels.T}) == len(weights), "no pixel twice"


def test_overlapping_labels_are_chosen_by_what_they_have_in_common():
    labels = np.zeros((1, 10, 10, 2), dtype=np.uint8)
    labels[0, :3, :, 0] = 1
    labels[0, :1, :3, 1] = 1
    pixels, weights = fitted_heads._choose_pixels(labels, 5, np.random.default_rng(0))
    truth = labels[tuple(pixels)]
    groups = {(0, 0): (5, 70), (1, 0): (5, 27), (1, 1): (3, 3)}
    for group, (count, size) in groups.items():
        here = (truth == group).all(axis=1)
        assert (here.sum(), weights[here].sum()) == (count, pytest.approx(size))


def test_shares_of_the_answer_are_those_of_the_weighted_classes():
    """What distinguishes a fit with weights from one that takes every class for equally common."""
    rng = np.random.default_rng(0)
    classes = rng.choice([0, 1, 3], 600)
    features = rng.normal(size=(600, 5)) + classes[:, None]
    weights = np.where(classes == 0, 20.0, 1.0)
    weights = weights / weights.mean()
    weight, bias = fit_pixel_logistic(features, classes, weights, 5)
    probabilities = softmax(features @ weight.T + bias, axis=1)
    shares = [(weights * (classes == k)).sum() / 600 for k in range(5)]
    np.testing.assert_allclose((weights[:, None] * probabilities).sum(axis=0) / 600, shares, atol=0.01)
    assert not weight[[2, 4]].any()
    np.testing.assert_allclose(probabilities[:, [2, 4]].mean(axis=0), 1 / 600, rtol=0.05)


@pytest.mark.parametrize("classes", [[0, 0, 0], [2, 2, 2]])
def test_one_class_in_all_chosen_pixels(classes):
    weight, bias = fit_pixel_logistic(np.ones((3, 4)), np.array(classes), np.ones(3), 3)
    assert not weight.any()
    assert bias.argmax() == classes[0]


def test_two_classes_of_a_softmax_are_as_sure_as_the_log_odds_say():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 3))
    classes = (features[:, 0] + 0.5 * rng.normal(size=400) > 0).astype(int)
    weight, bias = fit_pixel_logistic(features, classes, np.ones(400), 2)
    three, three_bias = fit_pixel_logistic(features, classes, np.ones(400), 3)
    probabilities = softmax(features @ weight.T + bias, axis=1)
    assert -np.log(probabilities[np.arange(400), classes]).mean() < 0.35
    np.testing.assert_allclose(weight[1] - weight[0], three[1] - three[0])
    np.testing.assert_allclose(bias, three_bias[:2])


def test_features_that_are_not_finite_are_refused(small_store, tiny_backbone):
    model, target = make(small_store, tiny_backbone)
    with torch.no_grad():
        model.decoder.projections["3"][1].bias[0] = float("nan")
    before = model.decoder.score.weight.clone()
    with pytest.raises(TrainingError, match="not finite"):
        fit(model, small_store, target)
    assert torch.equal(model.decoder.score.weight, before)
