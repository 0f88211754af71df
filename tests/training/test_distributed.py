"""What only real processes show: a SIGKILL at a bad moment, and two ranks that train together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from brainfound.pretraining.objectives import losses
from brainfound.pretraining.pretrain import pretrain
from tests.ranks import launch
from tests.tiny_runs import require_same_checkpoints, untimed_lines

KILLED_WHILE_SAVING = """
from brainfound.training import checkpoint
save = checkpoint.torch.save
def torn_save(value, path):
    save(value, path)
    if "step-000006" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.torch.save = torn_save
"""

RUN = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from brainfound.pretraining.pretrain import pretrain
{before}
pretrain(sys.argv[1], sys.argv[2], out=sys.argv[3], quiet=True, resume="--resume" in sys.argv)
{after}
"""

# Each rank writes its teacher's weights, and what the losses say of its part of a batch that all know.
TWO_RANKS_BEFORE = """
from brainfound.pretraining.training_task import PretrainTask
tasks = []
prepare = PretrainTask.make_optimizer
def make_optimizer(self):
    tasks.append(self)
    return prepare(self)
PretrainTask.make_optimizer = make_optimizer
"""

TWO_RANKS_AFTER = """
import hashlib, json
from brainfound.pretraining.objectives import losses
from brainfound.training import distributed
task = tasks[0]
digest = hashlib.sha256()
for weight in (*task.objective.teacher.parameters(), *task.model.parameters()):
    digest.update(weight.detach().numpy().tobytes())
generator = torch.Generator().manual_seed(0)
scores, features = torch.randn(6, 5, generator=generator), torch.randn(6, 4, generator=generator)
own = slice(task.rank * 3, task.rank * 3 + 3)
mine = features[own].clone().requires_grad_()
groups = distributed.gather_rows(torch.tensor([0, 0, 1, 2, 2, 3])[own])
koleo = losses.koleo(distributed.gather_rows(mine), groups)
koleo.backward()
facts = {
    "world_size": task.world_size,
    "weights": digest.hexdigest(),
    "sinkhorn": losses.sinkhorn_knopp(scores[own], 0.5).tolist(),
    "koleo": koleo.item(),
    "koleo_gradient": (mine.grad / task.world_size).tolist(),
}
with open(sys.argv[3] + f".rank{task.rank}.json", "w") as file:
    json.dump(facts, file)
"""


def script(folder: Path, before: str = "", after: str = "") -> Path:
    path = folder / "run.py"
    path.write_text(RUN.format(before=before, after=after))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def require_same_runs(first: Path, second: Path) -> None:
    assert untimed_lines(first) == untimed_lines(second)
    require_same_checkpoints(first, second, step=6)


def test_a_run_killed_while_saving_resumes_to_the_same_losses_and_weights(finished, store, recipe, tmp_path):
    (tmp_path / "tiny.yaml").write_text(recipe().to_yaml())
    run = tmp_path / "run"
    command = [sys.executable, script(tmp_path, KILLED_WHILE_SAVING), tmp_path / "tiny.yaml", store.path, run]
    killed = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (run / "export").exists()
    assert [p.name for p in (run / "checkpoints").glob("step-*")] == ["step-000003"]
    pretrain(recipe(), store, out=run, resume=True, quiet=True)
    require_same_runs(finished, run)


@pytest.mark.slow
def test_two_ranks_train_as_one(store, recipe, tmp_path):
    """Through the shipped launch file: same teacher on both ranks, losses of the global batch, exact resume."""
    (tmp_path / "tiny.yaml").write_text(recipe().to_yaml())
    script(tmp_path, TWO_RANKS_BEFORE, TWO_RANKS_AFTER)
    run = tmp_path / "run"
    launch(tmp_path / "run.py", tmp_path / "tiny.yaml", store.path, run)
    facts = [json.loads((tmp_path / f"run.rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [fact["world_size"] for fact in facts] == [2, 2]
    assert facts[0]["weights"] == facts[1]["weights"]
    assert [line["step"] for line in untimed_lines(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]

    generator = torch.Generator().manual_seed(0)
    scores, features = torch.randn(6, 5, generator=generator), torch.randn(6, 4, generator=generator)
    both = torch.tensor(facts[0]["sinkhorn"] + facts[1]["sinkhorn"])
    torch.testing.assert_close(both, losses.sinkhorn_knopp(scores, 0.5))
    features.requires_grad_()
    expected = losses.koleo(features, torch.tensor([0, 0, 1, 2, 2, 3]))
    expected.backward()
    assert facts[0]["koleo"] == facts[1]["koleo"] == pytest.approx(expected.item())
    gradient = torch.tensor(facts[0]["koleo_gradient"] + facts[1]["koleo_gradient"])
    # The data-parallel average over ranks of world size × gradient / world size.
    torch.testing.assert_close(gradient, features.grad)
