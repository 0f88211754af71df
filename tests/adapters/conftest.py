"""Tiny models to adapt."""

import pytest
import torch

from brainfound.adapters import AdapterRecipe, attach_adapter
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.models import (
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
    BrainFoundModel,
)
from tests.tiny_backbones import _seed, backbone_folder  # noqa: F401

CONTRASTS = ("T1w", "FLAIR")
KINDS = {
    "classification": BrainFoundForClassification,
    "regression": BrainFoundForRegression,
    "segmentation": BrainFoundForSegmentation,
}


@pytest.fixture(scope="session")
def export_folder(backbone_folder, tmp_path_factory):  # noqa: F811
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
