"""The sections of the pretraining benchmark, one comparison each."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pretrain import MODELS
from rounds import figure, interleave, ratio, say
from workers import Worker

from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.store.prepare import prepare
from brainfound.models.model_folder import silence_transformers
from brainfound.phantom import write_phantom_cohort
from brainfound.training.process import probe_precision

CONTRASTS = ("T1w", "T2w", "FLAIR")
"""As many as LightlyTrain's images have colours."""
POSITION_GRID = 518
"""Pixels that the position grid of the starting checkpoint is made for, as of the released ones; both resample it."""
PEER, OURS, OURS_UINT8 = "LightlyTrain", "BrainFound", "BrainFound, views from uint8"
STEPS_BEFORE_MEMORY = 2


class Bench:
    """Shared by the sections: options, a store, a starting checkpoint, and workers started on demand."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        wanted = options.device
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
        self.threads = options.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(self.threads)
        self.probe = probe_precision(torch.device(self.device))
        self.precision = options.precision
        if self.precision == "auto":
            self.precision = "bf16" if self.probe.precision == "bf16" else "fp32"
        say("simulating and preparing a store")
        self.store = _make_store(folder, options)
        self._started = 0

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The settings of a worker: the options, with the changes of a section."""
        options = self.options
        taken = ("batch", "global_size", "local_size", "num_local", "prototypes", "hidden", "bottleneck")
        content = {name: getattr(options, name) for name in (*taken, "separate_heads", "drop_path", "set", "model")}
        content |= {"device": self.device, "precision": self.precision, "threads": self.threads}
        content |= {"anchor": False, "peer_centering": "softmax", "store": str(self.store)} | changes
        content["checkpoint"] = str(_make_checkpoint(self.folder, content["model"]))
        return content | {"peer_model": MODELS[content["model"]][3]}

    def ours(self, **changes: Any) -> Worker:
        say(f"starting BrainFound {changes or ''}")
        return Worker("brainfound", sys.executable, self._next_folder(), self.settings(**changes))

    def peer(self, views_of: Worker, **changes: Any) -> Worker:
        """LightlyTrain, with the views that one of ours has made."""
        say(f"starting LightlyTrain {changes or ''}")
        folder = self._next_folder()
        views = folder.with_suffix(".npz")
        views_of.ask("save_views", file=str(views))
        settings = self.settings(**changes) | {"views": str(views)}
        return Worker("lightlytrain", self.options.peer_python, folder, settings)

    def _next_folder(self) -> Path:
        self._started += 1
        return self.folder / "workers" / str(self._started)

    def images_per_second(self, seconds: list[float]) -> float:
        return figure(self.options.batch / statistics.median(seconds))


def run_sections(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The sections of --only, each with processes of its own."""
    bench = Bench(folder, options)
    result: dict[str, Any] = {
        "settings": {name: value for name, value in vars(options).items() if name not in _PLACES}
        | {"device": bench.device, "precision": bench.precision, "threads": bench.threads},
        "precision_probe": asdict(bench.probe),
    }
    sections: dict[str, Callable[[Bench], dict[str, Any]]] = {
        "steps": measure_steps,
        "alone": measure_alone,
        "depth": measure_depth,
        "sinkhorn": measure_sinkhorn,
        "anchor": measure_anchor,
        "wait": measure_wait,
        "breakdown": measure_breakdown,
        "gpu": measure_gpu,
    }
    for name in sections:
        if name in options.only:
            say(f"section {name}")
            result[name] = sections[name](bench)
    return result


_PLACES = ("out", "work", "peer_python")


def measure_steps(bench: Bench) -> dict[str, Any]:
    """Whole steps at the same FLOPs, and with stochastic depth of our own against the peer without; MFU; memory."""
    depth_name = f"{OURS}, depth {bench.options.depth}"
    with ExitStack() as stack:
        ours = stack.enter_context(bench.ours())
        peer = stack.enter_context(bench.peer(ours))
        depth = stack.enter_context(bench.ours(drop_path=bench.options.depth))
        workers = {PEER: peer, OURS: ours, depth_name: depth}
        peaks, counts = first_steps(workers)
        tools = {name: _step(worker) for name, worker in workers.items()}
        tools[OURS_UINT8] = lambda: ours.ask("step", views="from uint8")
        tools["products"] = lambda: ours.ask("products")["seconds"]
        seconds = interleave(tools, bench.options.rounds, timed_by_themselves=["products"])
    return {
        "rate_over_peer": {n: ratio(seconds[PEER], seconds[n]) for n in seconds if n not in (PEER, "products")},
        "images_per_second": {n: bench.images_per_second(s) for n, s in seconds.items() if n != "products"},
        "mfu": ratio(seconds["products"], seconds[OURS]),
        "flops": counts,
        "flops_over_peer": figure(counts[OURS] / counts[PEER]),
        "peak_memory_gib": peaks,
        "memory_over_peer": figure(peaks[OURS] / peaks[PEER]),
        "seconds": _rounded(seconds),
        "facts": {name: worker.facts for name, worker in workers.items()},
    }


def measure_alone(bench: Bench) -> dict[str, Any]:
    """Our step where there is no peer: rate, MFU and memory."""
    with bench.ours() as ours:
        peaks, counts = first_steps({OURS: ours})
        tools = {OURS: _step(ours), OURS_UINT8: lambda: ours.ask("step", views="from uint8")}
        products = {"products": lambda: ours.ask("products")["seconds"]}
        seconds = interleave(tools | products, bench.options.rounds, timed_by_themselves=["products"])
    return {
        "images_per_second": {n: bench.images_per_second(s) for n, s in seconds.items() if n != "products"},
        "mfu": ratio(seconds["products"], seconds[OURS]),
        "flops": counts,
        "peak_memory_gib": peaks,
        "seconds": _rounded(seconds),
        "facts": {OURS: ours.facts},
    }


def measure_depth(bench: Bench) -> dict[str, Any]:
    """Both with stochastic depth by subset."""
    return _pair(bench, {}, {"drop_path": bench.options.depth}) | {"drop_path": bench.options.depth}


def measure_sinkhorn(bench: Bench) -> dict[str, Any]:
    """The peer with the targets that we make; its default is a running centre and a softmax, which cost less."""
    return _pair(bench, {"peer_centering": "sinkhorn_knopp"}, {})


def _pair(bench: Bench, peer_changes: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    with ExitStack() as stack:
        ours = stack.enter_context(bench.ours(**changes))
        peer = stack.enter_context(bench.peer(ours, **changes, **peer_changes))
        workers = {PEER: peer, OURS: ours}
        peaks, counts = first_steps(workers)
        seconds = interleave({name: _step(worker) for name, worker in workers.items()}, bench.options.rounds)
    return {
        "rate_over_peer": ratio(seconds[PEER], seconds[OURS]),
        "images_per_second": {name: bench.images_per_second(times) for name, times in seconds.items()},
        "flops": counts,
        "flops_over_peer": figure(counts[OURS] / counts[PEER]),
        "peak_memory_gib": peaks,
        "memory_over_peer": figure(peaks[OURS] / peaks[PEER]),
        "seconds": _rounded(seconds),
    }


def measure_anchor(bench: Bench) -> dict[str, Any]:
    """The cost of the anchor, the frozen starting checkpoint: on by default, and absent from the peer."""
    with ExitStack() as stack:
        without = stack.enter_context(bench.ours())
        anchored = stack.enter_context(bench.ours(anchor=True))
        workers = {"without": without, "with the anchor": anchored}
        peaks, counts = first_steps(workers)
        seconds = interleave({name: _step(worker) for name, worker in workers.items()}, bench.options.rounds)
    return {
        "time_over_without": ratio(seconds["with the anchor"], seconds["without"]),
        "images_per_second": {name: bench.images_per_second(times) for name, times in seconds.items()},
        "flops": counts,
        "peak_memory_gib": peaks,
        "seconds": _rounded(seconds),
    }


def measure_wait(bench: Bench) -> dict[str, Any]:
    """A short real run through the command line; the share of its time in which the loop waited for slices."""
    options, folder = bench.options, bench.folder / "wait"
    folder.mkdir()
    sizes = {name: getattr(options, name) for name in ("prototypes", "hidden", "bottleneck")}
    recipe = {
        "name": "wait",
        "init": {"source": bench.settings()["checkpoint"]},
        "views": {name: getattr(options, name) for name in ("global_size", "local_size", "num_local")},
        "objective": {"head": sizes},
        "schedule": {"head_warmup_steps": 0},
        "probe": {"every": 0},
        "engine": {
            "steps": options.wait_steps,
            "batch_size": options.batch,
            "precision": "bf16" if bench.precision == "bf16" else "no",
            "log_every": 1,
            "checkpoint_every": options.wait_steps,
        },
    }
    file = folder / "wait.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "brainfound", "pretrain", str(file), "--data", str(bench.store)]
    command += ["--out", str(folder / "run")] + [part for pair in options.set for part in ("--set", pair)]
    environment = os.environ | {"OMP_NUM_THREADS": str(bench.threads)}
    environment |= {} if bench.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    # The first step also starts the workers and loads kernels.
    steps = [line for line in lines if "seconds_per_step" in line][1:]
    seconds = sum(line["seconds_per_step"] for line in steps)
    waited = sum(line["seconds_per_step"] * line["data_wait"] for line in steps)
    return {
        "data_wait": figure(waited / seconds),
        "steps": len(steps),
        "seconds_per_step": figure(seconds / len(steps)),
    }


def measure_breakdown(bench: Bench) -> dict[str, Any]:
    """Where the time of a step goes, by kind of work; one step of each tool under the profiler."""
    result = {}
    with ExitStack() as stack:
        ours = stack.enter_context(bench.ours())
        workers = {OURS: ours}
        if bench.options.peer_python:
            workers[PEER] = stack.enter_context(bench.peer(ours))
        for name, worker in workers.items():
            worker.ask("step")
            answer = worker.ask("profile", views="from uint8")
            whole = answer["seconds"]
            result[name] = {
                "seconds": figure(whole),
                "share_by_kind": {kind: figure(value / whole) for kind, value in answer["by_kind"].items()},
                "operators": [entry | {"seconds": figure(entry["seconds"])} for entry in answer["operators"]],
            }
    return result


def measure_gpu(bench: Bench) -> dict[str, Any]:
    """A step of a larger model against the matmul peak of the same GPU, and whether attention back ends agree."""
    if not torch.cuda.is_available():
        return {"of_peak": None, "attention_difference": {}, "why": "no GPU"}
    from gpu_attention import compare_attention

    options = bench.options
    larger = {"model": options.gpu_model, "batch": options.gpu_batch, "device": "cuda", "precision": "bf16"}
    # Counted with SDPA, whose products the count knows; a faster kernel stands for the same ones.
    with bench.ours(**larger, set=[*options.set, "engine.attention=sdpa"]) as worker:
        worker.ask("step")
        flops = worker.ask("count")["flops"]
    with bench.ours(**larger) as worker:
        worker.ask("step")
        peaks: list[float] = []

        def peak() -> None:
            peaks.append(worker.ask("matmul_peak", side=options.matmul_side)["flops_per_second"])

        seconds = interleave({"step": _step(worker), "peak": peak}, options.rounds)["step"]
        memory = worker.ask("memory")
    # The first peak belongs to the warm-up.
    shares = [flops / time / fastest for time, fastest in zip(seconds, peaks[1:], strict=True)]
    attention = compare_attention()
    return {
        "name": torch.cuda.get_device_name(),
        "of_peak": figure(statistics.median(shares)),
        "flops": flops,
        "images_per_second": figure(options.gpu_batch / statistics.median(seconds)),
        "matmul_peak_tflops": figure(statistics.median(peaks[1:]) / 1e12),
        "peak_memory_gib": memory,
        "attention": attention,
        "attention_difference": {name: entry.get("difference") for name, entry in attention.items()},
    }


def _step(worker: Worker) -> Callable[[], Any]:
    return lambda: worker.ask("step")


def first_steps(workers: Mapping[str, Worker]) -> tuple[dict[str, float], dict[str, int]]:
    """Peak memory after plain steps, before any other command; then FLOPs of one step."""
    peaks, counts = {}, {}
    for name, worker in workers.items():
        for _ in range(STEPS_BEFORE_MEMORY):
            worker.ask("step")
        memory = worker.ask("memory")
        peaks[name] = figure(memory.get("gpu", memory["resident"]))
        counts[name] = worker.ask("count")["flops"]
    return peaks, counts


def _make_store(folder: Path, options: argparse.Namespace) -> Path:
    spacing, size = options.spacing_mm, options.global_size
    cohort = write_phantom_cohort(
        folder / "cohort",
        options.subjects,
        spacing_mm=spacing,
        contrasts=CONTRASTS,
        missing_probability=0.0,
        workers=max(1, min(options.subjects, len(os.sched_getaffinity(0)))),
    )
    settings = Preprocessing(contrasts=CONTRASTS, spacing_mm=(spacing,) * 3, size=(size, size))
    return Path(prepare(cohort, folder / "store", settings).path)


def _make_checkpoint(folder: Path, model: str) -> Path:
    """A Dinov2 with new weights, as transformers saves one for the Hub; made once per size."""
    target = folder / f"checkpoint-{model}"
    if not target.exists():
        from transformers import Dinov2Config, Dinov2Model

        width, layers, heads, _ = MODELS[model]
        config = Dinov2Config(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=POSITION_GRID,
            patch_size=14,
            layerscale_value=1e-5,
        )
        torch.manual_seed(0)
        with silence_transformers():
            Dinov2Model(config).save_pretrained(target)
    return target


def _rounded(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: [figure(value) for value in values] for name, values in seconds.items()}
