"""Tiny plain ViTs on disk, one per supported family, with weights far from their initial values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

FAMILIES = {
    "dinov2": (Dinov2Config, Dinov2Model),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
}
PATCH = 8


def write_backbone(folder: Path, family: str = "dinov2", num_layers: int = 3, **config) -> Path:
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


def library_tokens(folder: Path, model_class: type, images: torch.Tensor, mean=0.449, std=0.226) -> torch.Tensor:
    """The tokens of transformers' own model."""
    model = model_class.from_pretrained(folder)
    with torch.no_grad():
        return model((images - mean) / std).last_hidden_state


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dinov2 of 3 blocks, width 32, patch 8, made for 40 × 40 pixels."""
    return write_backbone(tmp_path_factory.mktemp("backbone") / "dinov2")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
