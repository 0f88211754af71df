"""Several bundles on one backbone: each answers as when it is alone, and the backbone is there once."""

import pytest
import torch

from brainfound.adapters import load_adapters, load_bundle, merge, save_bundle, unmerge
from brainfound.errors import ModelError, UsageError
from brainfound.models import BrainFoundModel

KINDS = {
    "age": ("regression", "lora"),
    "sex": ("classification", "dora"),
    "site": ("classification", "none"),
    "lesion": ("segmentation", "pissa"),
}


@pytest.fixture
def folders(export_folder, preprocessing, tmp_path, adapted):
    return {
        name: save_bundle(
            tmp_path / name,
            adapted(export_folder, task, method, aggregator="mean" if name == "sex" else "attention"),
            preprocessing=preprocessing,
            labels={"task": name},
        )
        for name, (task, method) in KINDS.items()
    }


def base_pointers(model):
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter.data_ptr()
        for name, parameter in body.encoder.named_parameters()
        if "lora_" not in name and ".modules_to_save." not in name
    }


def test_each_answers_as_when_it_is_alone(folders, inputs, answers):
    alone = {name: answers(load_bundle(folder).model, inputs) for name, folder in folders.items()}
    adapters = load_adapters(folders)
    assert (list(adapters), len(adapters), "age" in adapters, "iq" in adapters) == (list(KINDS), 4, True, False)
    for name in ("lesion", "age", "sex", "site", "age"):
        assert adapters[name].labels == {"task": name}
        together = answers(adapters[name].model, inputs)
        assert together.keys() == alone[name].keys()
        assert all(torch.equal(value, alone[name][key]) for key, value in together.items())


def test_the_backbone_is_in_memory_once(folders):
    adapters = load_adapters(folders)
    pointers = [base_pointers(adapters[name].model) for name in adapters]
    assert len(pointers[0]) > 50
    assert all(other == pointers[0] for other in pointers[1:])
    added = sum(
        parameter.numel()
        for name in adapters
        for key, parameter in adapters[name].model.named_parameters()
        if "encoder." not in key or "lora_" in key or ".modules_to_save." in key
    )
    backbone = sum(p.numel() for p in BrainFoundModel.from_pretrained(folders["age"] / "base").encoder.parameters())
    assert adapters.num_parameters == backbone + added
    assert "age: regression" in repr(adapters)
    adapters.to("cpu")
    assert base_pointers(adapters["lesion"].model) == pointers[0]


def test_merging_one_leaves_the_others_alone(folders, inputs, answers, assert_same_answers):
    adapters = load_adapters({name: folders[name] for name in ("age", "sex")})
    before = {name: answers(adapters[name].model, inputs) for name in adapters}
    merge(adapters["age"].model)
    with pytest.raises(ModelError, match="merged"):
        adapters.to("cpu")  # would give the others the merged weights
    assert_same_answers(before["age"], answers(adapters["age"].model, inputs), 1e-5)
    assert_same_answers(before["sex"], answers(adapters["sex"].model, inputs), 0)
    unmerge(adapters["age"].model)
    assert base_pointers(adapters["age"].model) == base_pointers(adapters["sex"].model)


def test_bundles_that_are_loaded_already_can_be_joined(folders, inputs, answers, assert_same_answers):
    loaded = load_bundle(folders["sex"])
    alone = answers(loaded.model, inputs)
    adapters = load_adapters({"age": folders["age"], "sex": loaded})
    assert adapters["sex"] is loaded
    assert_same_answers(alone, answers(loaded.model, inputs), 0)


def test_all_come_to_the_device_of_the_first(folders, monkeypatch):
    """On a machine with one device: where each is sent, and that the backbone is shared by then."""
    first, sent = load_bundle(folders["age"]), []

    def watch(name):
        bundle = load_bundle(folders[name])
        move = bundle.model.to
        shared = lambda: base_pointers(bundle.model) == base_pointers(first.model)  # noqa: E731
        monkeypatch.setattr(bundle.model, "to", lambda device: (sent.append((name, device, shared())), move(device))[1])
        return bundle

    load_adapters({"age": first, "sex": watch("sex"), "lesion": watch("lesion")})
    assert sent == [(name, torch.device("cpu"), True) for name in ("sex", "lesion")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_bundles_on_different_devices_can_be_joined(folders, inputs, answers, assert_same_answers, place):
    alone = {name: answers(load_bundle(folders[name]).model, inputs) for name in ("age", "sex")}
    first, second = load_bundle(folders["age"]), load_bundle(folders["sex"])
    (first if place == "cuda" else second).model.to("cuda")
    adapters = load_adapters({"age": first, "sex": second})
    here = {name: value.to(place) for name, value in inputs.items()}
    for name, expected in alone.items():
        found = {key: value.cpu() for key, value in answers(adapters[name].model, here).items()}
        assert_same_answers(expected, found, 1e-3)


def test_another_backbone_is_refused(folders, export_folder, preprocessing, tmp_path, adapted):
    model = BrainFoundModel.from_pretrained(export_folder)
    with torch.no_grad():
        model.encoder.backbone.layernorm.weight.add_(1e-6)
    model.save_pretrained(tmp_path / "other")
    other = save_bundle(tmp_path / "odd", adapted(tmp_path / "other"), preprocessing=preprocessing, labels={})
    with pytest.raises(ModelError, match=r"odd \(.*trained on another backbone than age \(got hash") as error:
        load_adapters({"age": folders["age"], "odd": other})
    assert "\n" not in str(error.value)


def test_a_bundle_with_an_encoder_of_its_own_is_refused(folders, export_folder, preprocessing, tmp_path, adapted):
    for method in ("full", "last_blocks"):
        own = save_bundle(
            tmp_path / method, adapted(export_folder, method=method), preprocessing=preprocessing, labels={}
        )
        with pytest.raises(ModelError, match="has a backbone of its own"):
            load_adapters({"age": folders["age"], "own": own})


def test_what_cannot_be_joined_is_one_line(folders):
    with pytest.raises(UsageError, match="no bundle was given"):
        load_adapters({})
    merged = load_bundle(folders["age"])
    merge(merged.model)
    with pytest.raises(ModelError, match="is merged"):
        load_adapters({"age": merged})
    with pytest.raises(UsageError, match="no adapter named 'agee'. Did you mean age"):
        load_adapters({"age": folders["age"]})["agee"]
