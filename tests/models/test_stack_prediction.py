"""One stack through a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainfound.adapters import AdapterRecipe, attach_adapter
from brainfound.data.batches import collate, evenly_spaced_slices
from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import ModelError
from brainfound.models import (
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
    BrainFoundModel,
    stack_prediction,
)
from brainfound.models.stack_prediction import infer

CONTRASTS = ("T1w", "FLAIR")


@pytest.fixture
def stack() -> Stack:
    """Nine different slices; FLAIR is absent."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 2, 16, 24), dtype=np.uint8)
    pixels[:, 1] = 0
    return Stack(
        pixels=pixels,
        contrasts=CONTRASTS,
        present=np.array([True, False]),
        positions_mm=(np.arange(9, dtype=np.float32) - 4) * 3,
        affine=np.eye(4),
        native_shape=(9, 16, 24),
        native_affine=np.eye(4),
    )


def build(kind, folder, **config):
    return kind.from_backbone(folder, contrasts=CONTRASTS, **config)


@pytest.mark.parametrize("mixing", [False, True])
def test_chunks_do_not_change_a_segmentation(backbone_folder, stack, monkeypatch, mixing):
    model = build(
        BrainFoundForSegmentation, backbone_folder, num_labels=3, decoder_width=8, decoder_slice_mixing=mixing
    )
    for name, parameter in model.decoder.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    whole = infer(model, stack)
    monkeypatch.setattr(stack_prediction, "SEGMENTATION_CHUNK", 4)
    chunked = infer(model, stack)
    assert whole.classes.shape == (9, 16, 24)
    assert len(np.unique(whole.classes)) > 1
    assert np.array_equal(chunked.classes, whole.classes)
    np.testing.assert_allclose(chunked.foreground_probability, whole.foreground_probability, atol=1e-5)
    assert ((whole.classes > 0) <= (whole.foreground_probability > 1 / 3 - 1e-6)).all()


def test_segmentation_slices_keep_their_order(backbone_folder, stack):
    model = build(BrainFoundForSegmentation, backbone_folder, num_labels=2, decoder_width=8)
    every = infer(model, stack).foreground_probability
    with torch.inference_mode():
        alone = model(**collate([stack], [np.array([6])]).inputs()).logits[0].softmax(dim=1)
    np.testing.assert_allclose(every[6], 1 - alone[0, 0], atol=1e-5)
    assert not np.allclose(every[6], every[5], atol=1e-4)


def test_the_read_slices_are_reported_and_their_embeddings_are_in_order(backbone_folder, stack):
    model = build(BrainFoundModel, backbone_folder, aggregator="attention")
    some, every = infer(model, stack, 3), infer(model, stack)
    assert some.slices.tolist() == evenly_spaced_slices(9, 3).tolist() == [1, 4, 7]
    assert every.slices.tolist() == list(range(9))
    np.testing.assert_allclose(some.slice_embeddings, every.slice_embeddings[some.slices], atol=1e-5)
    assert some.slice_weights.sum() == pytest.approx(1, abs=1e-5)
    assert some.embedding.shape == (32,)
    assert some.probabilities is None
    assert some.classes is None


def test_each_head_answers_its_own_question(backbone_folder, stack):
    classes = infer(build(BrainFoundForClassification, backbone_folder, num_labels=3), stack)
    assert classes.probabilities.shape == (3,)
    assert classes.probabilities.sum() == pytest.approx(1, abs=1e-5)
    both = build(BrainFoundForClassification, backbone_folder, num_labels=3, problem_type="multi_label_classification")
    with torch.no_grad():
        both.head.score.bias.fill_(5.0)
        both.head.score.weight.zero_()
    assert (infer(both, stack).probabilities > 0.99).all()
    number = build(BrainFoundForRegression, backbone_folder, target_mean=50.0, target_std=2.0)
    with torch.no_grad():
        number.head.score.weight.zero_()
        number.head.score.bias.fill_(1.0)
    assert infer(number, stack).value == pytest.approx(52.0)
    assert infer(number, stack).value_std is None


def test_an_adapted_model_answers_and_is_left_in_eval_mode(backbone_folder, stack):
    model = build(BrainFoundForClassification, backbone_folder, num_labels=2, head_dropout=0.9)
    plain = infer(model, stack).probabilities
    adapted = attach_adapter(model, AdapterRecipe(rank=2)).train()
    np.testing.assert_allclose(infer(adapted, stack).probabilities, plain, atol=1e-6)
    assert not adapted.training


@pytest.mark.parametrize("contrasts", [("FLAIR", "T1w"), ("T1w", "T2w")])
def test_data_of_other_contrasts_is_refused(backbone_folder, stack, contrasts):
    model = BrainFoundModel.from_backbone(backbone_folder, contrasts=contrasts)
    with pytest.raises(ModelError, match=rf"--contrasts {','.join(contrasts)}"):
        infer(model, stack)


def test_any_other_model_is_refused(backbone_folder, stack):
    encoder = BrainFoundModel.from_backbone(backbone_folder, contrasts=CONTRASTS)
    with pytest.raises(ModelError, match="not a BrainFound model"):
        infer(Stranger(encoder), stack)


class Stranger(torch.nn.Module):
    """Has a configuration and answers, but is none of ours."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs):
        return self.model(**inputs)
