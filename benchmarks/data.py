"""Data: reading slices, preparing sessions and memory, compared with the alternatives in one run.

    python benchmarks/data.py [--only reading,prepare,memory] [--subjects 6] [--rounds 5] [--out results.json]

Prints a table of the targets and writes everything as JSON. Absolute times mean little; compare the ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rounds import THREAD_VARIABLES, Table, figure, machine_facts, say, use_one_core

SECTIONS = ("reading", "prepare", "memory")
WORKER_CASES = {
    "256³ float32": ((256, 256, 256), "float32"),
    "256³ int16": ((256, 256, 256), "int16"),
    "512 × 512 × 200 int16": ((512, 512, 200), "int16"),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--subjects", type=int, default=6, help="simulated sessions; a multiple of 3 (kinds of grids)")
    parser.add_argument("--contrasts", default="T1w,T2w,FLAIR")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 180), help="voxels of each scan")
    parser.add_argument("--spacing-mm", type=float, default=1.0)
    parser.add_argument("--sessions", type=int, nargs=2, default=(100, 10_000), help="sizes of the stores compared")
    parser.add_argument("--slices-per-session", type=int, default=160)
    parser.add_argument("--reads", type=int, default=2000, help="random slices read in the memory section")
    parser.add_argument("--worker-shape", type=int, nargs=3, help="one int16 case of this shape, not the usual three")
    parser.add_argument("--work", type=Path, help="where temporary files go (about 4 GiB)")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    unknown = set(options.only) - set(SECTIONS)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: sections are {', '.join(SECTIONS)}")
    if options.subjects < 3 or options.subjects % 3:
        parser.error("--subjects: a multiple of 3")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    # Before anything that makes threads is imported, which is why the sections are imported late.
    os.environ.update(THREAD_VARIABLES, HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    if "memory" in options.only and not Path("/proc/self/status").exists():
        sys.exit("--only memory: memory is measured on Linux only")
    missing = [name for name in ("torchio", "monai") if importlib.util.find_spec(name) is None]
    if "prepare" in options.only and missing:
        sys.exit(f"--only prepare: {' and '.join(missing)} missing; benchmarks/README.md says how to install them")
    started = time.perf_counter()
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "work")}
    result: dict[str, Any] = {"machine": machine_facts(), "settings": settings}
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        # Memory first: its stores are written on all cores, before the process is bound to one.
        if "memory" in options.only:
            result["memory"] = memory_section(Path(temporary) / "memory", options)
        result["settings"]["bound_to_one_core"] = use_one_core() is not None
        if {"reading", "prepare"} & set(options.only):
            result |= time_sections(Path(temporary), options)
    result["minutes"] = figure((time.perf_counter() - started) / 60)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    print(table(result))


def memory_section(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from memory import measure_store_memory, measure_worker_memory

    say("memory: writing two stores and reading them")
    small, large = options.sessions
    stores = measure_store_memory(
        folder / "stores", small, large, options.slices_per_session, options.reads, min(options.rounds, 3)
    )
    say("memory: one worker with large scans")
    cases = WORKER_CASES
    if options.worker_shape:
        cases = {" × ".join(map(str, options.worker_shape)) + " int16": (tuple(options.worker_shape), "int16")}
    return {"store": stores, "worker": measure_worker_memory(folder / "worker", cases)}


def time_sections(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from preparing import measure_preparing, warm_page_cache
    from reading import measure_reading
    from scans import write_cohorts

    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.data.store.prepare import prepare

    say("simulating the scans")
    contrasts = tuple(options.contrasts.split(","))
    cohorts = write_cohorts(folder, options.subjects // 3, contrasts, tuple(options.shape), options.spacing_mm)
    preprocessing = Preprocessing(contrasts=contrasts, spacing_mm=(options.spacing_mm,) * 3)
    warm_page_cache(cohorts)
    result = {}
    if "reading" in options.only:
        say("reading")
        store = prepare(cohorts["same"], folder / "store", preprocessing)
        result["reading"] = measure_reading(store, {"same": cohorts["same"]}, folder / "plain", options.rounds)
    if "prepare" in options.only:
        say("preparing")
        result["prepare"] = measure_preparing(cohorts, folder / "prepare", preprocessing, options.rounds)
    return result


def table(result: dict[str, Any]) -> str:
    """The measurements with their targets, as Markdown; some have no target."""
    rows = Table()
    row = rows.row
    if "reading" in result:
        reading = result["reading"]
        over = reading["store_over"]
        row("random slices from the store, per second", reading["slices_per_second"]["store"], at_least=10_000)
        row("slices from the store over nifti, whole volumes", over["nifti, whole volumes"]["median"], at_least=100)
        row("slices from the store over nifti, only the slice", over["nifti, only the slice"]["median"])
    if "prepare" in result:
        prepare = result["prepare"]["all_kinds"]
        for name, ratios in prepare["throughput_over"].items():
            row(f"prepare, throughput over {name}", ratios["median"], at_least=1.5)
        for name, ratios in prepare["time_over_floor"].items():
            row(f"prepare, time over {name}", ratios["median"], at_most=2 if name == "gzip + scipy" else None)
    if "memory" in result:
        small, large = result["settings"]["sessions"]
        for stage, measures in result["memory"]["store"]["stages"].items():
            for measure, name in (("anonymous_mib", "anonymous memory"), ("rss_mib", "resident memory")):
                is_target = (stage, measure) == ("random slices read", "anonymous_mib")
                what = f"{name} with {large:,} sessions over {small:,}: {stage}"
                row(what, measures[measure]["ratio"], at_most=1.05 if is_target else None)
        for name, case in result["memory"]["worker"].items():
            row(f"one worker, {name}: float32 volumes above imports", case["volumes_above_imports"], at_most=8)
            row(f"one worker, {name}: float32 volumes in all", case["volumes_with_imports"])
    return "\n".join(rows.lines)


if __name__ == "__main__":
    main()
