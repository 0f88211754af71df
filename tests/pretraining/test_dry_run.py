"""The dry run: what is measured here, and the estimate for other machines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from brainfound.errors import UsageError
from brainfound.models import BrainFoundConfig, BrainFoundModel
from brainfound.pretraining.dry_run import trial as dry_run
from brainfound.pretraining.dry_run.costs import (
    GIB,
    GPU_SPECS,
    AnalyticCosts,
    DryRunMeasurement,
    ParameterCounts,
    TargetHardware,
    find_gpu,
)
from brainfound.pretraining.objectives.base import StepFlops
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.pretraining.starting_model import InitRecipe, build_meta_model, build_model
from brainfound.recipes import load
from brainfound.training.process import probe_precision

# DINOv2 ViT-g/14 with two heads: about 1.1 thousand million weights.
GIANT = ParameterCounts(
    student=1_250_000_000,
    trained=1_250_000_000,
    teacher=1_250_000_000,
    anchor=1_136_000_000,
    encoder=1_136_000_000,
    layer=18_900_000,
)


def flops(num_images: int) -> StepFlops:
    return StepFlops(student=3e12 * num_images, teacher=0.5e12 * num_images, anchor=0.5e12 * num_images)


SIZES = AnalyticCosts(GIANT, flops)


def trial(**changes) -> DryRunMeasurement:
    facts = {
        "device": torch.device("cpu"),
        "precision": "no",
        "num_processes": 1,
        "num_images": 2,
        "images_per_second": 0.5,
        "forward_bytes": 2 * GIB,
        "half_batch_forward_bytes": None,
        "sizes": SIZES,
        "loss": 9.0,
        "ln_k": 11.09,
    }
    return DryRunMeasurement(**{**facts, **changes})


def engine(recipe, *changes: str):
    return recipe("engine.precision=auto", "engine.steps=1000", "engine.batch_size=64", *changes).engine


def test_the_report_names_both_machines(store, recipe, tmp_path, capsys):
    content = recipe("engine.precision=auto")
    pretrain(content, store, out=tmp_path / "run", dry_run=True, quiet=True, gpus=4, gpu="h100")
    assert not (tmp_path / "run").exists()
    here, paper = capsys.readouterr().out.split("\n\n")
    for part in ("effective learning rate", "images/s", "GFLOP per image", " at most", "disk", "ln K"):
        assert part in here
    for part in (
        "4 × H100",
        "estimate",
        "33% of 989 TFLOP/s (bfloat16)",
        "images/s",
        "memory per GPU",
        "ddp",
        "fsdp",
        "fits",
        "disk",
    ):
        assert part in paper


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gpu": "A1000", "gpus": 8}, "Did you mean A10"),
        ({"gpu": "A100"}, "Name one: A100-40GB or A100-80GB"),
        ({"gpus": 8}, "Give --gpu"),
        ({"gpus": 0, "gpu": "H100"}, "expected 1 or more"),
        ({"gpus": 3, "gpu": "H100"}, "Set engine.batch_size=9 or 6"),
    ],
)
def test_what_cannot_be_estimated_is_reported_before_anything_is_trained(store, recipe, tmp_path, arguments, words):
    with pytest.raises(UsageError, match=words):
        pretrain(recipe(), store, out=tmp_path / "run", dry_run=True, quiet=True, **arguments)


def test_an_estimate_without_a_dry_run_is_refused(store, recipe, tmp_path):
    with pytest.raises(UsageError, match="--dry-run"):
        pretrain(recipe(), store, out=tmp_path / "run", quiet=True, gpus=8, gpu="H100")
    assert not (tmp_path / "run").exists()


def test_speed_follows_from_operations_peak_and_utilisation(recipe):
    machine = TargetHardware(find_gpu("A100-80GB"), num_gpus=8, utilisation=0.5)
    text = "\n".join(dry_run.report_lines(trial(), engine(recipe), 1e-4, machine))
    # 4 TFLOP per image at half of 8 × 312 TFLOP/s.
    assert "312 images/s" in text
    assert f"about {1000 * 64 / 312 / 60:.2f} min" in text  # 3.42
    assert "50% of 312 TFLOP/s (bfloat16)" in text


def test_a_gpu_without_bfloat16_is_counted_in_float32_and_says_so(recipe):
    text = "\n".join(dry_run.report_lines(trial(), engine(recipe), 1e-4, TargetHardware(find_gpu("V100-32GB"))))
    assert "15.7 TFLOP/s (float32)" in text
    assert "no bfloat16" in text


def test_sharing_divides_what_is_kept_and_nothing_else():
    whole = dry_run.memory_per_gpu(GIANT, 3 * GIB, 8, "ddp", bf16=True)
    share = dry_run.memory_per_gpu(GIANT, 3 * GIB, 8, "fsdp", bf16=True)
    for part in ("weights", "gradients", "optimiser", "teacher", "anchor"):
        assert share[part] == whole[part] / 8
    assert whole["activations"] == share["activations"] == 3 * GIB
    # Weights, gradients, two moments, teacher and anchor in float32; buckets in float32 and matrices in bfloat16.
    assert sum(whole.values()) - 3 * GIB == 4 * (5 * GIANT.student + GIANT.anchor) + 6 * GIANT.student
    assert sum(share.values()) < sum(whole.values()) / 3


def test_a_single_gpu_sends_nothing():
    alone, together = (dry_run.memory_per_gpu(GIANT, GIB, n, "ddp", bf16=False) for n in (1, 2))
    assert together["copies"] - alone["copies"] == 4 * GIANT.trained


@pytest.mark.parametrize(
    ("kind", "num_gpus", "gib_per_image", "words"),
    [
        # 8 images at a time do not fit beside 34 GiB of the rest; 4 do, and 8 do beside a share of the rest.
        ("A100-80GB", 8, 7, "It would fit with engine.accumulation=2, or engine.parallel=fsdp."),
        # The rest alone is too much for each of these GPUs, and a share of it is not.
        ("RTX-4090", 8, 3, "It would fit with engine.parallel=fsdp and engine.accumulation=2."),
        ("RTX-4090", 1, 2, "more GPUs with engine.parallel=fsdp"),
        ("RTX-4090", 8, 25, "engine.gradient_checkpointing=true"),
    ],
)
def test_what_does_not_fit_is_reported_with_what_would(recipe, kind, num_gpus, gib_per_image, words):
    small = trial(forward_bytes=2 * gib_per_image * GIB, precision="bf16")
    text = "\n".join(dry_run.report_lines(small, engine(recipe), 1e-4, TargetHardware(find_gpu(kind), num_gpus)))
    assert "does not fit" in text
    assert words in text


def test_what_fits_needs_no_advice(recipe):
    text = "\n".join(
        dry_run.report_lines(trial(precision="bf16"), engine(recipe), 1e-4, TargetHardware(GPU_SPECS["H200"], 8))
    )
    assert "fits" in text
    assert "would fit" not in text


@pytest.mark.parametrize("may_roll_back", [False, True])
def test_the_disk_holds_every_checkpoint_and_one_more(recipe, may_roll_back):
    """And one more to go back to, which the run asks for as well (`Engine.require_space`)."""
    content = engine(recipe, "engine.keep_checkpoints=3")
    one = 4 * (GIANT.student + GIANT.teacher + GIANT.anchor + 2 * GIANT.trained)
    num = 5 if may_roll_back else 4
    sizes = AnalyticCosts(GIANT, flops, may_roll_back)
    # Each checkpoint may know a best encoder of its own; and the export.
    assert dry_run.disk_bytes(sizes, content) == num * one + (num + 1) * 4 * GIANT.encoder
    assert ("one to go back to" in "\n".join(dry_run.report_lines(trial(sizes=sizes), content, 1e-4, None))) == (
        may_roll_back
    )


def test_a_dry_run_counts_what_the_guard_keeps_to_go_back_to(store, recipe, tmp_path, capsys):
    content = recipe("engine.batch_size=8", "guard.on_failure=roll_back")
    pretrain(content, store, out=tmp_path / "run", dry_run=True, quiet=True)
    assert "one to go back to" in capsys.readouterr().out


def test_memory_is_measured_as_a_gpu_would_run_unless_the_recipe_says_otherwise(recipe):
    machine = TargetHardware(find_gpu("H200"))
    auto, given = recipe().engine, recipe("engine.attention=matmul").engine
    assert dry_run.shrink_engine_for_estimate(auto, machine, 1).crops == "packed"
    assert dry_run.shrink_engine_for_estimate(given, machine, 1).attention == "matmul"


def test_a_few_images_stand_for_the_micro_batch_of_a_large_machine(store, recipe, tmp_path, capsys):
    # 1,500 thousand images per GPU; the store has a few hundred slices.
    content = recipe("engine.batch_size=3000000", "engine.accumulation=2", "engine.num_workers=2")
    pretrain(content, store, out=tmp_path / "run", dry_run=True, quiet=True, gpus=2, gpu="H200")
    here, paper = capsys.readouterr().out.split("\n\n")
    assert "1 process on cpu" in here
    assert "tried out                4 images per process" in here
    assert "this batch 3000000" in here
    assert "activations of 750,000 images were estimated from those of 4" in paper
    assert "e+0" not in here + paper
    assert " 0 GiB" not in here + paper


def test_a_batch_that_was_tried_out_whole_is_not_called_a_part(recipe):
    content = engine(recipe, "engine.batch_size=4", "engine.accumulation=2")
    assert "tried out" not in "\n".join(dry_run.report_lines(trial(), content, 1e-4, None))


def test_a_bfloat16_recipe_is_tried_out_in_what_is_fast_here(store, recipe, tmp_path, capsys, monkeypatch):
    slow = dataclasses.replace(probe_precision(torch.device("cpu")), precision="no")
    monkeypatch.setattr("brainfound.training.process.probe_precision", lambda device: slow)
    content = recipe("engine.precision=bf16")
    pretrain(content, store, out=tmp_path / "run", dry_run=True, quiet=True, gpus=2, gpu="A40")
    here, paper = capsys.readouterr().out.split("\n\n")
    assert "on cpu, float32" in here
    assert "bfloat16 is not faster here" in here
    assert "149.7 TFLOP/s (bfloat16)" in paper
    assert "measured in float32" in paper


def test_memory_that_does_not_grow_with_the_images_is_counted_once():
    measured = trial(
        num_images=4, forward_bytes=5 * GIB, half_batch_forward_bytes=3 * GIB
    )  # 1 GiB, and 1 GiB per image
    assert measured.activation_bytes(64) == pytest.approx(65 * GIB)
    assert measured.activation_bytes(1) == pytest.approx(2 * GIB)
    assert trial(num_images=4, forward_bytes=5 * GIB).activation_bytes(64) == pytest.approx(80 * GIB)


def test_a_few_images_foretell_the_memory_of_many(store, recipe, tmp_path, monkeypatch):
    found = {}
    inner = dry_run.measure_training_steps

    def remember(*arguments):
        trial = inner(*arguments)
        found[trial.num_images] = trial
        return trial

    monkeypatch.setattr("brainfound.pretraining.dry_run.trial.measure_training_steps", remember)
    for num_tried in (4, 24):
        monkeypatch.setattr("brainfound.pretraining.dry_run.trial.NUM_ESTIMATE_IMAGES", num_tried)
        content = recipe("engine.batch_size=24", "objective.head.prototypes=32768", "objective.drop_path=0.3")
        pretrain(content, store, out=tmp_path / "run", dry_run=True, quiet=True, gpu="H200")
    few, many = found[4], found[24]
    assert few.activation_bytes(24) == pytest.approx(many.forward_bytes, rel=0.15)
    # In plain proportion it would be far off.
    assert few.forward_bytes * 6 > 1.3 * many.forward_bytes


def test_where_the_weights_do_not_fit_what_needs_no_trial_is_reported(store, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("brainfound.pretraining.dry_run.trial.available_memory_bytes", lambda device: 1000)
    monkeypatch.setattr("brainfound.pretraining.dry_run.trial.build_model", None)  # would fail
    content = recipe("engine.batch_size=512", "engine.keep_checkpoints=3")
    pretrain(content, store, out=tmp_path / "run", dry_run=True, quiet=True, gpus=8, gpu="A100-80GB")
    here, paper = capsys.readouterr().out.split("\n\n")
    assert "too little memory for a trial" in here
    assert "0.000954 MiB are free" in here
    for part in ("effective learning rate  0.002", "weights", "anchor", "3 checkpoints"):
        assert part in here
    for part in ("arithmetic", "images/s", "step", "ddp", "fsdp", "and activations", "larger machine"):
        assert part in paper


def test_weights_that_fit_no_gpu_are_reported_without_a_trial(recipe):
    machine = TargetHardware(find_gpu("L4"), 8)
    text = "\n".join(dry_run.report_without_measurement(SIZES, GIB, engine(recipe), 1e-4, machine))
    assert "does not fit, even without activations" in text  # ddp
    assert "and activations" in text  # fsdp


def test_an_outline_has_the_sizes_of_the_model(store, recipe):
    content = recipe()
    made = build_model(content.init, store, content.views.global_size, seed=0)
    outline = build_meta_model(content.init, store, content.views.global_size)
    assert {name: value.shape for name, value in outline.state_dict().items()} == {
        name: value.shape for name, value in made.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in outline.parameters())


@pytest.mark.parametrize("source", ["dinov2", "vit", "brainfound"])
def test_an_outline_is_made_from_a_configuration_alone(store, tmp_path, source):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    folder = tmp_path / source
    if source == "brainfound":
        backbone = AutoConfig.for_model("dinov2", **sizes)
        BrainFoundConfig(backbone_config=backbone, contrasts=store.contrasts).save_pretrained(folder)
    else:
        AutoConfig.for_model(source, intermediate_size=128, **sizes).save_pretrained(folder)
    outline = build_meta_model(InitRecipe(source=str(folder)), store, 32)
    assert isinstance(outline, BrainFoundModel)
    assert (outline.encoder.embed_dim, outline.encoder.num_layers, outline.encoder.patch_size) == (32, 2, 8)
    assert outline.encoder.contrasts == store.contrasts
    assert all(parameter.is_meta for parameter in outline.parameters())


@pytest.mark.parametrize("name", ["pretrain-vitl14-8gpu", "pretrain-vitg14-8gpu"])
def test_recipes_of_large_machines_are_tried_out_with_a_few_images(name):
    content = load(PretrainRecipe, name, "train").engine
    few = dry_run.shrink_engine_for_estimate(content, TargetHardware(find_gpu("A100-80GB"), 8), num_processes=1)
    assert (few.batch_size, few.accumulation, few.num_workers) == (dry_run.NUM_ESTIMATE_IMAGES, 1, 0)
    assert few.gradient_checkpointing == content.gradient_checkpointing


def test_the_largest_model_is_shared_between_gpus():
    """Whole, its weights, gradients and moments leave an 80-GB GPU next to nothing."""
    assert load(PretrainRecipe, "pretrain-vitg14-8gpu", "train").engine.parallel == "fsdp"


@pytest.mark.parametrize("kind", GPU_SPECS.values(), ids=lambda kind: kind.name)
def test_what_is_known_of_a_gpu_can_be(kind):
    # No GPU computes slower in bfloat16 than in float32, or gives a program all of its memory.
    assert kind.bf16_tflops is None or kind.bf16_tflops > kind.float32_tflops
    sold = min(
        (format_bytes for format_bytes in (16, 24, 32, 40, 48, 80, 141, 192) if format_bytes >= kind.memory_gib),
        default=0,
    )
    assert 0.9 * sold <= kind.memory_gib < sold


def test_the_documented_kinds_are_those_of_the_table():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "cluster.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"Known kinds: {', '.join(GPU_SPECS)}." in page


@pytest.mark.parametrize("name", ["a6000", "A40", "l40s", "L4"])
def test_gpus_with_48_gb_and_less_are_known_or_near(name):
    if name == "a6000":
        with pytest.raises(UsageError, match="Did you mean RTX-A6000"):
            find_gpu(name)
    else:
        assert find_gpu(name).name == name.upper()


def test_figures_are_plain():
    assert dry_run.format_number(1.361e7) == "13,600,000"
    assert dry_run.format_number(999.6) == "1,000"
    assert dry_run.format_number(99.95) == "100"
    assert dry_run.format_bytes(1023 * 2**20) == "1,020 MiB"
    assert dry_run.format_bytes(GIB) == "1 GiB"
    assert dry_run.format_duration(0.5) == "500 ms"
    assert dry_run.format_duration(100 * 3600) == "4.17 days"
