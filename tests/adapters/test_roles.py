"""Roles → module names."""

import pytest
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from brainfound.adapters import ROLES, resolve_targets
from brainfound.errors import ModelError, RecipeError
from brainfound.models import BrainFoundForClassification, BrainFoundForSegmentation

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 8}


@pytest.mark.parametrize(
    ("role", "name"),
    [
        ("query", "attention.q_proj"),
        ("key", "attention.k_proj"),
        ("value", "attention.v_proj"),
        ("output", "attention.o_proj"),
        ("mlp_in", "mlp.fc1"),
        ("mlp_out", "mlp.fc2"),
    ],
)
def test_each_role_has_its_module_in_each_block(role, name):
    for model in (Dinov2Model(Dinov2Config(**TINY)), Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TINY))):
        assert resolve_targets(model, [role]) == [f"encoder.layer.{index}.{name}" for index in range(2)]


def test_gated_mlps_have_two_ways_in():
    model = Dinov2Model(Dinov2Config(**TINY, use_swiglu_ffn=True))
    names = resolve_targets(model, ["mlp_in", "mlp_out"], layers=[2])
    assert [name.rsplit(".", 1)[-1] for name in names] == ["gate_proj", "up_proj", "down_proj"]


def test_only_the_backbone_is_searched(backbone_folder):
    """The attention aggregator has a `value`, the transformer aggregator an `output`; neither is a ViT's."""
    for kind, aggregator in ((BrainFoundForClassification, "attention"), (BrainFoundForSegmentation, "transformer")):
        names = resolve_targets(kind.from_backbone(backbone_folder, aggregator=aggregator), list(ROLES))
        assert len(names) == 3 * 6 + 1
        assert all(name.startswith("brainfound.encoder.backbone.") for name in names)


def test_blocks_are_counted_from_one(backbone_folder):
    model = BrainFoundForClassification.from_backbone(backbone_folder)
    names = resolve_targets(model, ["query", "patch"], layers=[1, 3])
    assert [name.split("backbone.")[1] for name in names] == [
        "embeddings.patch_embeddings.projection",
        "encoder.layer.0.attention.q_proj",
        "encoder.layer.2.attention.q_proj",
    ]
    with pytest.raises(ModelError, match=r"no block \[4\].*1 to 3"):
        resolve_targets(model, ["query"], layers=[4])


def test_unknown_roles_are_refused():
    with pytest.raises(RecipeError, match="Did you mean query"):
        resolve_targets(nn.Linear(2, 2), ["querry"])


def test_a_role_that_nothing_plays_is_refused():
    class Bare(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self):
            super().__init__(PreTrainedConfig())
            self.dense = nn.Linear(2, 2)

    with pytest.raises(ModelError, match="no module of Bare has the role 'key'"):
        resolve_targets(Bare(), ["key"])
