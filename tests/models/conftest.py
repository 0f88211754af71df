"""Tiny plain ViTs on disk, one per supported family, with weights far from their initial values."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

FAMILIES = {
    "dinov2": (Dinov2Config, Dinov2Model),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
}
PATCH = 8


def _write_backbone(folder, family="dinov2", num_layers=3, **config):
    config_class, model_class = FAMILIES[family]
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "image_size": 5 * PATCH,
        **config,
    }
    torch.manual_seed(7)
    model = model_class(config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory):
    """A Dinov2 of 3 blocks, width 32, patch 8, made for 40 × 40 pixels."""
    return _write_backbone(tmp_path_factory.mktemp("backbone") / "dinov2")


@pytest.fixture(scope="session", params=list(FAMILIES))
def any_backbone(request, tmp_path_factory):
    """(folder, library model class) for each supported family."""
    folder = _write_backbone(tmp_path_factory.mktemp("backbone") / request.param, request.param)
    return folder, FAMILIES[request.param][1]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def write_backbone():
    """Writes a tiny ViT: write_backbone(folder, family="dinov2", num_layers=3, **config)."""
    return _write_backbone
