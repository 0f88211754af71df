"""How models are run: resolved once, written down, without effect on what is learnt."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from brainfound.errors import RecipeError
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining import recipe as recipe_module
from brainfound.pretraining.objectives.registry import make_objective
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.recipe import PretrainEngineRecipe, resolve_auto_settings
from brainfound.pretraining.starting_model import TrainedPartRecipe
from brainfound.pretraining.training_task import apply_engine_settings

CPU = torch.device("cpu")


def settled(model, recipe, **engine):
    return resolve_auto_settings(PretrainEngineRecipe(precision="no", **engine), model.encoder, recipe().views, CPU)


def test_auto_is_resolved_and_reported(model, recipe):
    engine, found = settled(model, recipe)
    assert engine.attention in ("sdpa", "matmul")
    assert (engine.compile, engine.crops) == (False, "separate")
    assert {"sdpa", "matmul", "varlen", "xformers"} <= set(found["attention_probe"])
    assert isinstance(found["attention_probe"]["xformers"], str)


def test_what_was_requested_is_taken(model, recipe):
    engine, found = settled(model, recipe, attention="matmul", compile=True, crops="packed")
    assert (engine.attention, engine.compile, engine.crops) == ("matmul", True, "packed")
    assert not found


@pytest.mark.parametrize(("sharded", "crops"), [(True, "packed"), (False, "separate")])
def test_only_weights_that_are_sharded_need_packed_crops(model, recipe, monkeypatch, sharded, crops):
    monkeypatch.setattr(recipe_module.distributed, "is_distributed", lambda: sharded)
    engine, _ = settled(model, recipe, attention="sdpa", parallel="fsdp", crops="separate")
    assert engine.crops == crops


def test_a_kernel_that_does_not_work_here_is_one_line(model, recipe):
    with pytest.raises(RecipeError, match=r"engine.attention.*does not work here"):
        settled(model, recipe, attention="varlen")


def test_a_machine_without_a_compiler_is_found_out(monkeypatch):
    def no_compiler(*arguments, **options):
        def fail(values):
            raise torch._dynamo.exc.TorchDynamoException("no compiler")

        return fail

    recipe_module._can_compile.cache_clear()
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert not recipe_module._can_compile(CPU)
    recipe_module._can_compile.cache_clear()


def test_every_encoder_of_an_objective_is_set(model, recipe):
    content = recipe()
    objective = make_objective(content.objective, TrainedPartRecipe(), model.encoder, content.views, 6, 0)
    engine = PretrainEngineRecipe(attention="matmul", compile=False, gradient_checkpointing=True, crops="separate")
    apply_engine_settings(objective, engine)
    modules = [objective.student, *objective.frozen_modules()]
    encoders = [part for module in modules for part in module.modules() if isinstance(part, SliceEncoder)]
    assert len(encoders) == 3
    assert all((e._runner.kernel, e._runner.kept) == ("matmul", "inputs") for e in encoders)
    assert objective.separate_passes


@pytest.mark.parametrize("value", ["true", "false"])
def test_checkpointing_changes_no_bit(store, recipe, finished, tmp_path, value):
    """It repeats the same operations."""
    teacher = "export/model.safetensors"
    run = pretrain(recipe(f"engine.gradient_checkpointing={value}"), store, out=tmp_path / "run", quiet=True)
    expected, found = load_file(finished / teacher), load_file(run / teacher)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_resumed_run_keeps_what_was_resolved(store, recipe, tmp_path, monkeypatch):
    out = tmp_path / "run"
    pretrain(recipe("engine.attention=auto"), store, out=out, quiet=True)
    recorded = yaml.safe_load((out / "recipe.yaml").read_text())["engine"]
    assert recorded["attention"] in ("sdpa", "matmul")
    assert recorded["crops"] == "separate"
    assert "attention_probe" in json.loads((out / "run.json").read_text())
    other = "matmul" if recorded["attention"] == "sdpa" else "sdpa"
    monkeypatch.setattr(recipe_module, "choose_kernel", lambda *arguments: (other, {}))
    pretrain(recipe("engine.attention=auto"), store, out=out, resume=True, quiet=True)
    assert yaml.safe_load((out / "recipe.yaml").read_text())["engine"]["attention"] == recorded["attention"]
