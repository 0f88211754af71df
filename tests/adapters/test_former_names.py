"""Adapters whose files name modules as the library named them in former releases."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from brainfound.adapters import AdapterRecipe, attach_adapter, load_adapters, load_bundle, save_bundle
from brainfound.adapters.bundle_reader import base_encoder_state, file_hash, tensors_hash
from brainfound.adapters.former_names import to_current_targets, to_current_tensors, to_legacy_state_dict
from brainfound.errors import ModelError
from brainfound.models import BrainFoundForClassification, BrainFoundModel

MATRICES = ("query", "key", "value", "output", "mlp_in", "mlp_out", "patch")
FORMER = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def in_former_words(name):
    for present, former in FORMER.items():
        name = name.replace(present, former)
    return name


def make_former(folder, base_state):
    """Rewrite a bundle as a former release of the library would have saved it."""
    path = folder / "adapter_model.safetensors"
    saved = load_file(path)
    former = {in_former_words(key): value for key, value in saved.items()}
    assert former.keys() != saved.keys()
    save_file(former, path, metadata={"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = [in_former_words(name) for name in settings["target_modules"]]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    content = json.loads((folder / "bundle.json").read_text())
    content["base"]["sha256"] = tensors_hash({in_former_words(name): value for name, value in base_state.items()})
    content["files"] = {name: file_hash(folder / name) for name in content["files"]}
    (folder / "bundle.json").write_text(json.dumps(content))


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_a_bundle_with_former_names_answers_the_same(
    export_folder, preprocessing, inputs, tmp_path, method, adapted, answers, assert_same_answers
):
    roles = MATRICES if method != "pissa" else MATRICES[:-1]
    model = adapted(export_folder, method=method, roles=roles)
    folder = save_bundle(tmp_path / "b", model, preprocessing=preprocessing, labels={})
    expected = answers(load_bundle(folder).model, inputs)
    make_former(folder, base_encoder_state(model.get_base_model()))
    assert_same_answers(expected, answers(load_bundle(folder).model, inputs), 0)


def test_former_and_present_bundles_share_a_backbone(export_folder, preprocessing, tmp_path, adapted):
    folders = {}
    for name in ("former", "present"):
        model = adapted(export_folder)
        folders[name] = save_bundle(tmp_path / name, model, preprocessing=preprocessing, labels={})
        if name == "former":
            make_former(folders[name], base_encoder_state(model.get_base_model()))
    assert list(load_adapters(folders)) == ["former", "present"]


def test_names_that_nothing_plays_are_still_refused(export_folder, preprocessing, tmp_path, adapted):
    folder = save_bundle(tmp_path / "b", adapted(export_folder), preprocessing=preprocessing, labels={})
    path = folder / "adapter_model.safetensors"
    saved = load_file(path)
    save_file({key.replace("q_proj", "wonder"): value for key, value in saved.items()}, path)
    content = json.loads((folder / "bundle.json").read_text())
    content["files"]["adapter_model.safetensors"] = file_hash(path)
    (folder / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"has no place for 6 weights: .*wonder|lacks 6 weights: .*q_proj"):
        load_bundle(folder)


@pytest.fixture(scope="module")
def gated_folder(tmp_path_factory):
    """A BrainFound model whose backbone has gated MLPs, as ViT-g has."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("gated")
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=40, use_swiglu_ffn=True
    )
    Dinov2Model(config).save_pretrained(folder / "plain")
    BrainFoundModel.from_backbone(folder / "plain", ("T1w", "FLAIR")).save_pretrained(folder / "ours")
    return folder / "ours"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_one_matrix_that_became_two(gated_folder, method):
    """Formerly gate and up were rows of one matrix, and shared the way into their update."""
    recipe = AdapterRecipe(method=method, roles=("mlp_in", "mlp_out"))
    model = attach_adapter(BrainFoundForClassification.from_pretrained(gated_folder), recipe).eval()
    state = model.state_dict()
    former = {}
    for key in [key for key in state if "lora_" in key]:
        value = state[key] + 0.05 * torch.randn_like(state[key])
        if "up_proj.lora_A" in key:
            value = state[key.replace("up_proj", "gate_proj")]
        state[key].copy_(value)
    for key, value in state.items():
        name = key.replace(".default", "")
        if "lora_" not in name or "gate_proj" in name:
            continue
        if "up_proj" in name:
            value = value if "lora_A" in name else torch.cat((state[key.replace("up_proj", "gate_proj")], value))
            name = name.replace("up_proj", "weights_in")
        former[name.replace("down_proj", "weights_out")] = value
    base = BrainFoundForClassification.from_pretrained(gated_folder)
    present = to_current_tensors(former, base)
    assert present.keys() == {key.replace(".default", "") for key in state if "lora_" in key}
    assert all(torch.equal(value, state[_with_adapter(key)]) for key, value in present.items())


def _with_adapter(key):
    head, part, rest = key.partition(next(p for p in ("lora_A", "lora_B", "lora_magnitude_vector") if p in key))
    return f"{head}{part}.default{rest}"


def test_the_former_names_of_a_base(gated_folder):
    model = BrainFoundForClassification.from_pretrained(gated_folder)
    former = to_legacy_state_dict(base_encoder_state(model))
    block = "backbone.encoder.layer.0"
    mlp = model.encoder.backbone.encoder.layer[0].mlp
    assert torch.equal(former[f"{block}.mlp.weights_in.weight"], torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
    assert torch.equal(former[f"{block}.mlp.weights_out.bias"], mlp.down_proj.bias)
    assert f"{block}.attention.attention.query.weight" in former
    assert not any("_proj" in name for name in former)


def test_targets_are_found_by_role_and_block(gated_folder):
    model = BrainFoundForClassification.from_pretrained(gated_folder)
    prefix = "brainfound.encoder.backbone.encoder.layer.1"
    assert to_current_targets([f"{prefix}.mlp.weights_in", f"{prefix}.attention.output.dense"], model) == [
        f"{prefix}.mlp.gate_proj",
        f"{prefix}.mlp.up_proj",
        f"{prefix}.attention.o_proj",
    ]
    # The names of the present library, and of what is no ViT's, stay.
    for name in (f"{prefix}.attention.q_proj", "head.score"):
        assert to_current_targets([name], model) == [name]


def test_present_keys_stay_as_they_are(export_folder):
    model = BrainFoundForClassification.from_pretrained(export_folder)
    keys = [
        "base_model.model.brainfound.encoder.backbone.encoder.layer.0.attention.q_proj.lora_A.weight",
        "base_model.model.brainfound.encoder.backbone.embeddings.patch_embeddings.projection.lora_B.weight",
        "base_model.model.head.score.weight",
    ]
    assert isinstance(model.get_submodule(keys[0].removeprefix("base_model.model.").split(".lora_")[0]), nn.Linear)
    assert list(to_current_tensors({key: torch.zeros(4, 2) for key in keys}, model)) == keys
