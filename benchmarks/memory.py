"""Memory, each figure from a fresh process: reading large stores, and one worker preparing large scans.

    python benchmarks/memory.py read STORE NUM_SLICES          started by `measure_store_memory`
    python benchmarks/memory.py prepare COHORT WARM_UP OUT     started by `measure_worker_memory`

Linux only: figures come from /proc/self/status. The tables of a store are mapped, its slices are read with preadv. RSS
counts the mapped pages too; they belong to the page cache, are shared by all processes and go when memory runs short.
Anonymous memory (RssAnon) is what the process itself holds. A larger store must not need more of the latter.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

MIB = 2**20
_SESSION_SHAPE = (8, 8)


def measure_store_memory(
    folder: Path, small: int, large: int, slices_per_session: int, reads: int, rounds: int
) -> dict[str, Any]:
    """The section "store memory": reading a store of many sessions against one of few."""
    stores = {count: write_synthetic_store(folder, count, slices_per_session) for count in (small, large)}
    found: dict[int, list[dict[str, dict[str, float]]]] = {small: [], large: []}
    for _ in range(rounds):
        for count, store in stores.items():
            found[count].append(_child("read", store, reads))
    result: dict[str, Any] = {"reads": reads, "slices_per_session": slices_per_session, "stages": {}}
    for stage in found[small][0]:
        row: dict[str, Any] = {}
        for measure in ("anonymous_mib", "rss_mib"):
            few, many = ([run[stage][measure] for run in found[count]] for count in (small, large))
            ratios = [b / a for a, b in zip(few, many, strict=True)]
            row[measure] = {
                str(small): round(statistics.median(few), 1),
                str(large): round(statistics.median(many), 1),
                "ratio": round(statistics.median(ratios), 4),
            }
        result["stages"][stage] = row
    return result


def write_synthetic_store(folder: Path, num_sessions: int, slices_per_session: int) -> Path:
    """A store of many sessions with as many rows as real ones have and hardly any pixels, through `prepare` itself.

    All sessions of the manifest name one small file, so that 10,000 sessions need no 10,000 files.
    """
    import nibabel as nib
    import numpy as np

    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.data.store.prepare import prepare

    source = folder / f"source-{num_sessions}"
    source.mkdir(parents=True)
    data = np.random.default_rng(0).integers(1, 1000, (*_SESSION_SHAPE, slices_per_session)).astype(np.int16)
    nib.save(nib.Nifti1Image(data, np.diag([20.0, 20.0, 1.0, 1.0])), source / "scan.nii")
    rows = ["subject\tsession\tcontrast\tpath\tage_years\tsex\tsite\tdiagnosis"]
    for number in range(num_sessions):
        age, sex, site = 20 + number % 70, "FM"[number % 2], f"site-{number % 20}"
        rows.append(f"sub-{number:06d}\tses-1\tT1w\tscan.nii\t{age}\t{sex}\t{site}\thealthy")
    (source / "manifest.tsv").write_text("\n".join(rows) + "\n")
    out = folder / f"store-{num_sessions}"
    prepare(source, out, Preprocessing(contrasts=("T1w",), spacing_mm=(20, 20, 1), size=_SESSION_SHAPE))
    return out


def measure_worker_memory(folder: Path, cases: dict[str, tuple[tuple[int, int, int], str]]) -> dict[str, Any]:
    """The section "worker memory": one worker, one session of three contrasts, as multiples of a float32 volume."""
    warm_up = _three_contrasts(folder / "warm-up", (24, 24, 16), "int16", extent_mm=200.0)
    result = {}
    for name, (shape, dtype) in cases.items():
        cohort = _three_contrasts(folder / f"cohort-{len(result)}", shape, dtype, extent_mm=230.0)
        found = _child("prepare", cohort, warm_up, folder / f"out-{len(result)}")
        volume = shape[0] * shape[1] * shape[2] * 4 / MIB
        above = found["peak_mib"] - found["before_mib"]
        result[name] = {
            "shape": list(shape),
            "stored_as": dtype,
            "one_float32_volume_mib": round(volume, 1),
            "before_mib": round(found["before_mib"], 1),
            "peak_mib": round(found["peak_mib"], 1),
            "volumes_above_imports": round(above / volume, 2),
            "volumes_with_imports": round(found["peak_mib"] / volume, 2),
        }
        for file in cohort.glob("*.nii.gz"):
            file.unlink()
    return result


def _three_contrasts(folder: Path, shape: tuple[int, int, int], dtype: str, extent_mm: float) -> Path:
    """One session whose contrasts have the same shape, the second a grid turned by some degrees, the third its own."""
    from scans import write_ellipsoid

    folder.mkdir(parents=True)
    spacing = tuple(extent_mm / count for count in shape)
    rows = ["subject\tsession\tcontrast\tpath"]
    for number, (contrast, turn) in enumerate((("T1w", 0.0), ("T2w", 5.0), ("FLAIR", 0.0))):
        steps = tuple(step * (1 + 0.02 * (number == 2)) for step in spacing)
        write_ellipsoid(folder / f"{contrast}.nii.gz", shape, steps, dtype, turn, seed=number)
        rows.append(f"sub-1\t1\t{contrast}\t{contrast}.nii.gz")
    (folder / "manifest.tsv").write_text("\n".join(rows) + "\n")
    return folder


def _child(*arguments: Any) -> Any:
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _memory_mib() -> dict[str, float]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    names = {"rss_mib": "VmRSS", "anonymous_mib": "RssAnon", "peak_mib": "VmHWM"}
    return {key: int(fields[name].split()[0]) / 1024 for key, name in names.items()}


def _forget_peak() -> None:
    """Let VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _read(store_path: str, reads: str) -> dict[str, dict[str, float]]:
    """Stages of a process that opens a store and reads random slices in batches of 64; peaks of each stage."""
    import datasets  # noqa: F401  # what reading imports late is counted as imports, in stores of any size
    import numpy as np
    import pyarrow.parquet  # noqa: F401

    from brainfound.data.store import Store

    stages = {"imports": _memory_mib()}
    store = Store.open(store_path)
    stages["opened"] = _memory_mib()
    rows = np.random.default_rng(0).integers(0, store.num_slices, int(reads))
    peak = {"rss_mib": 0.0, "anonymous_mib": 0.0}
    for first in range(0, len(rows), 64):
        store.read_slices(rows[first : first + 64])
        now = _memory_mib()
        peak = {name: max(value, now[name]) for name, value in peak.items()}
    stages["random slices read"] = peak
    # What a sampler of training asks for besides: eight and four bytes for each row of the store.
    held = (store.slice_sessions, store.slice_positions_mm, store.present)
    stages["sampler's tables"] = _memory_mib()
    del held
    return {stage: {name: values[name] for name in peak} for stage, values in stages.items()}


def _prepare(cohort: str, warm_up: str, out: str) -> dict[str, float]:
    """Peak of `prepare` in this process, after a small session has made it import everything."""
    import gc

    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.data.store.prepare import prepare

    prepare(warm_up, f"{out}-warm-up", Preprocessing())
    gc.collect()
    before = _memory_mib()["rss_mib"]
    _forget_peak()
    prepare(cohort, out, Preprocessing())
    return {"before_mib": before, "peak_mib": _memory_mib()["peak_mib"]}


if __name__ == "__main__":
    if not os.path.exists("/proc/self/status"):
        sys.exit("memory is measured on Linux only")
    steps = {"read": _read, "prepare": _prepare}
    print(json.dumps(steps[sys.argv[1]](*sys.argv[2:])))
