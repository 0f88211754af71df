"""Tiny models to adapt."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from brainfound.data.preprocessing import Preprocessing
from brainfound.models import BrainFoundModel

CONTRASTS = ("T1w", "FLAIR")


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory):
    """A plain Dinov2 of 3 blocks, width 32, patch 8."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, patch_size=8, image_size=40
    )
    model = Dinov2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def export_folder(backbone_folder, tmp_path_factory):
    """A saved BrainFoundModel over two contrasts, as pretraining exports it."""
    folder = tmp_path_factory.mktemp("adapters") / "export"
    BrainFoundModel.from_backbone(backbone_folder, CONTRASTS, aggregator="attention").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def preprocessing():
    return Preprocessing(contrasts=CONTRASTS, size=(16, 16))


@pytest.fixture
def inputs():
    return {
        "pixel_values": torch.rand(2, 4, 2, 16, 24),
        "contrast_mask": torch.tensor([[True, True], [False, True]]),
        "slice_mask": torch.tensor([[True] * 4, [True, True, False, False]]),
    }


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
