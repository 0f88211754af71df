"""PiSSA: where it starts, what it moves, and that it leaves for the untouched backbone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from brainfound.adapters import AdapterRecipe, attach_adapter, load_bundle, merge, save_bundle, unmerge
from brainfound.adapters.bundle_reader import base_encoder_state, tensors_hash
from brainfound.errors import RecipeError
from brainfound.models import BrainFoundForClassification

QUERY = "brainfound.encoder.backbone.encoder.layer.0.attention.q_proj"
RECIPE = AdapterRecipe(method="pissa", roles=("query", "mlp_out"), rank=4, alpha=12)


@pytest.fixture
def model(export_folder):
    return BrainFoundForClassification.from_pretrained(export_folder)


def test_the_update_is_the_best_approximation_of_the_weight(model):
    weight = model.get_parameter(f"{QUERY}.weight").detach().clone()
    attach_adapter(model, RECIPE)
    layer = model.get_submodule(QUERY)
    update = 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    left, values, right = torch.linalg.svd(weight.double())
    best = (left[:, :4] * values[:4]) @ right[:4]
    torch.testing.assert_close(update.double(), best, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.get_base_layer().weight.double(), weight - best, atol=1e-5, rtol=1e-5)


def test_the_start_does_not_depend_on_random_numbers(export_folder):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        adapted = attach_adapter(BrainFoundForClassification.from_pretrained(export_folder), RECIPE)
        states.append({name: value for name, value in adapted.state_dict().items() if "lora_" in name})
    assert states[0]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_base_is_remembered_to_the_last_bit(model):
    before = tensors_hash(model.encoder.state_dict())
    adapted = attach_adapter(model, RECIPE)
    assert tensors_hash(base_encoder_state(model)) == before
    merge(adapted)
    assert tensors_hash(base_encoder_state(model)) == before
    unmerge(adapted)
    assert tensors_hash(base_encoder_state(model)) == before


def test_a_bundle_is_an_ordinary_adapter_for_the_untouched_backbone(
    export_folder, preprocessing, inputs, tmp_path, adapted, answers, assert_same_answers
):
    model = adapted(export_folder, method="pissa")
    folder = save_bundle(tmp_path / "b", model, preprocessing=preprocessing, labels={})
    exported = load_file(export_folder / "model.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    assert all(torch.equal(value, exported[key]) for key, value in base.items())
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["init_lora_weights"], settings["r"], settings["lora_alpha"]) == (True, 16, 32)
    reloaded = load_bundle(folder).model
    assert_same_answers(answers(model, inputs), answers(reloaded, inputs), 1e-5)
    with reloaded.disable_adapter():
        plain = answers(reloaded, inputs)["slice_embeddings"]
    untouched = answers(BrainFoundForClassification.from_pretrained(export_folder), inputs)["slice_embeddings"]
    torch.testing.assert_close(plain, untouched, atol=1e-6, rtol=1e-6)


def test_what_it_cannot_split_is_refused(model):
    with pytest.raises(RecipeError, match=r"rank.*fewer singular values.*got 40, expected at most 32"):
        attach_adapter(model, AdapterRecipe(method="pissa", rank=40))
    # Refused before anything was changed.
    attach_adapter(model, RECIPE)
