"""The choice of precision: by what a device does, not by what it says."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
import yaml

from brainfound.pretraining.pretrain import pretrain
from brainfound.training import process
from brainfound.training.process import choose_precision, make_accelerator, probe_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_remembered():
    probe_precision.cache_clear()
    yield
    probe_precision.cache_clear()


def rates(monkeypatch, bf16: float, fp32: float) -> list[tuple[torch.dtype, tuple[int, int, int]]]:
    measured = []

    def gflops(device, kind, shape):
        measured.append((kind, shape))
        return bf16 if kind == torch.bfloat16 else fp32

    monkeypatch.setattr(process, "_gflops", gflops)
    return measured


@pytest.mark.parametrize(("bf16", "fp32", "expected"), [(900, 190, "bf16"), (190, 190, "no"), (0.5, 190, "no")])
def test_bfloat16_is_taken_where_it_is_clearly_faster(monkeypatch, bf16, fp32, expected):
    rates(monkeypatch, bf16, fp32)
    assert choose_precision(CPU) == expected
    assert asdict(probe_precision(CPU)) == {"precision": expected, "bf16_gflops": bf16, "fp32_gflops": fp32}


def test_a_hopeless_bfloat16_is_given_up_after_the_small_product(monkeypatch):
    measured = rates(monkeypatch, 0.5, 190)
    probe_precision(CPU)
    assert {shape for _, shape in measured} == {(64, 128, 128)}


@pytest.mark.parametrize("fault", ["absent", "wrong"])
def test_a_bfloat16_that_does_not_work_is_not_taken_however_fast(monkeypatch, fault):
    rates(monkeypatch, 900, 190)
    product = torch.Tensor.__matmul__

    def broken(left, right):
        if not torch.is_autocast_enabled("cpu"):
            return product(left, right)
        if fault == "absent":
            raise RuntimeError("not implemented for 'BFloat16'")
        return product(left, right) * 1.5

    monkeypatch.setattr(torch.Tensor, "__matmul__", broken)
    assert probe_precision(CPU).precision == "no"
    assert probe_precision(CPU).bf16_gflops is None


def test_the_probe_of_this_machine_is_remembered(monkeypatch):
    calls, measure = [], process._gflops
    monkeypatch.setattr(process, "_gflops", lambda *how: calls.append(how) or measure(*how))
    found = probe_precision(CPU)
    num_calls = len(calls)
    assert probe_precision(CPU) == found
    assert len(calls) == num_calls > 0
    assert found.fp32_gflops > 0
    assert make_accelerator("auto").mixed_precision == found.precision


def test_a_resumed_run_keeps_its_precision_though_the_probe_would_change_it(store, recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    settings = ("engine.precision=auto", "engine.steps=4", "engine.checkpoint_every=2", "probe.every=0")
    rates(monkeypatch, 190, 190)
    pretrain(recipe(*settings), store, out=run, quiet=True)
    facts = json.loads((run / "run.json").read_text())
    assert facts["precision"] == "no"
    assert facts["precision_probe"] == {"precision": "no", "bf16_gflops": 190, "fp32_gflops": 190}
    probe_precision.cache_clear()
    rates(monkeypatch, 900, 190)
    pretrain(recipe(*settings), store, out=run, resume=True, quiet=True)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["engine"]["precision"] == "no"
