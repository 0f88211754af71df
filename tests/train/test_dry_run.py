"""The dry run: what is measured here, and the estimate for other machines."""

from __future__ import annotations

import pytest
import torch

from brainfound.errors import UsageError
from brainfound.train import dry_run
from brainfound.train.dry_run import Machine, Trial, Weights
from brainfound.train.flops import StepFlops
from brainfound.train.gpus import KINDS, find_gpu
from brainfound.train.pretrain import pretrain

GIB = dry_run.GIB
# DINOv2 ViT-g/14 with two heads: about 1.1 thousand million weights.
GIANT = Weights(
    student=1_250_000_000,
    trained=1_250_000_000,
    teacher=1_250_000_000,
    anchor=1_136_000_000,
    encoder=1_136_000_000,
    layer=18_900_000,
)


def trial(**changes) -> Trial:
    facts = {
        "device": torch.device("cpu"),
        "precision": "no",
        "num_processes": 1,
        "num_images": 2,
        "seconds_per_step": 4.0,
        "forward_bytes": 2 * GIB,
        "flops": StepFlops(student=6e12, teacher=1e12, anchor=1e12),
        "weights": GIANT,
        "effective_lr": 1e-4,
        "loss": 9.0,
        "ln_k": 11.09,
    }
    return Trial(**{**facts, **changes})


def engine(recipe, *changes: str):
    return recipe("engine.precision=auto", "engine.steps=1000", "engine.batch_size=64", *changes).engine


def test_the_report_names_both_machines(store, recipe, tmp_path, capsys):
    content = recipe("engine.precision=auto")
    pretrain(content, store, out=tmp_path / "run", dry_run=True, quiet=True, gpus=4, gpu="h100")
    assert not (tmp_path / "run").exists()
    here, paper = capsys.readouterr().out.split("\n\n")
    for part in ("effective learning rate", "images/s", "GFLOP per image", "GiB at most", "disk", "ln K"):
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
        ({"gpu": "A100"}, "Say which: A100-40GB or A100-80GB"),
        ({"gpus": 8}, "Give --gpu"),
        ({"gpus": 0, "gpu": "H100"}, "expected 1 or more"),
        ({"gpus": 3, "gpu": "H100"}, "Set engine.batch_size=9 or 6"),
    ],
)
def test_what_cannot_be_estimated_is_said_before_anything_is_trained(store, recipe, tmp_path, arguments, words):
    with pytest.raises(UsageError, match=words):
        pretrain(recipe(), store, out=tmp_path / "run", dry_run=True, quiet=True, **arguments)


def test_an_estimate_without_a_dry_run_is_refused(store, recipe, tmp_path):
    with pytest.raises(UsageError, match="--dry-run"):
        pretrain(recipe(), store, out=tmp_path / "run", quiet=True, gpus=8, gpu="H100")
    assert not (tmp_path / "run").exists()


def test_speed_follows_from_operations_peak_and_utilisation(recipe):
    machine = Machine(find_gpu("A100-80GB"), num_gpus=8, utilisation=0.5)
    text = "\n".join(dry_run.report(trial(), engine(recipe), 1e-4, machine))
    # 4 TFLOP per image at half of 8 × 312 TFLOP/s.
    assert "312 images/s" in text
    assert f"about {1000 * 64 / 312 / 3600:.2f} h" in text
    assert "50% of 312 TFLOP/s (bfloat16)" in text


def test_a_gpu_without_bfloat16_is_counted_in_float32_and_says_so(recipe):
    text = "\n".join(dry_run.report(trial(), engine(recipe), 1e-4, Machine(find_gpu("V100-32GB"))))
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
def test_what_does_not_fit_is_said_with_what_would(recipe, kind, num_gpus, gib_per_image, words):
    small = trial(forward_bytes=2 * gib_per_image * GIB, precision="bf16")
    text = "\n".join(dry_run.report(small, engine(recipe), 1e-4, Machine(find_gpu(kind), num_gpus)))
    assert "does not fit" in text
    assert words in text


def test_what_fits_needs_no_advice(recipe):
    text = "\n".join(dry_run.report(trial(precision="bf16"), engine(recipe), 1e-4, Machine(KINDS["H200"], 8)))
    assert "fits" in text
    assert "would fit" not in text


def test_the_disk_holds_every_checkpoint_and_one_more(recipe):
    content = engine(recipe, "engine.keep_checkpoints=3")
    one = 4 * (GIANT.student + GIANT.teacher + GIANT.anchor + 2 * GIANT.trained)
    assert dry_run.disk_bytes(GIANT, content) == 4 * one + 8 * GIANT.encoder


def test_memory_is_measured_as_a_gpu_would_run_unless_the_recipe_says_otherwise(recipe):
    assert dry_run.as_on_gpu(recipe().engine).local_crops == "packed"
    assert dry_run.as_on_gpu(recipe("engine.attention=matmul").engine).attention == "matmul"
