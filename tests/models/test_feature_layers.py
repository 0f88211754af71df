"""Slice embeddings from several blocks, and heads without a norm."""

import json

import pytest
import torch

from brainfound.errors import ModelError
from brainfound.models import BrainFoundForRegression, BrainFoundModel


def test_each_block_passes_the_last_norm(backbone_folder):
    model = BrainFoundModel.from_backbone(backbone_folder, slice_features="cls_and_patches", feature_layers=[3, 1])
    plain = BrainFoundModel.from_backbone(backbone_folder, slice_features="cls_and_patches")
    pixels = torch.rand(1, 2, 3, 16, 16)
    with torch.no_grad():
        last, first = model(pixels).slice_embeddings.split(64, dim=2)
        assert torch.equal(last, plain(pixels).slice_embeddings)
        del plain.encoder.blocks[1:]
        torch.testing.assert_close(first, plain(pixels).slice_embeddings)
    assert model.config.embedding_size == model.config.volume_embedding_size == 128


@pytest.mark.parametrize("stem", ["per_contrast", "slices"])
def test_other_stems_embed_several_blocks(backbone_folder, stem):
    contrasts = ("T1w",) if stem == "slices" else ("T1w", "FLAIR")
    options = {"contrasts": contrasts, "stem": stem, "slice_features": "patches"}
    model = BrainFoundModel.from_backbone(backbone_folder, feature_layers=[2, 3], **options)
    plain = BrainFoundModel.from_backbone(backbone_folder, **options)
    pixels = torch.rand(1, 3, len(contrasts), 16, 16)
    with torch.no_grad():
        several, last = (one(pixels).slice_embeddings for one in (model, plain))
    assert several.shape == (1, 3, 64)
    torch.testing.assert_close(several[..., 32:], last)


def test_a_head_without_norm_is_linear_and_returns(backbone_folder, tmp_path):
    fields = {"feature_layers": [1, 3], "aggregator": "mean_std", "head_norm": "none"}
    model = BrainFoundForRegression.from_backbone(backbone_folder, **fields).eval()
    model.save_pretrained(tmp_path)
    again = BrainFoundForRegression.from_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 3, 16, 16)
    with torch.no_grad():
        output = model(pixels)
        assert output.volume_embedding.shape == (2, 128)
        expected = output.volume_embedding @ model.head.score.weight[0] + model.head.score.bias
        torch.testing.assert_close(output.predictions, expected)
        assert torch.equal(again(pixels).predictions, output.predictions)
    with pytest.raises(ModelError, match="other outputs.*expected .*cls of blocks 1, 3, mean_std, not normalised"):
        BrainFoundForRegression.from_pretrained(tmp_path, head_norm="layer")


def test_a_checkpoint_of_before_loads(backbone_folder, tmp_path):
    model = BrainFoundForRegression.from_backbone(backbone_folder)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["feature_layers"], content["head_norm"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert BrainFoundForRegression.from_pretrained(tmp_path).config.feature_layers is None


@pytest.mark.parametrize("layers", [[], [0], [4]])
def test_blocks_that_are_not_there_are_refused(backbone_folder, layers):
    with pytest.raises(ModelError, match="config.feature_layers.*numbers from 1 to 3"):
        BrainFoundModel.from_backbone(backbone_folder, feature_layers=layers)
