"""Runs that are really killed (SIGKILL) and go on in fresh processes: not a bit of them may differ.

One recipe is trained without a disturbance; then again, killed after a random step, killed while it saves
its last checkpoint, and with its newest checkpoint torn by the disk. What counts is every number of the log
but the clock's, the weights, the teacher, the optimiser's state, the counters, and the slices of each step.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.training_task import PretrainTask
from tests.ranks import launch_command
from tests.tiny_runs import require_same_checkpoints, untimed_lines

SETTINGS = ("engine.steps=8", "engine.checkpoint_every=2", "engine.keep_checkpoints=2", "probe.every=4")
LAST = "step-000008"

# The environment says when a rank dies: as a machine does, without a word and at once.
RUN = """
import hashlib, json, os, signal, sys
import torch
torch.set_num_threads(1)
from brainfound.training import checkpoint
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.training_task import PretrainTask

recipe, store, out, order = sys.argv[1:5]
die_at, term_at, die_saving, falls, die_rolling = (
    os.environ.get(name) for name in ("DIE_AT", "TERM_AT", "DIE_SAVING", "FALLS", "DIE_ROLLING")
)
loss, after_step, save = PretrainTask.loss, PretrainTask.after_step, torch.save

def recorded(self, model, batch, step, micro_batch):
    with open(f"{order}.{self.rank}", "a") as file:
        file.write(json.dumps([step, hashlib.sha256(batch.pixels.numpy().tobytes()).hexdigest()]) + "\\n")
    return loss(self, model, batch, step, micro_batch)

def mortal(self, step, taken):
    after_step(self, step, taken)
    if step + 1 == int(die_at or 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if step + 1 == int(term_at or 0) and self.rank == self.world_size - 1:
        os.kill(os.getpid(), signal.SIGTERM)

def torn(value, path):
    save(value, path)
    if die_saving and die_saving in str(path):
        os.kill(os.getpid(), signal.SIGKILL)

def scripted(self, step):
    score = 0.1 if step >= 6 and self.guard.state.lr_scale == 1 else 0.5 + 0.1 * min(step, 2)
    return {"probe": score, "probe_standard_error": 0.0}

def die(folder, present):
    os.kill(os.getpid(), signal.SIGKILL)

PretrainTask.loss, PretrainTask.after_step, checkpoint.torch.save = recorded, mortal, torn
if falls:
    PretrainTask.evaluate = scripted
if die_rolling:
    checkpoint.remove_rolled_back_checkpoints = die
pretrain(recipe, store, out=out, quiet=True, resume="--resume" in sys.argv)
"""


def start(folder: Path, store, run: Path, num_processes: int, *more: str, **environment: object):
    """One start of the run, to its end or its death."""
    (folder / "run.py").write_text(RUN)
    # A port of its own for each start: the one before may not have given back its own yet.
    launcher = launch_command("--num_processes", num_processes) if num_processes > 1 else [sys.executable]
    command = [*launcher, folder / "run.py", folder / "tiny.yaml", store.path, run]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}}
    arguments = [*command, f"{run}.order", *more]
    return subprocess.run(list(map(str, arguments)), env=variables, capture_output=True, text=True, timeout=240)


def order_of(run: Path, rank: int) -> dict[int, str]:
    """The slices of each step, as they were read last."""
    return dict(json.loads(text) for text in Path(f"{run}.order.{rank}").read_text().splitlines())


def require_same(whole: Path, resumed: Path, num_processes: int, story: str) -> None:
    lines, others = untimed_lines(whole), untimed_lines(resumed)
    assert [line["step"] for line in lines] == [line["step"] for line in others], story
    for line, other in zip(lines, others, strict=True):
        differing = {key for key in line.keys() | other.keys() if line.get(key) != other.get(key)}
        assert differing == set(), (line["step"], story)
    one, other = (run / "checkpoints" / LAST for run in (whole, resumed))
    require_same_checkpoints(whole, resumed, step=int(LAST.removeprefix("step-")))
    states = [torch.load(path / "optimizer.pt", weights_only=True) for path in (one, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"], story
    assert states[0]["state"].keys() == states[1]["state"].keys() != set()
    for index, moments in states[0]["state"].items():
        assert all(torch.equal(moment, states[1]["state"][index][name]) for name, moment in moments.items()), story
    counters = [json.loads((path / "state.json").read_text()) for path in (one, other)]
    assert [counters[0][key] for key in ("engine", "task")] == [counters[1][key] for key in ("engine", "task")]
    for rank in range(num_processes):
        assert order_of(whole, rank) == order_of(resumed, rank), story
        assert sorted(order_of(whole, rank)) == list(range(8))


def undisturbed(folder: Path, store, num_processes: int, monkeypatch) -> Path:
    whole = folder / "whole"
    if num_processes > 1:
        done = start(folder, store, whole, num_processes)
        assert done.returncode == 0, done.stderr[-3000:]
        return whole
    loss = PretrainTask.loss

    def recorded(self, model, batch, step, micro_batch):
        with Path(f"{whole}.order.0").open("a") as file:
            file.write(json.dumps([step, hashlib.sha256(batch.pixels.numpy().tobytes()).hexdigest()]) + "\n")
        return loss(self, model, batch, step, micro_batch)

    monkeypatch.setattr(PretrainTask, "loss", recorded)
    return pretrain(folder / "tiny.yaml", store, out=whole, quiet=True)


# One of them in every run of the tests; its kill while saving is in test_distributed.py.
@pytest.mark.parametrize(
    ("num_processes", "num_workers", "dies_saving"),
    [
        (1, 2, False),
        pytest.param(1, 0, True, marks=pytest.mark.slow),
        pytest.param(1, 2, True, marks=pytest.mark.slow),
        pytest.param(2, 0, True, marks=pytest.mark.slow),
        pytest.param(2, 2, True, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_bit_for_bit_as_an_undisturbed_one(
    store, recipe, tmp_path, monkeypatch, num_processes, num_workers, dies_saving
):
    def write_recipe(workers: int) -> None:
        (tmp_path / "tiny.yaml").write_text(recipe(*SETTINGS, f"engine.num_workers={workers}").to_yaml())

    # The undisturbed run reads in the training process: the number of workers must not matter either.
    write_recipe(0)
    whole, run = undisturbed(tmp_path, store, num_processes, monkeypatch), tmp_path / "run"

    write_recipe(num_workers)
    step = random.Random(2 * num_processes + num_workers + dies_saving).randrange(5, 8)
    story = f"killed after step {step}"
    killed = start(tmp_path, store, run, num_processes, DIE_AT=step)
    assert killed.returncode != 0
    assert untimed_lines(run)[-1]["step"] < step, killed.stderr[-3000:]

    if dies_saving:
        killed = start(tmp_path, store, run, num_processes, "--resume", DIE_SAVING=LAST)
        assert killed.returncode != 0
        names = sorted(path.name for path in (run / "checkpoints").glob("*step-*"))
        assert names == [f".writing-{LAST}", "step-000004", "step-000006"], killed.stderr[-3000:]
    assert not (run / "export").exists()

    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    content = (newest / "optimizer.pt").read_bytes()
    (newest / "optimizer.pt").write_bytes(content[:-100])
    done = start(tmp_path, store, run, num_processes, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{newest.name} is damaged" in done.stderr
    require_same(whole, run, num_processes, story)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_after_a_checkpoint(store, recipe, tmp_path):
    (tmp_path / "tiny.yaml").write_text(recipe(*SETTINGS).to_yaml())
    run = tmp_path / "run"
    stopped = start(tmp_path, store, run, 2, TERM_AT=3)
    assert stopped.returncode != 0
    assert "stopped by a signal after saving a checkpoint" in stopped.stderr
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*"))[-1] == "step-000003"


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_rollback_that_is_killed_ends_bit_for_bit_as_an_undisturbed_one(store, recipe, tmp_path, num_processes):
    more = ("engine.checkpoint_every=1", "engine.num_workers=2")
    # The run begins with new weights, whose probes are not judged while the grace lasts.
    guard = ("guard.grace_steps=1", "guard.on_failure=roll_back", "guard.probe_patience=1")
    settings = ("probe.every=2", *guard, *more)
    (tmp_path / "tiny.yaml").write_text(recipe(*SETTINGS, *settings).to_yaml())
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = start(tmp_path, store, whole, num_processes, FALLS=1)
    assert done.returncode == 0, done.stderr[-3000:]
    (event,) = [line for line in untimed_lines(whole) if "rolled_back_from" in line]
    assert (event["step"], event["rolled_back_from"], event["lr_scale"]) == (2, 6, 0.3)
    assert (whole / "log-before-rollback-1.jsonl").is_file()
    killed = start(tmp_path, store, run, num_processes, FALLS=1, DIE_ROLLING=1)
    assert killed.returncode != 0
    # The decision is on the disk, and nothing that follows from it.
    assert (run / "checkpoints" / "step-000005").is_dir()
    assert untimed_lines(run)[-1]["step"] == 6, killed.stderr[-3000:]
    done = start(tmp_path, store, run, num_processes, "--resume", FALLS=1)
    assert done.returncode == 0, done.stderr[-3000:]
    require_same(whole, run, num_processes, "killed while it rolled back")
    names = [sorted(path.name for path in (folder / "checkpoints").glob("step-*")) for folder in (whole, run)]
    assert names[0] == names[1] == ["step-000002", "step-000007", LAST]
