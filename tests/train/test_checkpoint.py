"""Checkpoints: whole or absent."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch

from brainfound.errors import TrainingError
from brainfound.train import checkpoint as checkpoints


def make(step: int) -> checkpoints.Checkpoint:
    weight = torch.full((2, 3), float(step))
    return checkpoints.Checkpoint(
        step,
        {"weight": weight},
        {"teacher": weight + 1},
        {"state": {0: {"exp_avg": weight}}, "param_groups": []},
        {"task": {}},
    )


def test_round_trip_and_only_the_newest_stay(tmp_path):
    for step in (5, 10, 100):
        path = checkpoints.save_checkpoint(tmp_path, make(step), keep=2)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["step-000010", "step-000100"]
    assert checkpoints.latest_valid(tmp_path) == path
    loaded = checkpoints.load_checkpoint(path)
    assert loaded.step == 100
    assert torch.equal(loaded.model["weight"], torch.full((2, 3), 100.0))
    assert torch.equal(loaded.task["teacher"], torch.full((2, 3), 101.0))
    assert torch.equal(loaded.optimizer["state"][0]["exp_avg"], torch.full((2, 3), 100.0))


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "state"])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    first = checkpoints.save_checkpoint(tmp_path, make(1), keep=3)
    second = checkpoints.save_checkpoint(tmp_path, make(2), keep=3)
    file = second / ("state.json" if damage == "state" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="step-000002 is torn"):
        assert checkpoints.latest_valid(tmp_path) == first


def test_what_a_killed_process_left_is_not_taken_for_a_checkpoint(tmp_path):
    (tmp_path / ".writing-step-000007").mkdir()
    assert checkpoints.latest_valid(tmp_path) is None
    checkpoints.save_checkpoint(tmp_path, make(8), keep=1)
    assert not list(tmp_path.glob(".writing*"))


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(100, 90, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TrainingError, match="no room"):
        checkpoints.save_checkpoint(tmp_path, make(1), keep=1)
    assert checkpoints.list_checkpoints(tmp_path) == []
