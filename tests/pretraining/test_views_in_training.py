"""Neighbouring slices and split contrasts in a real run: they act, and a run that goes on is the same run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from brainfound.pretraining.pretrain import pretrain
from tests.tiny_runs import log_lines, require_same_checkpoints

VIEWS = ("views.neighbour_mm=13", "views.split_contrasts=0.5")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log_lines(run, "loss")]


@pytest.fixture(scope="module")
def whole(store, recipe, tmp_path_factory) -> Path:
    return pretrain(recipe(*VIEWS), store, out=tmp_path_factory.mktemp("views") / "run", quiet=True)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_the_same_neighbours(whole, store, recipe, tmp_path, num_workers):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-000006")
    shutil.rmtree(run / "export")
    pretrain(recipe(*VIEWS, f"engine.num_workers={num_workers}"), store, out=run, resume=True, quiet=True)
    assert losses(run) == losses(whole)
    require_same_checkpoints(whole, run, step=6)


def test_both_options_reach_the_loss(whole, finished, store, recipe, tmp_path):
    without_split = pretrain(recipe(VIEWS[0], "engine.steps=1"), store, out=tmp_path / "neighbours", quiet=True)
    firsts = {losses(run)[0] for run in (whole, finished, without_split)}
    assert len(firsts) == 3
