"""Adapter recipes in training: every one that ships, from a store to a bundle, and the ones that move the base."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Model

from brainfound.adapters import AdapterRecipe, load_adapters, load_bundle
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.recipes import available, load, validate
from tests.tiny_runs import tiny_finetuning

TINY = tiny_finetuning(engine={"batch_size": 2, "checkpoint_every": 2})


def run_with(adapter, store, backbone, out, *overrides, **options):
    recipe = validate(FinetuneRecipe, TINY, overrides)
    return finetune(recipe, store, backbone, "age_years", out, adapter=adapter, quiet=True, **options)


def encoder_weights(folder):
    return {name: value for name, value in load_file(folder).items() if "encoder.layer." in name}


@pytest.mark.parametrize("name", available("adapters"))
def test_every_recipe_trains_and_its_bundle_loads(name, small_store, tiny_backbone, tmp_path):
    run = run_with(name, small_store, tiny_backbone, tmp_path / "run")
    bundle = load_bundle(run / "export")
    method = load(AdapterRecipe, name, "adapters").method
    kinds = {"none": "trained", "full": "full", "last_blocks": "full"}
    assert bundle.content["weights"] == kinds.get(method, "adapter")
    relation = "finetune" if method in ("full", "last_blocks") else "adapter"
    assert f"base_model_relation: {relation}" in (run / "export" / "README.md").read_text()
    if method == "last_blocks":
        before = Dinov2Model.from_pretrained(tiny_backbone).encoder.layer
        after = bundle.model.encoder.blocks
        moved = [
            any(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))
            for old, new in zip(before, after, strict=True)
        ]
        assert moved == [False, True, True]


def test_a_principal_start_is_gone_on_with_exactly(small_store, tiny_backbone, tmp_path):
    """After a stop the start is computed again and the weights are read; the bundle is for the backbone as it was."""
    whole = run_with("pissa-r8", small_store, tiny_backbone, tmp_path / "whole", "engine.steps=4")
    halves = tmp_path / "halves"
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints" / "step-000004")
    shutil.rmtree(halves / "export")
    run_with("pissa-r8", small_store, tiny_backbone, halves, "engine.steps=4", resume=True)
    first, second = (load_file(run / "export" / "adapter_model.safetensors") for run in (whole, halves))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    bases = encoder_weights(whole / "export" / "base" / "model.safetensors")
    plain = encoder_weights(tiny_backbone / "model.safetensors")
    assert len(bases) == len(plain)
    assert all(torch.equal(bases[f"encoder.backbone.{name}"], value) for name, value in plain.items())


def test_runs_on_one_backbone_share_it(small_store, tiny_backbone, tmp_path):
    exports = {
        name: run_with(name, small_store, tiny_backbone, tmp_path / name) / "export"
        for name in ("head-only", "pissa-r8", "lora-r8")
    }
    adapters = load_adapters(exports)
    inputs = {"pixel_values": torch.rand(1, 3, 3, 32, 32)}
    with torch.no_grad():
        for name, folder in exports.items():
            alone = load_bundle(folder).model(**inputs).predictions
            assert torch.equal(adapters[name].model(**inputs).predictions, alone)
