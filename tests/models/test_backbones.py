"""The registry of backbone families, and what derives from it."""

import pytest

from brainfound.errors import ModelError
from brainfound.models import BrainFoundConfig, BrainFoundModel
from brainfound.models.backbones import FAMILIES, SUPPORTED_BACKBONES


@pytest.mark.parametrize("name", FAMILIES)
def test_each_line_names_the_model_type_of_its_class(name):
    family = FAMILIES[name]
    assert family.config_class.model_type == name
    assert (name in SUPPORTED_BACKBONES) == (family.becomes is None)
    assert (family.becomes or name) in SUPPORTED_BACKBONES


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_has_a_supported_type(name):
    if name in SUPPORTED_BACKBONES:
        assert BrainFoundConfig(backbone_config={"model_type": name}).backbone_config.model_type == name
    else:
        with pytest.raises(ModelError, match=rf"'{name}' .*one of {', '.join(SUPPORTED_BACKBONES)}"):
            BrainFoundConfig(backbone_config={"model_type": name})


def test_blocks_and_last_norm_are_found_by_the_paths_of_the_family(any_backbone):
    encoder = BrainFoundModel.from_backbone(any_backbone[0]).encoder
    assert len(encoder.blocks) == encoder.num_layers
    assert encoder.norm is encoder.backbone.layernorm
