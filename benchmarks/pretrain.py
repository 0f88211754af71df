"""Pretraining: whole training steps against LightlyTrain's DINOv2 method and the hardware's peak, data wait, memory.

    python benchmarks/pretrain.py --peer-python PEER/bin/python [--only steps,depth,anchor,wait,breakdown,gpu]

Prints a table of the targets and writes everything as JSON with --out. Absolute times mean little; compare the
ratios, which are taken within rounds of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rounds import Table, figure, machine_facts

SECTIONS = ("steps", "depth", "sinkhorn", "anchor", "wait", "breakdown", "gpu")
DEFAULT_SECTIONS = ("steps", "depth", "anchor", "wait", "breakdown", "gpu")
NEED_PEER = {"steps", "depth", "sinkhorn"}
GPU_KERNELS = ("varlen", "xformers")
MODELS = {
    # width, layers, heads, LightlyTrain's name (without registers, new weights); their tiny is smaller
    "vits14": (384, 12, 6, "dinov2/vits14-noreg-notpretrained"),
    "vitb14": (768, 12, 12, "dinov2/vitb14-noreg-notpretrained"),
    "tiny": (64, 2, 2, "dinov2/_vittest14"),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(DEFAULT_SECTIONS), help=f"of {', '.join(SECTIONS)}; commas between")
    parser.add_argument("--peer-python", help="interpreter of the environment with LightlyTrain; else no comparison")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one"
    )
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: the faster by trial"
    )
    parser.add_argument("--threads", type=int, help="default: all cores that this process may use")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--model", choices=tuple(MODELS), default="vits14")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--global-size", type=int, default=224)
    parser.add_argument("--local-size", type=int, default=98)
    parser.add_argument("--num-local", type=int, default=8)
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--bottleneck", type=int, default=256)
    parser.add_argument("--separate-heads", action="store_true", help="two heads in both tools, not one")
    parser.add_argument("--drop-path", type=float, default=0.0, help="of the comparison at the same FLOPs")
    parser.add_argument("--depth", type=float, default=0.3, help="stochastic depth of the section depth")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of BrainFound's recipe")
    parser.add_argument("--subjects", type=int, default=6, help="simulated sessions of the store")
    parser.add_argument("--spacing-mm", type=float, default=1.0)
    parser.add_argument("--wait-steps", type=int, default=6, help="steps of the run whose data wait is read")
    parser.add_argument("--gpu-batch", type=int, default=64)
    parser.add_argument("--gpu-model", choices=tuple(MODELS), default="vitb14")
    parser.add_argument("--matmul-side", type=int, default=8192, help="of the product that gives a GPU's peak")
    parser.add_argument("--work", type=Path, help="where temporary files go (about 2 GiB)")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    unknown = set(options.only) - set(SECTIONS)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: sections are {', '.join(SECTIONS)}")
    if options.subjects < 2:
        parser.error("--subjects: at least 2, because slices of one session are never neighbours")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    if not Path("/proc/self/status").exists():
        sys.exit("memory is measured on Linux only")
    if not options.peer_python:
        left_out = NEED_PEER & set(options.only)
        options.only = [name for name in options.only if name not in left_out] + ["alone"] * bool(left_out)
    from pretrain_sections import run_sections

    started = time.perf_counter()
    result: dict[str, Any] = {"machine": machine_facts()}
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        result |= run_sections(Path(temporary), options)
    result["minutes"] = figure((time.perf_counter() - started) / 60)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The measurements with their targets, as Markdown; some have no target."""
    rows = Table()
    if "steps" in result:
        _rows_of_steps(rows, result["steps"])
    elif "alone" in result:
        why = "no --peer-python"
        rows.row("images/s over LightlyTrain, same FLOPs", None, at_least=1.5, why=why)
        rows.row("peak memory over LightlyTrain", None, at_most=0.6, why=why)
    for section in ("steps", "alone"):
        if section in result:
            rows.row("matrix products alone over the whole step", result[section]["mfu"]["median"], at_least=0.6)
    if "depth" in result:
        depth = result["depth"]
        name = f"images/s with stochastic depth {depth['drop_path']}"
        rows.row(f"{name} over LightlyTrain with the same", depth["rate_over_peer"]["median"], at_least=2)
        rows.row("… FLOPs over LightlyTrain's", depth["flops_over_peer"])
        rows.row("… peak memory over LightlyTrain's", depth["memory_over_peer"])
        if "steps" in result:
            over = result["steps"]["rate_over_peer"][f"BrainFound, depth {depth['drop_path']}"]["median"]
            rows.row(f"{name} over LightlyTrain without", over, at_least=2)
    if "sinkhorn" in result:
        rows.row("images/s over LightlyTrain with Sinkhorn", result["sinkhorn"]["rate_over_peer"]["median"])
    if "anchor" in result:
        rows.row("time with the anchor over without", result["anchor"]["time_over_without"]["median"])
    if "wait" in result:
        wait = result["wait"]
        rows.row("data wait, share of step time", wait["data_wait"], at_most=0.03, why=wait.get("why", ""))
    if "gpu" in result:
        gpu = result["gpu"]
        why = gpu.get("why", "")
        rows.row("GPU: model FLOP/s over bf16 matmul peak", gpu.get("of_peak"), at_least=0.45, why=why)
        for kernel in GPU_KERNELS:
            found = gpu["attention_difference"].get(kernel)
            fault = why or gpu.get("attention", {}).get(kernel, {}).get("fault", "")
            rows.row(f"GPU: attention by {kernel}, difference from SDPA", found, at_most=0.02, why=fault)
    return "\n".join(rows.lines)


def _rows_of_steps(rows: Table, steps: dict[str, Any]) -> None:
    over = steps["rate_over_peer"]
    rows.row("images/s over LightlyTrain, same FLOPs", over["BrainFound"]["median"], at_least=1.5)
    rows.row("… with views made from uint8 slices", over["BrainFound, views from uint8"]["median"])
    for name, rate in steps["images_per_second"].items():
        rows.row(f"images/s, {name}", rate)
    rows.row("FLOPs of a step over LightlyTrain's", steps["flops_over_peer"])
    rows.row("peak memory over LightlyTrain", steps["memory_over_peer"], at_most=0.6)
    for name, peak in steps["peak_memory_gib"].items():
        rows.row(f"peak memory, {name}, GiB", peak)


if __name__ == "__main__":
    main()
