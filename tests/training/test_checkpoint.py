"""Checkpoints: whole or absent."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch

from brainfound.errors import TrainingError
from brainfound.training import checkpoint
from tests.training.line_task import checkpoint_names, make_checkpoint


def test_round_trip_and_only_the_newest_stay(tmp_path):
    for step in (5, 10, 100):
        path = checkpoint.save_checkpoint(tmp_path, make_checkpoint(step), keep=2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-000010", "step-000100"]
    assert checkpoint.latest_valid_checkpoint(tmp_path) == path
    loaded = checkpoint.load_checkpoint(path)
    assert loaded.step == 100
    assert torch.equal(loaded.model["weight"], torch.full((2, 3), 100.0))
    assert torch.equal(loaded.task["teacher"], torch.full((2, 3), 101.0))
    assert torch.equal(loaded.optimizer["state"][0]["exp_avg"], torch.full((2, 3), 100.0))


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "state"])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    first = checkpoint.save_checkpoint(tmp_path, make_checkpoint(1), keep=3)
    second = checkpoint.save_checkpoint(tmp_path, make_checkpoint(2), keep=3)
    file = second / ("state.json" if damage == "state" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="step-000002 is damaged"):
        assert checkpoint.latest_valid_checkpoint(tmp_path) == first


@pytest.mark.parametrize("keep", [1, 2])
def test_no_checkpoint_makes_way_for_a_later_one_that_is_torn(tmp_path, keep):
    """The run went back over the torn one and is stopped before it has reached its step again."""
    checkpoint.save_checkpoint(tmp_path, make_checkpoint(4), keep)
    torn = checkpoint.save_checkpoint(tmp_path, make_checkpoint(6), keep=9)
    (torn / "model.safetensors").write_bytes(b"")
    new = checkpoint.save_checkpoint(tmp_path, make_checkpoint(5), keep)
    with pytest.warns(UserWarning, match="step-000006 is damaged"):
        assert checkpoint.latest_valid_checkpoint(tmp_path) == new
    assert len(checkpoint_names(tmp_path)) == keep + 1
    # Once its step is reached again, all is as it was.
    checkpoint.save_checkpoint(tmp_path, make_checkpoint(6), keep)
    assert checkpoint_names(tmp_path) == ["step-000005", "step-000006"][-keep:]
    assert checkpoint.latest_valid_checkpoint(tmp_path) == torn


def test_what_a_killed_process_left_is_not_taken_for_a_checkpoint(tmp_path):
    (tmp_path / ".writing-step-000007").mkdir()
    assert checkpoint.latest_valid_checkpoint(tmp_path) is None
    checkpoint.save_checkpoint(tmp_path, make_checkpoint(8), keep=1)
    assert not list(tmp_path.glob(".writing*"))


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(100, 90, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TrainingError, match="no room"):
        checkpoint.save_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_the_newest_kept_checkpoint_stays_and_older_kept_ones_go(tmp_path):
    for step in range(1, 8):
        checkpoint.save_checkpoint(tmp_path, make_checkpoint(step, kept=step in (2, 4)), keep=2)
    assert checkpoint_names(tmp_path) == ["step-000004", "step-000006", "step-000007"]


def test_checkpoints_that_are_there_count_as_room_for_a_run(tmp_path, monkeypatch):
    path = checkpoint.save_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    there = sum(file.stat().st_size for file in path.iterdir())
    usage = namedtuple("usage", "total used free")(10**9, 0, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    checkpoint.require_space_for_run(tmp_path, 2, there // 3, 10)
    with pytest.raises(TrainingError, match=r"no room for this run \(2 checkpoints"):
        checkpoint.require_space_for_run(tmp_path, 2, there, 10)


@pytest.mark.parametrize("file", ["model.safetensors", "task.safetensors", "optimizer.pt", "state.json"])
def test_a_quota_is_an_error_of_one_line_and_leaves_no_half_of_a_checkpoint(tmp_path, file):
    """The system refuses what is larger than 32 KiB: each writer has an exception of its own for that."""
    resource = pytest.importorskip("resource")
    first = checkpoint.save_checkpoint(tmp_path, make_checkpoint(1), keep=2)
    large = {"weight": torch.zeros(100_000)}
    parts = (
        vars(make_checkpoint(2))
        | {
            "model.safetensors": {"model": large},
            "task.safetensors": {"task": large},
            "optimizer.pt": {"optimizer": {"state": {0: large}, "param_groups": []}},
            "state.json": {"state": {"task": "x" * 100_000}},
        }[file]
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, before[1]))
        with pytest.raises(TrainingError, match=r"step-000002: the checkpoint cannot be written .*--resume") as error:
            checkpoint.save_checkpoint(tmp_path, checkpoint.Checkpoint(**parts), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [first]


def test_a_fault_of_the_device_is_not_reported_as_a_full_disk(tmp_path, monkeypatch):
    def fails(tensor):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    first = checkpoint.save_checkpoint(tmp_path, make_checkpoint(1), keep=2)
    weight = torch.zeros(2)
    weight.detach = lambda: fails(weight)
    later = make_checkpoint(2)
    for part in ({"model": {"weight": weight}}, {"optimizer": {"state": {0: {"exp_avg": weight}}}}):
        with pytest.raises(RuntimeError, match="illegal memory"):
            checkpoint.save_checkpoint(tmp_path, checkpoint.Checkpoint(**(vars(later) | part)), keep=2)
    with pytest.raises(RuntimeError, match="illegal memory"), checkpoint.wrap_write_errors("the export", tmp_path):
        fails(weight)
    assert list(tmp_path.iterdir()) == [first]


def test_a_folder_that_somebody_set_aside_is_no_checkpoint(tmp_path):
    path = checkpoint.save_checkpoint(tmp_path, make_checkpoint(2), keep=2)
    for name in ("step-000002.bak", "step-", "step-old"):
        shutil.copytree(path, tmp_path / name)
    assert checkpoint.latest_valid_checkpoint(tmp_path) == path
    later = checkpoint.save_checkpoint(tmp_path, make_checkpoint(3), keep=1)
    assert checkpoint.list_checkpoints(tmp_path) == [later]
    assert (tmp_path / "step-000002.bak" / "model.safetensors").is_file()
