"""The benchmarks run and say what they should; their figures are not tested."""

from __future__ import annotations

import gzip
import importlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = shlex.split(
    "--subjects 3 --rounds 1 --shape 40 40 32 --spacing-mm 6 "
    "--sessions 4 12 --slices-per-session 10 --reads 70 --worker-shape 32 32 24"
)


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux only")
def test_reading_and_memory_at_tiny_size(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, str(BENCHMARKS / "data.py"), "--only", "reading,memory", "--out", str(out), *TINY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result.keys() == {"machine", "settings", "memory", "reading", "minutes"}
    assert result["reading"]["slice_shape"] == [3, 224, 224]
    assert result["reading"]["slices_per_second"].keys() == {"store", "nifti, whole volumes", "nifti, only the slice"}
    assert all(value > 0 for value in result["reading"]["slices_per_second"].values())
    stages = result["memory"]["store"]["stages"]
    assert list(stages) == ["imports", "opened", "random slices read", "sampler's tables"]
    assert stages["random slices read"]["anonymous_mib"].keys() == {"4", "12", "ratio"}
    (case,) = result["memory"]["worker"].values()
    assert case["peak_mib"] >= case["before_mib"] > 50
    assert "| random slices from the store, per second |" in done.stdout
    assert "anonymous memory with 12 sessions over 4" in done.stdout


def test_tools_take_turns_after_one_round_to_warm_up(module):
    calls: list[str] = []
    tools = {name: (lambda name=name: calls.append(name)) for name in "AB"}
    seconds = module("rounds").interleave(tools, rounds=2)
    assert "".join(calls) == "AB" + "ABAB"
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_a_ratio_is_the_median_within_rounds(module):
    # The whole machine is ten times slower in the second round; the ratio of the medians would be 2.
    ratios = module("rounds").ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0])
    assert ratios == {"median": 2.0, "min": 2.0, "max": 4.0}


def test_agreement_finds_a_shift_and_refuses_other_work(module):
    rng = np.random.default_rng(0)
    ours = rng.integers(1, 255, (12, 2, 30, 28), dtype=np.uint8)
    agreement = module("peers").agreement
    found = agreement(ours, np.roll(ours, (1, -2), axis=(0, 3)))
    assert found["shift_voxels"] == (1, 0, -2)
    assert min(found["correlation_per_contrast"]) > 0.999
    other = agreement(ours, rng.integers(1, 255, ours.shape, dtype=np.uint8))
    assert max(other["correlation_per_contrast"]) < 0.5


def test_the_table_says_whether_a_target_is_met(module):
    data = module("data")
    reading = {
        "slices_per_second": {"store": 9_999.0},
        "store_over": {"nifti, whole volumes": {"median": 100.0}, "nifti, only the slice": {"median": 7.0}},
    }
    lines = data.table({"reading": reading}).splitlines()
    assert lines[2].endswith("| no |")
    assert lines[3].endswith("| ≥ 100 | yes |")
    assert lines[4].endswith("| 7.0 |  |  |")


def test_the_breakdown_adds_up_and_names_the_work(module, write_scan):
    file = write_scan("scan.nii.gz")
    seconds_by_kind = module("breakdown").seconds_by_kind
    scan = importlib.import_module("brainfound.data.scan")

    def run() -> None:
        scan.load_scan(file)
        gzip.decompress(file.read_bytes())

    started = time.perf_counter()
    seconds = seconds_by_kind(run)
    whole = time.perf_counter() - started
    assert {"reading", "gunzip"} <= seconds.keys()
    assert 0 < sum(seconds.values()) <= whole
