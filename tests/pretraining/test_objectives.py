"""Every objective from a checkpoint and from scratch, trained in full, in part and through updates."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from brainfound.errors import RecipeError
from brainfound.models import BrainFoundModel
from brainfound.pretraining.objectives.hybrid import Hybrid
from brainfound.pretraining.objectives.registry import OBJECTIVES_BY_KIND, make_objective
from brainfound.pretraining.objectives.self_distillation import SelfDistillation
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.pretraining.starting_model import build_model
from brainfound.recipes import validate
from brainfound.training.randomness import StepKey
from tests.tiny_runs import checkpoint_tensors, log_lines

KINDS = ("self_distillation", "masked_autoencoder", "hybrid")
PARTS = ("full", "last_blocks", "lora")
KEY = StepKey(seed=0, step=0, micro_batch=0, rank=0)
DECODER = {"width": 16, "layers": 1, "heads": 2}


@pytest.fixture
def make_recipe(recipe):
    """A maker of tiny recipes: ``make_recipe("hybrid", "lora", "engine.steps=4", …)``."""

    def make(kind: str = "self_distillation", part: str = "full", *overrides: str) -> PretrainRecipe:
        content = recipe().model_dump(mode="json")
        reconstruction = {"decoder": DECODER}
        content["objective"] = {
            "self_distillation": content["objective"],
            "masked_autoencoder": {"kind": "masked_autoencoder", **reconstruction},
            "hybrid": {**content["objective"], "kind": "hybrid", "reconstruction": reconstruction},
        }[kind]
        content["trained"] = {"part": part, "blocks": 1, "rank": 2, "alpha": 2.0}
        return validate(PretrainRecipe, content, ["probe.every=0", "engine.checkpoint_every=1", *overrides])

    return make


def start(recipe: PretrainRecipe, store):
    """The objective as `pretrain` begins with it."""
    encoder = build_model(recipe.init, store, recipe.views.global_size, recipe.seed).encoder
    return make_objective(recipe.objective, recipe.trained, encoder, recipe.views, recipe.engine.steps, recipe.seed)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("source", ["scratch", "checkpoint"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps(finished, store, make_recipe, tmp_path, kind, source, part):
    """What is trained moves, what is frozen does not by a bit, and the export is the plain encoder."""
    init = "none" if source == "scratch" else str(finished / "export")
    content = make_recipe(kind, part, "engine.steps=2", "engine.keep_checkpoints=9", f"init.source={init}")
    if source == "scratch":
        anchors = ["objective.anchor_gram_weight=0", "objective.anchor_cls_weight=0"]
        content = validate(PretrainRecipe, content.model_dump(mode="json"), anchors)
    run = pretrain(content, store, out=tmp_path / "run", quiet=True)
    before = start(content, store)
    after = checkpoint_tensors(run, 2)
    assert before.student.state_dict().keys() == after.keys()
    num_trained = sum(p.numel() for p in before.student.parameters() if p.requires_grad)
    assert json.loads((run / "run.json").read_text())["num_trained_parameters"] == num_trained
    for name, parameter in before.student.named_parameters():
        assert torch.equal(parameter, after[name]) != parameter.requires_grad, name
    saved = checkpoint_tensors(run, 2, "task.safetensors")
    if kind != "masked_autoencoder":
        student = "distilled." if kind == "hybrid" else ""
        frozen = {n for n, p in before.student.named_parameters() if not p.requires_grad}
        for name in (name.removeprefix(student) for name in frozen):
            assert torch.equal(saved[f"teacher.{name}"], after[student + name])
    source_encoder = build_model(content.init, store, 32, content.seed).encoder.state_dict()
    anchor = {name.removeprefix("anchor."): t for name, t in saved.items() if name.startswith("anchor.")}
    assert anchor.keys() == (source_encoder.keys() if source == "checkpoint" else set())
    assert all(torch.equal(tensor, source_encoder[name]) for name, tensor in anchor.items())
    # A fresh objective that takes over the checkpoint answers as the export does.
    before.student.load_state_dict(after)
    before.load_state_dict(saved)
    exported = BrainFoundModel.from_pretrained(run / "export").encoder.eval()
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected, got = before.exported_encoder.eval()(pixels), exported(pixels)
    torch.testing.assert_close(got.cls, expected.cls, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.patches, expected.patches, atol=1e-5, rtol=1e-5)
    moved = {n for n, tensor in exported.state_dict().items() if not torch.equal(tensor, source_encoder[n])}
    assert ("backbone.encoder.layer.0.attention.q_proj.weight" in moved) == (part != "last_blocks")
    assert ("backbone.encoder.layer.0.attention.k_proj.weight" in moved) == (part == "full")
    assert all("lora" not in name for name in load_file(run / "export" / "model.safetensors"))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_trained_parameter_takes_part_in_the_loss(store, batch, make_recipe, kind, part):
    """Data-parallel training waits for the gradient of each of them."""
    objective = start(make_recipe(kind, part), store)
    loss, metrics = objective.loss(objective.student, batch, KEY)
    loss.backward()
    for name, parameter in objective.student.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert ("loss_reconstruction" in metrics) == (kind != "self_distillation")
    clipped = [id(p) for group in objective.clip_groups().values() for p in group]
    assert sorted(clipped) == sorted(id(p) for p in objective.student.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_updates_resume_exactly(finished, store, make_recipe, tmp_path, kind):
    content = make_recipe(kind, "lora", "engine.steps=4", f"init.source={finished / 'export'}", "probe.every=2")
    whole = pretrain(content, store, out=tmp_path / "whole", quiet=True)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    shutil.rmtree(run / "export")
    pretrain(content, store, out=run, resume=True, quiet=True)
    for file in ("model.safetensors", "task.safetensors"):
        first, second = checkpoint_tensors(whole, 4, file), checkpoint_tensors(run, 4, file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (load_file(r / "export" / "model.safetensors") for r in (whole, run))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_teacher_is_kept_as_plain_weights(store, make_recipe, tmp_path):
    content = make_recipe("self_distillation", "lora", "engine.steps=1", "probe.every=1")
    run = pretrain(content, store, out=tmp_path / "run", quiet=True)
    (best,) = (run / "checkpoints" / "best").glob("*.safetensors")
    plain = build_model(content.init, store, 32, 0).encoder.state_dict()
    kept = load_file(best)
    assert kept.keys() == plain.keys()


def test_the_teacher_of_updates_mirrors_the_student_and_the_anchor_has_none(store, make_recipe):
    content = make_recipe("self_distillation", "lora", "objective.anchor_gram_weight=1")
    objective = start(content, store)
    for old, new in zip(objective.teacher.parameters(), objective.student.parameters(), strict=True):
        assert torch.equal(old, new)
    assert any("lora_A" in name for name, _ in objective.teacher.named_parameters())
    assert not any("lora" in name for name, _ in objective.anchor.named_parameters())
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(1)
    frozen = {n: p.clone() for n, p in objective.teacher.named_parameters()}
    objective.after_step(0, torch.tensor(1.0))
    for (name, student), teacher in zip(
        objective.student.named_parameters(), objective.teacher.parameters(), strict=True
    ):
        assert torch.equal(teacher, frozen[name]) != student.requires_grad, name


def test_the_hybrid_loss_is_the_sum_of_its_parts(store, batch, make_recipe):
    content = make_recipe("hybrid", "full", "objective.reconstruction_weight=0.5", "objective.drop_path=0")
    objective = start(content, store)
    assert isinstance(objective, Hybrid)
    loss, metrics = objective.loss(objective.student, batch, KEY)
    distilled, _ = SelfDistillation.compute_loss(objective, objective.student.distilled, batch, KEY)
    torch.testing.assert_close(loss, distilled + 0.5 * metrics["loss_reconstruction"])
    # The reconstruction is that of masked autoencoding alone, with the same encoder and decoder.
    alone = start(make_recipe("masked_autoencoder"), store)
    alone.student.load_state_dict(
        {
            name.removeprefix("distilled."): tensor
            for name, tensor in objective.student.state_dict().items()
            if "distilled.heads" not in name
        }
    )
    _, expected = alone.loss(alone.student, batch, KEY)
    torch.testing.assert_close(metrics["loss_reconstruction"], expected["loss_reconstruction"])


def test_the_student_of_the_hybrid_is_entered_once_per_step(store, batch, make_recipe):
    objective = start(make_recipe("hybrid"), store)
    calls = []
    objective.student.register_forward_pre_hook(lambda *_: calls.append(1))
    objective.loss(objective.student, batch, KEY)
    assert len(calls) == 1
    assert len(objective.student.state_dict()) == len({t.data_ptr() for t in objective.student.state_dict().values()})


def test_kinds_and_their_keys_are_checked(recipe):
    def refuse(objective: dict, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            validate(PretrainRecipe, {"objective": objective})

    assert validate(PretrainRecipe, {"objective": {"drop_path": 0.2}}).objective.kind == "self_distillation"
    assert set(OBJECTIVES_BY_KIND) == set(KINDS)
    refuse({"kind": "masked_autoencodr"}, r"objective\.kind: unknown kind.*Did you mean masked_autoencoder\?$")
    refuse({"drop_pth": 1}, r"objective\.drop_pth: unknown key\. Did you mean objective.drop_path\?$")
    refuse({"kind": "hybrid", "reconstruction": {"mask_ration": 1}}, r"objective\.reconstruction\.mask_ration: unknown")
    refuse(
        {"kind": "masked_autoencoder", "decoder": {"widht": 1}},
        r"objective\.decoder\.widht.*Did you mean objective.decoder.width\?$",
    )
    refuse(
        {"kind": "masked_autoencoder", "drop_path": 0.1},
        r"objective\.drop_path: unknown key\. Known names: anchor_cls_weight",
    )
    refuse({"kind": "masked_autoencoder", "mask_ratio": 1.5}, r"objective\.mask_ratio.*less than 1")
    refuse(
        {"kind": "masked_autoencoder", "decoder": {"width": 20, "heads": 3}}, r"objective\.decoder.*multiple of heads"
    )


def test_another_objective_by_an_override(store, recipe, tmp_path, capsys):
    """What the recipe says of its own objective is left out, and the run says so."""
    overrides = ["objective.kind=masked_autoencoder", "objective.decoder.width=16", "objective.decoder.heads=2",
                 "objective.decoder.layers=1", "engine.steps=1", "probe.every=0"]  # fmt: skip
    (tmp_path / "mine.yaml").write_text(recipe().to_yaml())
    for number, given in enumerate((recipe(), tmp_path / "mine.yaml")):
        run = pretrain(given, store, out=tmp_path / f"run{number}", overrides=overrides)
        saved = yaml.safe_load((run / "recipe.yaml").read_text())["objective"]
        assert saved["kind"] == "masked_autoencoder"
        said = " ".join(capsys.readouterr().err.split())
        assert "objective.kind is masked_autoencoder; of the recipe's objective, head," in said
        assert validate(PretrainRecipe, yaml.safe_load((run / "recipe.yaml").read_text())).objective.decoder.width == 16
    hybrid = pretrain(
        recipe(), store, out=tmp_path / "hybrid", quiet=True, dry_run=True,
        overrides=["objective.kind=hybrid", "objective.reconstruction.decoder={width: 16, heads: 2, layers: 1}"],
    )  # fmt: skip
    assert hybrid == tmp_path / "hybrid"
    with pytest.raises(RecipeError, match=r"objective\.drop_path: unknown key"):
        pretrain(recipe(), store, out=tmp_path / "no", overrides=["objective.kind=masked_autoencoder",
                                                                  "objective.drop_path=0"])  # fmt: skip


def test_a_run_whose_recipe_names_no_kind_and_no_part_resumes(finished, store, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    del content["trained"], content["objective"]["kind"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))
    pretrain(recipe(), store, out=run, resume=True, quiet=True)
    with pytest.raises(RecipeError, match=r"trained\.part"):
        pretrain(recipe("trained.part=last_blocks"), store, out=run, resume=True, quiet=True)


@pytest.mark.parametrize(
    ("kind", "part", "words"),
    [
        ("self_distillation", "full", ["EMA teacher of self-distillation (DINO + iBOT + KoLeo)", "all of the encoder"]),
        (
            "masked_autoencoder",
            "last_blocks",
            ["The encoder of masked autoencoding (75% of the patches hidden)", "the last 1 of 2 blocks"],
        ),
        (
            "hybrid",
            "lora",
            ["and masked autoencoding (75% of the patches hidden, weighted 1)", "rank 2 of query, value", "merged"],
        ),
    ],
)
def test_the_card_says_what_was_trained_and_how(store, make_recipe, tmp_path, kind, part, words):
    run = pretrain(make_recipe(kind, part, "engine.steps=1"), store, out=tmp_path / "run", quiet=True)
    card = " ".join((run / "export" / "README.md").read_text().split())
    for word in words:
        assert word in card
    assert ("teacher" in card) == (kind != "masked_autoencoder")
    assert "anchored" not in card  # from scratch


def test_dry_run_of_an_objective_without_prototypes(store, make_recipe, tmp_path, capsys):
    pretrain(make_recipe("masked_autoencoder"), store, out=tmp_path / "run", dry_run=True, quiet=True)
    report = capsys.readouterr().out
    assert "loss" in report
    assert "ln K" not in report


def test_log_of_masked_autoencoding_feeds_the_guard(store, make_recipe, tmp_path):
    run = pretrain(make_recipe("masked_autoencoder", "full", "engine.steps=2"), store, out=tmp_path / "run", quiet=True)
    lines = log_lines(run)
    assert all({"loss", "loss_reconstruction", "effective_rank", "mean_cosine"} <= line.keys() for line in lines)
    assert not any("ln_k" in line for line in lines)
