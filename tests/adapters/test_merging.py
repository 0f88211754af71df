"""Merging: the same answers with and without, and the frozen weights back to the last bit."""

import copy

import pytest
import torch

from brainfound.adapters import is_merged, load_bundle, merge, save_bundle, unmerge
from brainfound.adapters.bundle_reader import base_encoder_state
from brainfound.errors import ModelError


@pytest.mark.parametrize("task", ["classification", "segmentation"])
@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "pissa"])
def test_merging_and_unmerging_change_no_answer(
    export_folder, inputs, method, task, adapted, answers, assert_same_answers
):
    model = adapted(export_folder, task, method)
    before, weights = answers(model, inputs), copy.deepcopy(model.state_dict())
    merge(model)
    assert is_merged(model)
    assert_same_answers(before, answers(model, inputs), 1e-5)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])]
    assert changed
    assert all(name.endswith(".base_layer.weight") for name in changed)
    unmerge(model)
    assert not is_merged(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert_same_answers(before, answers(model, inputs), 0)


def test_a_merged_model_computes_no_updates(export_folder, inputs, adapted, answers):
    model = adapted(export_folder)
    called = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_: called.append(1))
    merge(model)
    answers(model, inputs)
    assert called == []
    unmerge(model)
    answers(model, inputs)
    assert called


def test_a_merged_model_is_saved_as_what_it_was_made_of(
    export_folder, preprocessing, inputs, tmp_path, adapted, answers, assert_same_answers
):
    model = adapted(export_folder)
    before = answers(model, inputs)
    base = {name: value.clone() for name, value in base_encoder_state(model.get_base_model()).items()}
    merge(model)
    folder = save_bundle(tmp_path / "b", model, preprocessing=preprocessing, labels={})
    assert is_merged(model)
    reloaded = load_bundle(folder).model
    assert_same_answers(before, answers(reloaded, inputs))
    assert all(torch.equal(value, base[name]) for name, value in base_encoder_state(reloaded.get_base_model()).items())


def test_a_merge_that_forgot_the_base_is_not_saved(export_folder, preprocessing, tmp_path, adapted):
    model = adapted(export_folder)
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged without keeping the base"):
        save_bundle(tmp_path / "b", model, preprocessing=preprocessing, labels={})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModelError, match="already merged"):
        merge(model)


def test_merging_twice_or_nothing_is_refused(export_folder, adapted):
    model = adapted(export_folder)
    with pytest.raises(ModelError, match="not merged"):
        unmerge(model)
    merge(model)
    with pytest.raises(ModelError, match="already merged"):
        merge(model)
    for method in ("none", "full"):
        with pytest.raises(ModelError, match="no updates to merge"):
            merge(adapted(export_folder, method=method))
