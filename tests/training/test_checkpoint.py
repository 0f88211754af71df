"""Checkpoints: whole or absent."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch

from brainfound.errors import TrainingError
from brainfound.training import checkpoint as checkpoints


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
    assert checkpoints.latest_valid_checkpoint(tmp_path) == path
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
        assert checkpoints.latest_valid_checkpoint(tmp_path) == first


@pytest.mark.parametrize("keep", [1, 2])
def test_no_checkpoint_makes_way_for_a_later_one_that_is_torn(tmp_path, keep):
    """The run went back over the torn one and is stopped before it has reached its step again."""
    checkpoints.save_checkpoint(tmp_path, make(4), keep)
    torn = checkpoints.save_checkpoint(tmp_path, make(6), keep=9)
    (torn / "model.safetensors").write_bytes(b"")
    new = checkpoints.save_checkpoint(tmp_path, make(5), keep)
    with pytest.warns(UserWarning, match="step-000006 is torn"):
        assert checkpoints.latest_valid_checkpoint(tmp_path) == new
    assert len(names(tmp_path)) == keep + 1
    # Once its step is reached again, all is as it was.
    checkpoints.save_checkpoint(tmp_path, make(6), keep)
    assert names(tmp_path) == ["step-000005", "step-000006"][-keep:]
    assert checkpoints.latest_valid_checkpoint(tmp_path) == torn


def test_what_a_killed_process_left_is_not_taken_for_a_checkpoint(tmp_path):
    (tmp_path / ".writing-step-000007").mkdir()
    assert checkpoints.latest_valid_checkpoint(tmp_path) is None
    checkpoints.save_checkpoint(tmp_path, make(8), keep=1)
    assert not list(tmp_path.glob(".writing*"))


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(100, 90, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TrainingError, match="no room"):
        checkpoints.save_checkpoint(tmp_path, make(1), keep=1)
    assert checkpoints.list_checkpoints(tmp_path) == []


def keep_marked(step: int, **state) -> checkpoints.Checkpoint:
    plain = make(step)
    return checkpoints.Checkpoint(plain.step, plain.model, plain.task, plain.optimizer, {"task": {}, **state})


def names(folder) -> list[str]:
    return [path.name for path in checkpoints.list_checkpoints(folder)]


def test_the_newest_kept_checkpoint_stays_and_older_kept_ones_go(tmp_path):
    for step in range(1, 8):
        checkpoints.save_checkpoint(tmp_path, keep_marked(step, kept=step in (2, 4)), keep=2)
    assert names(tmp_path) == ["step-000004", "step-000006", "step-000007"]


def test_after_a_rollback_its_checkpoint_goes_before_later_ones_and_they_are_removed(tmp_path):
    for step in (2, 3, 4):
        checkpoints.save_checkpoint(tmp_path, keep_marked(step, kept=step == 2), keep=3)
    back = checkpoints.checkpoint_path(tmp_path, 2)
    checkpoints.update_checkpoint_state(back, {"rollbacks": 1, "task": {"scale": 0.5}})
    assert checkpoints.latest_valid_checkpoint(tmp_path) == back
    present = checkpoints.load_checkpoint(back)
    assert present.state["task"] == {"scale": 0.5}
    assert present.state["kept"]
    checkpoints.remove_rolled_back_checkpoints(tmp_path, present)
    assert names(tmp_path) == ["step-000002"]
    later = checkpoints.save_checkpoint(tmp_path, keep_marked(3, rollbacks=1), keep=3)
    checkpoints.remove_rolled_back_checkpoints(tmp_path, present)
    assert checkpoints.latest_valid_checkpoint(tmp_path) == later


def test_a_torn_checkpoint_is_not_gone_back_to(tmp_path):
    path = checkpoints.save_checkpoint(tmp_path, make(1), keep=1)
    (path / "task.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"not whole.*task\.safetensors is missing"):
        checkpoints.update_checkpoint_state(path, {"rollbacks": 1})


def test_checkpoints_that_are_there_count_as_room_for_a_run(tmp_path, monkeypatch):
    path = checkpoints.save_checkpoint(tmp_path, make(1), keep=1)
    there = sum(file.stat().st_size for file in path.iterdir())
    usage = namedtuple("usage", "total used free")(10**9, 0, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    checkpoints.require_space_for_run(tmp_path, 2, there // 3, 10)
    with pytest.raises(TrainingError, match=r"no room for this run \(2 checkpoints"):
        checkpoints.require_space_for_run(tmp_path, 2, there, 10)


@pytest.mark.parametrize("file", ["model.safetensors", "task.safetensors", "optimizer.pt", "state.json"])
def test_a_quota_is_told_in_one_line_and_leaves_no_half_of_a_checkpoint(tmp_path, file):
    """The system refuses what is larger than 32 KiB: each writer has an exception of its own for that."""
    resource = pytest.importorskip("resource")
    first = checkpoints.save_checkpoint(tmp_path, make(1), keep=2)
    large = {"weight": torch.zeros(100_000)}
    parts = {"model": make(2).model, "task": make(2).task, "optimizer": make(2).optimizer, "state": {"task": {}}}
    parts |= {
        "model.safetensors": {"model": large},
        "task.safetensors": {"task": large},
        "optimizer.pt": {"optimizer": {"state": {0: large}, "param_groups": []}},
        "state.json": {"state": {"task": "x" * 100_000}},
    }[file]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, before[1]))
        with pytest.raises(TrainingError, match=r"step-000002: the checkpoint cannot be written .*--resume") as told:
            checkpoints.save_checkpoint(tmp_path, checkpoints.Checkpoint(2, **parts), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == [first]


def test_a_folder_that_somebody_set_aside_is_no_checkpoint(tmp_path):
    path = checkpoints.save_checkpoint(tmp_path, make(2), keep=2)
    for name in ("step-000002.bak", "step-", "step-old"):
        shutil.copytree(path, tmp_path / name)
    assert checkpoints.latest_valid_checkpoint(tmp_path) == path
    later = checkpoints.save_checkpoint(tmp_path, make(3), keep=1)
    assert checkpoints.list_checkpoints(tmp_path) == [later]
    assert (tmp_path / "step-000002.bak" / "model.safetensors").is_file()


def test_steps_of_seven_digits_come_after_those_of_six(tmp_path):
    for step in (999_999, 1_000_000):
        checkpoints.save_checkpoint(tmp_path, keep_marked(step, kept=step == 999_999), keep=3)
    back = checkpoints.checkpoint_path(tmp_path, 999_999)
    checkpoints.update_checkpoint_state(back, {"rollbacks": 1})
    checkpoints.remove_rolled_back_checkpoints(tmp_path, checkpoints.load_checkpoint(back))
    assert names(tmp_path) == ["step-999999"]
