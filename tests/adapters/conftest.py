"""Tiny models to adapt."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from brainfound.adapters import AdapterRecipe, attach_adapter
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.models import (
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
    BrainFoundModel,
)

CONTRASTS = ("T1w", "FLAIR")
KINDS = {
    "classification": BrainFoundForClassification,
    "regression": BrainFoundForRegression,
    "segmentation": BrainFoundForSegmentation,
}


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


@pytest.fixture(scope="session")
def adapted():
    """A model of a task with every trained weight away from where it started."""

    def make(folder, task="classification", method="lora", aggregator="attention", roles=None, **config):
        model = KINDS[task].from_pretrained(folder, aggregator=aggregator, decoder_width=8, **config)
        roles = roles or ("query", "mlp_in", *(() if method == "pissa" else ("patch",)))
        model = attach_adapter(model, AdapterRecipe(method=method, roles=roles, blocks=1))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def answers():
    def ask(model, inputs):
        with torch.no_grad():
            return {name: value for name, value in model.eval()(**inputs).items() if name != "loss"}

    return ask


@pytest.fixture(scope="session")
def assert_same_answers():
    def compare(first, second, tolerance=1e-6):
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, atol=tolerance, rtol=tolerance)

    return compare
