"""Tiny plain ViTs on disk; see `tests/tiny_backbones.py`."""

import pytest

from tests import tiny_backbones
from tests.tiny_backbones import FAMILIES, _seed, backbone_folder  # noqa: F401


@pytest.fixture(scope="session", params=list(FAMILIES))
def any_backbone(request, tmp_path_factory):
    """(folder, library model class) for each supported family."""
    folder = tmp_path_factory.mktemp("backbone") / request.param
    return tiny_backbones.write_backbone(folder, request.param), FAMILIES[request.param][1]


@pytest.fixture(scope="session")
def write_backbone():
    """Writes a tiny ViT: write_backbone(folder, family="dinov2", num_layers=3, **config)."""
    return tiny_backbones.write_backbone
