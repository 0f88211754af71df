"""Two processes and one, on the same global batch: the same losses, gradients, weights and teacher.

The views and masks of a run depend on the rank, so they are dealt here in pieces of two slices: the
pieces of a step are drawn from (step, piece), whoever computes them, with another range of mask ratios
in each, so that ranks have different numbers of masked tokens. Everything else is the shipped run:
loader, objective, data-parallel averaging, optimiser, teacher.

Filling in hidden patches (masked autoencoding, and the hybrid) has pieces likewise.

What gradient accumulation may change, and what not: Sinkhorn-Knopp and KoLeo look at the micro-batch of
all ranks, as they must when only one micro-batch is in memory. Terms of single images (the anchors) do
not depend on how a step is divided. Both are held here.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from brainfound.data.augmentation import MultiCrop
from brainfound.pretraining.objectives import losses, masked_autoencoder, self_distillation
from brainfound.pretraining.training_task import PretrainTask
from brainfound.training import run_folder
from tests.ranks import free_port
from tests.tiny_runs import log_lines

STEPS = 3
DECODER = "decoder: {width: 16, layers: 1, heads: 2}"
HYBRID = ["objective.kind=hybrid", f"objective.reconstruction={{{DECODER}}}"]
FILLING_IN = [f"objective={{kind: masked_autoencoder, anchor_gram_weight: 1, anchor_cls_weight: 0.5, {DECODER}}}"]
# A recipe per run: precision, and what differs from the settings below.
RUNS = {
    "whole": ("float64", ["engine.accumulation=1"]),
    "in two": ("float32", ["engine.accumulation=2"]),
    "hybrid": ("float64", ["engine.accumulation=1", *HYBRID]),
    "filling in": ("float64", ["engine.accumulation=1", *FILLING_IN]),
    "filling in, in two": ("float64", ["engine.accumulation=2", *FILLING_IN]),
    "anchors whole": ("float64", ["engine.accumulation=1"]),
    "anchors in two": ("float64", ["engine.accumulation=2"]),
}
# Precision, rows of the batch, rows of the first rank.
SPLITS = [
    (dtype, rows, first)
    for dtype in (torch.float32, torch.float64)
    for rows, first in ((8, 4), (9, 6), (9, 1), (7, 0), (7, 7), (1, 0), (0, 0))
]
ANCHORS_ONLY = ["objective.dino_weight=0", "objective.ibot_weight=0", "objective.koleo_weight=0"]
SETTINGS = [
    f"engine.steps={STEPS}",
    "probe.every=0",
    "seed=5",
    "objective.drop_path=0",
    "objective.koleo_weight=0.5",
    "objective.anchor_gram_weight=1",
    "objective.anchor_cls_weight=0.5",
    "objective.mask_probability=0.5",
    "objective.momentum=[0.8,1]",
    "schedule.head_warmup_steps=1",
    "schedule.warmup_steps=1",
    "optim.lr=0.004",
    "optim.clip_norm=0.5",
]

TRAIN = """
import dataclasses, json, os, sys
import numpy as np
import torch
torch.set_num_threads(1)
from brainfound.data.augmentation import MultiCrop
from brainfound.pretraining import pretrain as pretraining
from brainfound.training import run_folder
from brainfound.pretraining.objectives import masked_autoencoder, self_distillation
from brainfound.pretraining.objectives.masking import PatchSplit
from brainfound.pretraining.training_task import PretrainTask

store, folder, runs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
crop, draw, prepare = MultiCrop.__call__, self_distillation.sample_block_masks, PretrainTask.make_optimizer
hide, loss = masked_autoencoder.sample_hidden_patches, PretrainTask.loss
state = {}
SLICES = 2

def keyed_loss(self, model, batch, step, micro_batch):
    state.update(step=step, micro_batch=micro_batch)
    return loss(self, model, batch, step, micro_batch)

def pieces(num_slices):
    # The numbers of this micro-batch's pieces within the step, in the order of the global micro-batch.
    here = num_slices // SLICES
    first = state["micro_batch"] * here * world + rank * here
    return range(first, first + here)

def generator(number, stream):
    return torch.Generator().manual_seed(1000 * state["step"] + 10 * number + stream)

def merged(parts, num_crops):
    # Crop-major again: crop A of all pieces, then crop B of all pieces.
    return torch.cat([part.unflatten(0, (num_crops, -1)) for part in parts], dim=1).flatten(0, 1)

def crop_pieces(self, pixels, present, *_, **__):
    stream = 2 if self.num_global == 1 else 0  # the crop that is filled in has draws of its own
    made = [
        crop(
            self, pixels[i * SLICES:][:SLICES], present[i * SLICES:][:SLICES],
            generator(n, stream), generator(n, stream + 1),
        )
        for i, n in enumerate(pieces(len(pixels)))
    ]
    def join(name):
        views = [getattr(one, name) for one in made]
        if views[0] is None:
            return None
        count = len(views[0].pixels) // SLICES
        dtype = state["dtype"]
        return dataclasses.replace(
            views[0],
            pixels=merged([v.pixels for v in views], count).to(dtype),
            contrast_mask=merged([v.contrast_mask for v in views], count),
        )
    return dataclasses.replace(made[0], global_views=join("global_views"), local_views=join("local_views"))

def draw_pieces(num_crops, grid, rng, probability, ratios):
    made = [
        draw(
            2 * SLICES, grid, np.random.default_rng([state["step"], n]), probability,
            ((0.1, 0.5), (0.4, 0.9))[n // 2],
        )
        for n in pieces(num_crops // 2)
    ]
    mask = merged([one.mask for one in made], 2)
    counts = mask.sum(dim=1)
    state["masked"].append(len(mask.flatten().nonzero()))
    return dataclasses.replace(
        made[0],
        mask=mask,
        indices=mask.flatten().nonzero().flatten(),
        weights=(1 / counts.clamp(min=1).float())[:, None].expand_as(mask)[mask],
        unmasked_crops=(counts == 0).nonzero().flatten(),
    )

def hide_pieces(num_crops, num_patches, num_hidden, rng):
    made = [
        hide(SLICES, num_patches, num_hidden, np.random.default_rng([state["step"], n, 1]))
        for n in pieces(num_crops)
    ]
    return PatchSplit(*map(torch.cat, zip(*made)))

def make_optimizer(task):
    objective = task.objective
    # Moved apart, the student first: a teacher that is the student proves little. Masked autoencoding has none.
    teacher = getattr(getattr(objective, "distillation", objective), "teacher", None)
    models = {"weights": objective.student} | ({} if teacher is None else {"teachers": teacher})
    for seed, module in enumerate(models.values()):
        source = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=source) * 0.03)
    for module in (objective.student, *objective.frozen_modules()):
        module.to(state["dtype"])
    optimizer = prepare(task)
    kept = state["kept"]
    optimizer.register_step_pre_hook(lambda *_: kept["gradients"].append(
        {n: p.grad.double().clone() for n, p in objective.student.named_parameters() if p.requires_grad}))
    after_step = objective.after_step
    def stepped(step, taken):
        after_step(step, taken)
        for name, module in models.items():
            kept[name].append({n: p.detach().double().clone() for n, p in module.named_parameters()})
    objective.after_step = stepped
    return optimizer

MultiCrop.__call__, PretrainTask.make_optimizer = crop_pieces, make_optimizer
self_distillation.sample_block_masks = draw_pieces
masked_autoencoder.sample_hidden_patches, PretrainTask.loss = hide_pieces, keyed_loss
run_folder.plot_curves = lambda folder: None  # pictures take longer than these runs
for name, (dtype, recipe) in runs.items():
    kept = {"gradients": [], "weights": [], "teachers": []}
    state.update(dtype=getattr(torch, dtype), kept=kept, masked=[])
    run = pretraining.pretrain(recipe, store, out=f"{folder}/{name}", quiet=True)
    torch.save(kept | {"masked": state["masked"]}, f"{folder}/{name}.rank{rank}.pt")
"""

LOSSES = """
import sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from brainfound.pretraining.objectives import losses
from brainfound.pretraining.objectives.prototypes import Projection
from brainfound.training import distributed

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
cases = torch.load(f"{folder}/cases.pt")
answers = {"sinkhorn": [], "assign": [], "koleo": [], "gradient": []}
for scores, first in cases["sinkhorn"]:
    own = scores[:first] if rank == 0 else scores[first:]
    answers["sinkhorn"].append(losses.sinkhorn_knopp(own, 0.05, 3))
for unit, columns, first, temperature in cases["assign"]:
    own = unit[:first] if rank == 0 else unit[first:]
    given = losses.sinkhorn_knopp(Projection(own, columns), temperature, 3)
    answers["assign"].append(given.take(slice(None)))
for rows, groups in cases["koleo"]:
    half = slice(rank * len(rows) // 2, (rank + 1) * len(rows) // 2)
    own = rows[half].clone().requires_grad_()
    loss = losses.koleo(distributed.gather_rows(own), distributed.gather_rows(groups[half]))
    loss.backward()
    answers["koleo"].append(loss.detach())
    answers["gradient"].append(own.grad / 2)  # the mean over ranks that data-parallel training takes
torch.save(answers, f"{folder}/answers.{rank}.pt")
dist.destroy_process_group()
"""


def start(*arguments: object, **variables: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(*processes: subprocess.Popen) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=240)
        if process.returncode:
            for other in processes:
                other.kill()
        assert process.returncode == 0, errors.decode()[-3000:]


# The losses alone


def test_losses_over_two_ranks_are_those_of_the_concatenated_batch(tmp_path):
    """With as many rows on each rank, with different numbers, and with none on one or both."""
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(9, 40, generator=generator, dtype=torch.float64) * 0.3).clamp(-1, 1)
    unit, prototypes = (
        F.normalize(torch.randn(rows, 6, generator=generator, dtype=torch.float64), dim=1) for rows in (9, 40)
    )
    cases = {
        # 0.02 is so low that the shift of the exponentials is a maximum over distributed.
        "assign": [
            (unit.to(dtype)[:rows], prototypes.to(dtype), first, temperature)
            for dtype, rows, first in SPLITS
            for temperature in (0.05, 0.02)
        ],
        "sinkhorn": [(scores.to(dtype)[:rows], first) for dtype, rows, first in SPLITS],
        "koleo": [
            (torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.tensor(groups))
            # Apart; a session that lies on both ranks; a rank whose rows have neighbours on the other rank only.
            for groups in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 2, 2, 2, 3, 4], [0, 0, 0, 0, 1, 2, 3, 0])
        ],
    }
    torch.save(cases, tmp_path / "cases.pt")
    (tmp_path / "losses.py").write_text(LOSSES)
    wait_for(*[start(tmp_path / "losses.py", rank, tmp_path) for rank in (0, 1)])
    answers = [torch.load(tmp_path / f"answers.{rank}.pt") for rank in (0, 1)]
    for number, (table, first) in enumerate(cases["sinkhorn"]):
        parts = [answer["sinkhorn"][number] for answer in answers]
        assert [len(part) for part in parts] == [first, len(table) - first]
        tolerance = 1e-5 if table.dtype == torch.float32 else 1e-12
        torch.testing.assert_close(torch.cat(parts), losses.sinkhorn_knopp(table, 0.05, 3), rtol=tolerance, atol=1e-9)
    for number, (table, columns, first, temperature) in enumerate(cases["assign"]):
        parts = [answer["assign"][number] for answer in answers]
        assert [len(part) for part in parts] == [first, len(table) - first]
        expected = losses.sinkhorn_knopp(table @ columns.T, temperature, 3)
        tolerance = 1e-5 if table.dtype == torch.float32 else 1e-10
        torch.testing.assert_close(torch.cat(parts), expected, rtol=tolerance, atol=tolerance)
    for number, (rows, groups) in enumerate(cases["koleo"]):
        whole = rows.clone().requires_grad_()
        loss = losses.koleo(whole, groups)
        loss.backward()
        for answer in answers:
            torch.testing.assert_close(answer["koleo"][number], loss.detach(), rtol=1e-12, atol=0)
        gradient = torch.cat([answer["gradient"][number] for answer in answers])
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-10, atol=1e-12)


# Whole runs


@pytest.fixture(scope="module")
def runs(store, recipe, tiny_backbone, tmp_path_factory) -> Path:
    """Every run of `RUNS` by one process (folder "one"), and those of whole objectives by two (folder "two")."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "train.py").write_text(TRAIN)
    content = {}
    for name, (dtype, overrides) in RUNS.items():
        only = ANCHORS_ONLY if name.startswith("anchors") else []
        settings = recipe(*SETTINGS, *overrides, *only, f"init.source={tiny_backbone}")
        file = folder / f"{name.replace(' ', '-')}.yaml"
        file.write_text(settings.to_yaml())
        content[name] = (dtype, str(file))
    for world in ("one", "two"):
        (folder / world).mkdir()
    both = {name: run for name, run in content.items() if not name.startswith("anchors")}
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        start(folder / "train.py", store.path, folder / "two", json.dumps(both), RANK=r, LOCAL_RANK=r, **common)
        for r in (0, 1)
    ]
    # The one process is this one, which has imported everything already.
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (MultiCrop, "__call__"),
            (PretrainTask, "make_optimizer"),
            (PretrainTask, "loss"),
            (masked_autoencoder, "sample_hidden_patches"),
            (self_distillation, "sample_block_masks"),
            (run_folder, "plot_curves"),
        ):
            patch.setattr(owner, name, getattr(owner, name))
        patch.setattr(sys, "argv", ["train.py", str(store.path), str(folder / "one"), json.dumps(content)])
        runpy.run_path(str(folder / "train.py"))
    wait_for(*started)
    return folder


def kept(folder: Path, name: str, rank: int = 0) -> dict:
    return torch.load(folder / f"{name}.rank{rank}.pt")


def loss_lines(folder: Path, name: str) -> list[dict[str, float]]:
    names = ("loss", "grad_norm/")
    return [{key: value for key, value in line.items() if key.startswith(names)} for line in log_lines(folder / name)]


def has_no_teacher(run: dict) -> bool:
    return not run["masked"]  # of masked autoencoding alone


def require_same(own: dict, other: dict, tolerance: float) -> None:
    """Gradients, weights and teachers of every step; tensors by their norms."""
    for what in ("gradients", "weights", "teachers"):
        assert len(own[what]) == len(other[what])
        assert len(other[what]) == (0 if what == "teachers" and has_no_teacher(other) else STEPS)
        for step, (mine, theirs) in enumerate(zip(own[what], other[what], strict=True)):
            assert mine.keys() == theirs.keys()
            largest = max(float(tensor.norm()) for tensor in theirs.values())
            for name, tensor in theirs.items():
                if name.endswith("k_proj.bias") and tolerance > 1e-6 and what != "gradients":
                    continue  # its gradient is rounding alone, of which AdamW makes steps of full size
                scale = max(float(tensor.norm()), 1e-3 * largest if what == "gradients" else 0.0)
                assert float((mine[name] - tensor).norm()) <= tolerance * scale, (what, step, name)


@pytest.mark.parametrize(
    ("name", "tolerance", "parts"),
    [
        ("whole", 1e-9, {"koleo", "ibot", "anchor_gram"}),
        ("in two", 1e-5, {"koleo", "ibot", "anchor_gram"}),
        ("hybrid", 1e-9, {"koleo", "ibot", "anchor_gram", "reconstruction"}),
        ("filling in", 1e-9, {"reconstruction", "anchor_gram", "anchor_cls"}),
        ("filling in, in two", 1e-9, {"reconstruction", "anchor_gram", "anchor_cls"}),
    ],
)
def test_two_ranks_train_as_one(runs, name, tolerance, parts):
    """Losses of the log, gradients after averaging and clipping, weights and teacher, on both distributed."""
    one = kept(runs / "one", name)
    two = [kept(runs / "two", name, rank) for rank in (0, 1)]
    assert [a + b for a, b in zip(two[0]["masked"], two[1]["masked"], strict=True)] == one["masked"]
    if name in ("whole", "hybrid"):
        assert all(a != b for a, b in zip(two[0]["masked"], two[1]["masked"], strict=True))
    for rank in (0, 1):
        require_same(two[rank], one, tolerance)
    for mine, theirs in zip(loss_lines(runs / "two", name), loss_lines(runs / "one", name), strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)
        assert {"loss", *(f"loss_{part}" for part in parts)} <= mine.keys()


def test_accumulation_changes_nothing_where_every_image_stands_alone(runs):
    require_same(kept(runs / "one", "anchors in two"), kept(runs / "one", "anchors whole"), 1e-9)
    require_same(kept(runs / "one", "filling in, in two"), kept(runs / "one", "filling in"), 1e-9)


def test_accumulation_does_change_what_looks_at_a_batch(runs):
    """Sinkhorn-Knopp balances a micro-batch, and KoLeo has its neighbours: said, and here shown."""
    whole, parted = (loss_lines(runs / "one", name)[0] for name in ("whole", "in two"))
    assert parted["loss_koleo"] < whole["loss_koleo"]  # fewer rows, farther neighbours
    assert parted["loss_ibot"] != pytest.approx(whole["loss_ibot"], rel=1e-4)
    assert parted["loss_anchor_cls"] == pytest.approx(whole["loss_anchor_cls"], rel=1e-5)
