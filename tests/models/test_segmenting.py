"""Readings of a stack that are averaged, and overlapping labels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from brainfound.data.preprocessing.stack import Stack
from brainfound.models import BrainFoundForSegmentation
from brainfound.models.stack_prediction import FlipAndShift, InferenceAugmentation, infer, segment

CONTRASTS = ("T1w", "FLAIR")
EVERY = InferenceAugmentation(flips=True, overlap=True)


def stack_of(pixels) -> Stack:
    return Stack(
        pixels=pixels,
        contrasts=CONTRASTS,
        present=np.array([True, True]),
        positions_mm=np.arange(len(pixels), dtype=np.float32),
        affine=np.eye(4),
        native_shape=(len(pixels), *pixels.shape[2:]),
        native_affine=np.eye(4),
    )


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (5, 2, 16, 24), dtype=np.uint8)


@pytest.fixture
def model(backbone_folder):
    return BrainFoundForSegmentation.from_backbone(backbone_folder, CONTRASTS, num_labels=3, decoder_width=8).eval()


def probabilities(model, pixels, augmentation=InferenceAugmentation()):
    return infer(model, stack_of(pixels), None, augmentation, True).class_probabilities


def mirrored(array):
    return np.ascontiguousarray(array[..., ::-1])


def test_readings_are_off_unless_requested(model, pixels):
    assert InferenceAugmentation().variants(8) == [FlipAndShift()]
    assert [
        len(InferenceAugmentation(flips, overlap).variants(8)) for flips in (False, True) for overlap in (False, True)
    ] == [1, 4, 2, 8]
    with torch.inference_mode():
        plain = model(torch.from_numpy(pixels)[None]).logits[0].softmax(dim=1).numpy()
    np.testing.assert_array_equal(probabilities(model, pixels), plain)


def test_flips_are_the_mean_of_both_sides(model, pixels):
    one, other = probabilities(model, pixels), mirrored(probabilities(model, mirrored(pixels)))
    assert np.abs(one - other).max() > 1e-3
    both = probabilities(model, pixels, InferenceAugmentation(flips=True))
    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-6)


def test_with_flips_a_mirrored_head_gets_the_mirrored_answer(model, pixels):
    flips = InferenceAugmentation(flips=True)
    expected = mirrored(probabilities(model, pixels, flips))
    np.testing.assert_array_equal(probabilities(model, mirrored(pixels), flips), expected)
    symmetric = np.maximum(pixels, mirrored(pixels))
    found = probabilities(model, symmetric, flips)
    np.testing.assert_array_equal(found, mirrored(found))


class PixelByPixel(nn.Module):
    """Looks at one pixel at a time, so that no reading should change its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(3.0))

    def forward(self, pixel_values, **others):
        darkness = 1 - pixel_values[:, :, :1].float() / 255
        return SimpleNamespace(logits=torch.cat([darkness, self.slope * darkness**2, 1 - darkness], dim=2))


def settings(**changes):
    fields = {"num_classes": 3, "overlapping_labels": False, "decoder_slice_mixing": False, "stem": "channels"}
    return SimpleNamespace(**(fields | changes))


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize(
    "augmentation", [InferenceAugmentation(flips=True), InferenceAugmentation(overlap=True), EVERY]
)
def test_readings_come_back_to_their_own_place(pixels, augmentation, overlapping):
    """Also at the borders, where a moved reading saw nothing."""
    config = settings(overlapping_labels=overlapping)
    once, often = (
        segment(PixelByPixel(), config, stack_of(pixels), 2, 8, how, True)
        for how in (InferenceAugmentation(), augmentation)
    )
    np.testing.assert_allclose(often.class_probabilities, once.class_probabilities, atol=1e-6)
    if overlapping:
        assert often.classes is None
        clear = np.abs(once.class_probabilities - 0.5) > 1e-4
        np.testing.assert_array_equal(often.labels[clear], once.labels[clear])
    else:
        np.testing.assert_array_equal(often.classes, once.class_probabilities.argmax(axis=1))
        np.testing.assert_allclose(often.foreground_probability, 1 - once.class_probabilities[:, 0], atol=1e-5)


def test_overlap_is_the_mean_over_four_patch_grids(model, pixels):
    half = 4
    total, count = np.zeros((5, 3, 16, 24)), np.zeros((16, 24))
    for rows, columns in ((0, 0), (half, 0), (0, half), (half, half)):
        moved = np.zeros_like(pixels)
        moved[:, :, rows:, columns:] = pixels[:, :, : 16 - rows, : 24 - columns]
        total[:, :, : 16 - rows, : 24 - columns] += probabilities(model, moved)[:, :, rows:, columns:]
        count[: 16 - rows, : 24 - columns] += 1
    assert count[0, 0] == 4
    assert count[-1, -1] == 1
    np.testing.assert_allclose(
        probabilities(model, pixels, InferenceAugmentation(overlap=True)), total / count, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, [2, 2, 1]),
        ({"decoder_slice_mixing": True}, [3, 4, 2]),
        ({"stem": "slices"}, [3, 4, 2]),
        ({"decoder_slice_mixing": True, "stem": "slices"}, [4, 5, 3]),
    ],
)
def test_slices_next_to_a_chunk_are_read_with_it(pixels, changes, lengths):
    read = []
    model = PixelByPixel()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["pixel_values"].shape[1]), with_kwargs=True
    )
    whole = segment(model, settings(), stack_of(pixels), 5, 8, InferenceAugmentation(), True)
    chunked = segment(model, settings(**changes), stack_of(pixels), 2, 8, InferenceAugmentation(), True)
    assert read == [5, *lengths]
    np.testing.assert_array_equal(chunked.class_probabilities, whole.class_probabilities)
    read.clear()
    segment(model, settings(**changes), stack_of(pixels), 2, 8, EVERY)
    assert read == [length for length in lengths for _ in range(8)]


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("stem", ["slices", "channels"])
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_neighbours_are_never_cut_apart(backbone_folder, pixels, mixing, stem, chunk):
    """In chunks a slice is answered as in the whole stack, also at the edges of a chunk; batches round differently."""
    contrasts = CONTRASTS[:1]
    model = BrainFoundForSegmentation.from_backbone(
        backbone_folder, contrasts, num_labels=3, decoder_width=8, stem=stem, decoder_slice_mixing=mixing
    ).eval()
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if parameter.dim() > 1 or "slice_mixing" in name:
                parameter.normal_(std=0.3)
    stack = replace(stack_of(pixels[:, :1]), contrasts=contrasts, present=np.array([True]))

    def ask(slices):
        return segment(model, model.config, stack, slices, model.encoder.patch_size, InferenceAugmentation(), True)

    whole, chunked = ask(5).class_probabilities, ask(chunk).class_probabilities
    np.testing.assert_allclose(chunked, whole, atol=2e-6)
    alone = segment(model, model.config, replace(stack, pixels=stack.pixels[2:3]), 5, 8, InferenceAugmentation(), True)
    blind = np.allclose(alone.class_probabilities[0], whole[2], atol=1e-3)
    assert blind == (stem == "channels" and not mixing)


@pytest.mark.parametrize("num_classes", [256, 257, 300])
def test_no_class_index_wraps(backbone_folder, pixels, num_classes):
    model = BrainFoundForSegmentation.from_backbone(backbone_folder, CONTRASTS, num_labels=num_classes, decoder_width=8)
    with torch.no_grad():
        model.decoder.score.weight.zero_()
        model.decoder.score.bias.zero_()[-1] = 9.0
    answer = infer(model, stack_of(pixels))
    assert np.unique(answer.classes).tolist() == [num_classes - 1]
    assert answer.classes.dtype == (np.uint8 if num_classes == 256 else np.uint16)


def test_overlapping_labels_are_independent(backbone_folder, pixels):
    model = BrainFoundForSegmentation.from_backbone(
        backbone_folder, CONTRASTS, num_labels=2, decoder_width=8, overlapping_labels=True
    )
    with torch.no_grad():
        model.decoder.score.weight.zero_()
        model.decoder.score.bias.copy_(torch.tensor([2.0, 1.0]))
    answer = infer(model, stack_of(pixels))
    assert answer.classes is None
    assert answer.labels.shape == (5, 2, 16, 24)
    assert answer.labels.all()
    np.testing.assert_allclose(answer.foreground_probability, 1 / (1 + np.exp(-2.0)), atol=1e-6)
    assert answer.class_probabilities is None
