"""Which part of the encoder is trained: what may move, what cannot, and what is exported."""

from __future__ import annotations

import copy

import pytest
import torch

from brainfound.errors import RecipeError
from brainfound.models import BrainFoundModel
from brainfound.pretraining.starting_model import (
    TrainedPartRecipe,
    merge_adapters,
    merged_state_dict,
    select_trainable_part,
)
from brainfound.recipes import validate
from brainfound.training.optim import OptimRecipe, parameter_settings

NEW = {"embeddings.mask_token", "embeddings.patch_embeddings.contrast_embedding.weight"}


def chosen(model, **settings):
    return select_trainable_part(model.encoder, TrainedPartRecipe(**settings), seed=0)


def trained_names(encoder) -> set[str]:
    return {name.removeprefix("backbone.") for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def learnt(encoder):
    """The encoder with updates that are no longer zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return encoder


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 32, 32, generator=generator), torch.tensor([[True] * 3, [True, False, True], [True] * 3])


def answers(encoder) -> torch.Tensor:
    with torch.no_grad():
        encoding = encoder.eval()(*inputs())
    return torch.cat([encoding.cls[:, None], encoding.patches], dim=1)


def test_full_trains_everything(model):
    encoder = chosen(model)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder is model.encoder  # objectives copy it; one copy more would be in the way of large models


def test_last_blocks_trains_them_the_last_norm_and_what_is_new(model):
    names = trained_names(chosen(model, part="last_blocks", blocks=1))
    block = {name for name in names if name.startswith("encoder.layer.1.")}
    assert len(block) == len(list(model.encoder.blocks[1].parameters()))
    assert names - block == {"layernorm.weight", "layernorm.bias", *NEW}
    nothing = trained_names(chosen(model, part="last_blocks", blocks=0))
    assert nothing == {"layernorm.weight", "layernorm.bias", *NEW}
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())  # of a copy


def test_lora_trains_updates_of_the_frozen_blocks_and_all_norms_besides(model):
    names = trained_names(chosen(model, part="lora", blocks=1, rank=4, roles=("query", "output")))
    updates = {name for name in names if "lora_" in name}
    assert updates == {
        f"encoder.layer.0.attention.{matrix}.lora_{side}.default.weight"
        for matrix in ("q_proj", "o_proj")
        for side in "AB"
    }
    norms = {f"encoder.layer.0.norm{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    block = {name for name in names if name.startswith("encoder.layer.1.")}
    assert len(block) == len(list(model.encoder.blocks[1].parameters()))
    assert names == updates | norms | block | {"layernorm.weight", "layernorm.bias", *NEW}


def test_updates_change_no_answer_at_first_and_are_drawn_from_the_seed(model):
    torch.manual_seed(1)
    one = chosen(model, part="lora", rank=4)
    torch.manual_seed(2)
    other = chosen(model, part="lora", rank=4)
    assert torch.equal(answers(one), answers(model.encoder))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    third = select_trainable_part(model.encoder, TrainedPartRecipe(part="lora", rank=4), seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), third.parameters(), strict=True))


@pytest.mark.parametrize("roles", [("query", "value"), ("query", "key", "value", "output", "mlp_in", "mlp_out")])
def test_merged_weights_answer_as_the_adapted_encoder(model, roles):
    encoder = learnt(chosen(model, part="lora", rank=4, alpha=10.0, roles=roles))
    expected = answers(encoder)
    assert not torch.allclose(expected, answers(model.encoder), atol=1e-3)
    plain = copy.deepcopy(model.encoder)
    plain.load_state_dict(merged_state_dict(encoder, encoder.state_dict()))
    torch.testing.assert_close(answers(plain), expected, atol=1e-5, rtol=1e-5)
    merged = merge_adapters(encoder)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in model.encoder.named_parameters()]
    assert torch.equal(answers(merged), answers(plain))
    assert torch.equal(answers(encoder), expected)  # not merged itself


def test_packed_blocks_use_the_updates(model):
    """Training runs blocks by our own loop, evaluation perhaps by the library's: both must see them."""
    encoder = learnt(chosen(model, part="lora", rank=4)).eval()
    with torch.no_grad():
        (tokens,) = encoder.transform([encoder.embed(*inputs())])
    torch.testing.assert_close(tokens, answers(encoder), atol=1e-5, rtol=1e-5)


def test_merged_weights_load_as_a_model(model, tmp_path):
    encoder = learnt(chosen(model, part="lora", rank=4))
    expected = answers(encoder)
    model.encoder.load_state_dict(merged_state_dict(encoder, encoder.state_dict()))
    model.save_pretrained(tmp_path / "export")
    loaded = BrainFoundModel.from_pretrained(tmp_path / "export").encoder
    torch.testing.assert_close(answers(loaded), expected, atol=1e-5, rtol=1e-5)


def test_without_updates_the_state_is_the_encoders_own(model):
    state = merged_state_dict(model.encoder, model.encoder.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.encoder.state_dict().items())
    assert len(state) == len(model.encoder.state_dict())


def test_updates_wait_for_the_heads_and_learn_alike_in_every_layer(model):
    encoder = chosen(model, part="lora", blocks=0, rank=4)
    traits = {
        parameter_settings(f"encoder.{name}", parameter, encoder.num_layers, OptimRecipe(layer_decay=0.5))
        for name, parameter in encoder.named_parameters()
        if "lora_" in name
    }
    assert {(trait.role, trait.lr_scale, trait.decays) for trait in traits} == {("backbone", 1.0, True)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"part": "last_blocks", "blocks": 3}, r"trained\.blocks.*at most 2"),
        ({"part": "lora", "blocks": 2}, r"trained\.blocks.*at most 1"),
    ],
)
def test_more_blocks_than_there_are_is_refused(model, settings, message):
    with pytest.raises(RecipeError, match=message):
        chosen(model, **settings)


def test_what_a_part_does_not_read_is_known():
    assert TrainedPartRecipe(blocks=2, roles=("key",)).ignored_keys() == ["blocks", "roles"]
    assert TrainedPartRecipe(part="last_blocks", blocks=2, rank=8).ignored_keys() == ["rank"]
    assert TrainedPartRecipe(part="lora", blocks=2, rank=8).ignored_keys() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roles": ["querry"]}, "Did you mean query"),
        ({"roles": []}, "at least one role"),
        ({"roles": ["patch"]}, "patch"),
        ({"part": "adapters"}, "lora"),
        ({"rnak": 4}, "Did you mean rank"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(RecipeError, match=message):
        validate(TrainedPartRecipe, settings)
