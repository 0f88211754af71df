"""The dry run: two real steps that leave no files behind, and a report on them.

Everything about this machine is measured. On others, speed follows from the FLOPs of a step, the peak rate of the GPU
and an assumed utilisation; memory follows from the number of weights and from the forward pass here, with only a few
images so that it works on a laptop. The estimate is good enough to choose or rule out a machine; it is no promise.

Published utilisations of self-supervised ViTs, derived from reported images/s: DINOv2 ViT-L/14 on A100 31%, DINOv3
ViT-L on H100 19%, CAPI 58%."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from brainfound.data.store import Store
from brainfound.pretraining.dry_run.costs import (
    BFLOAT16_BYTES,
    FLOAT32_BYTES,
    GIB,
    AnalyticCosts,
    DryRunMeasurement,
    ForwardMemory,
    GPUSpec,
    ParameterCounts,
    TargetHardware,
    available_memory_bytes,
    peak_memory_gib,
)
from brainfound.pretraining.monitoring.guard import Guard
from brainfound.pretraining.objectives.registry import make_objective
from brainfound.pretraining.preflight import run_preflight_checks
from brainfound.pretraining.recipe import PretrainEngineRecipe, PretrainRecipe, resolve_auto_settings
from brainfound.pretraining.slices import PretrainBatch
from brainfound.pretraining.starting_model import build_meta_model, build_model
from brainfound.pretraining.training_task import PretrainTask, make_task
from brainfound.training import distributed
from brainfound.training.engine import Engine
from brainfound.training.optim import effective_lr
from brainfound.training.process import make_accelerator, make_console

NUM_STEPS = 2
NUM_ESTIMATE_IMAGES = 4  # in the micro-batch that is tried out for another machine
_GPU_CHOICES = {"attention": "sdpa", "crops": "packed"}


def report_dry_run(recipe: PretrainRecipe, store: Store, machine: TargetHardware | None, quiet: bool) -> None:
    """Train for two real steps in a temporary folder, and print speed, memory and cost of the whole run.

    If a `machine` is given, the run on it is estimated too.
    """
    precision = recipe.engine.precision
    if machine is not None:
        machine.require_divisible_batch(recipe.engine)
        # bfloat16 may be hundreds of times slower here than there.
        precision = "auto" if precision == "bf16" else precision
    accelerator = make_accelerator(precision)
    console = make_console(accelerator, quiet)
    for note in run_preflight_checks(recipe, store, machine.num_gpus if machine else accelerator.num_processes):
        console.print(note)
    # Schedules end with the trial, and there is no probe.
    short_engine = {"steps": NUM_STEPS, "log_every": 1, "precision": accelerator.mixed_precision}
    engine = recipe.engine.model_copy(update=short_engine)
    if machine is not None:
        engine = shrink_engine_for_estimate(engine, machine, accelerator.num_processes)
    short = recipe.model_copy(update={"engine": engine, "probe": recipe.probe.model_copy(update={"every": 0})})
    if machine is not None and _exceeds_available_memory(short, store, recipe, machine, accelerator):
        return
    with tempfile.TemporaryDirectory(prefix="brainfound-dry-run-") as temporary:
        folder = Path(temporary)
        model = build_model(short.init, store, short.views.global_size, short.seed)
        engine, _ = resolve_auto_settings(engine, model.encoder, short.views, accelerator.device)
        task = make_task(short.model_copy(update={"engine": engine}), store, model, folder, accelerator)
        measured = measure_training_steps(task, folder, accelerator, quiet, machine is not None)
    if measured is not None:
        for line in report_lines(measured, recipe.engine, recipe.optim.lr, machine):
            print(line)


def _exceeds_available_memory(
    short: PretrainRecipe, store: Store, recipe: PretrainRecipe, machine: TargetHardware, accelerator: Accelerator
) -> bool:
    """Whether a trial's weights exceed the free memory here; if so, print what follows from the sizes alone."""
    encoder = build_meta_model(short.init, store, short.views.global_size).encoder
    with torch.device("meta"):
        objective = make_objective(short.objective, short.trained, encoder, short.views, short.engine.steps, short.seed)
    sizes = AnalyticCosts(ParameterCounts.of(objective), objective.flops, Guard(short.guard).may_roll_back)
    free = available_memory_bytes(accelerator.device)
    (too_large,) = distributed.any_over_ranks(sizes.weights.dry_run_bytes > free, device=accelerator.device)
    if too_large and accelerator.is_main_process:
        for line in report_without_measurement(sizes, free, recipe.engine, recipe.optim.lr, machine):
            print(line)
    return too_large


def shrink_engine_for_estimate(
    engine: PretrainEngineRecipe, machine: TargetHardware, num_processes: int
) -> PretrainEngineRecipe:
    """The engine of a trial with a few images, to estimate another machine.

    What a GPU would choose replaces "auto", so that a CPU measures the memory of a GPU run.
    """
    num_tried = min(NUM_ESTIMATE_IMAGES, machine.micro_batch_size(engine))
    on_gpu = {key: value for key, value in _GPU_CHOICES.items() if getattr(engine, key) == "auto"}
    few = {"batch_size": num_tried * num_processes, "accumulation": 1, "num_workers": 0}
    return engine.model_copy(update=on_gpu | few)


def measure_training_steps(
    task: PretrainTask, folder: Path, accelerator: Accelerator, quiet: bool, estimate: bool
) -> DryRunMeasurement | None:
    """Train for the two steps of a task; all ranks call it, and rank 0 gets the measurement.

    The first step shows memory and warms up, the second is timed. With `estimate` the forward pass of half the images
    is measured too. The folder gets a log.
    """
    engine = task.engine
    num_images = engine.batch_size // (accelerator.num_processes * engine.accumulation)

    def halve(batch: PretrainBatch) -> PretrainBatch:
        parts = {name: part[: num_images // 2] for name, part in vars(batch).items() if part is not None}
        return replace(batch, **parts)

    forward = ForwardMemory(task.loss, accelerator.device, halve if estimate and num_images > 1 else None)
    task.loss = forward  # type: ignore[method-assign, assignment]
    Engine(task, engine, folder, accelerator, task.seed, quiet).run(save=False)
    if not accelerator.is_main_process:
        return None
    line = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return DryRunMeasurement(
        device=accelerator.device,
        precision=accelerator.mixed_precision,
        num_processes=accelerator.num_processes,
        num_images=num_images,
        images_per_second=engine.batch_size / line["seconds_per_step"],
        forward_bytes=forward.peak_bytes or 0,
        half_batch_forward_bytes=forward.part_peak_bytes,
        sizes=AnalyticCosts(ParameterCounts.of(task.objective), task.objective.flops, task.guard.may_roll_back),
        loss=line["loss"],
        ln_k=line.get("ln_k"),
    )


# Of a GPU's memory; the rest goes to the driver, to libraries and to gaps between blocks.
USABLE_MEMORY_FRACTION = 0.92
_FLOAT_NAMES = {"bf16": "bfloat16", "no": "float32"}


def report_lines(
    trial: DryRunMeasurement, engine: PretrainEngineRecipe, lr: float, machine: TargetHardware | None
) -> Iterator[str]:
    """Lines about this machine and, if one is given, about a machine on paper; `engine` and `lr` are the recipe's."""
    yield from _local_lines(trial, engine)
    yield from _cost_lines(trial.sizes, engine, lr)
    ln_k = "" if trial.ln_k is None else f"  (ln K = {trial.ln_k:.4f})"
    yield f"  loss                     {trial.loss:.4f}{ln_k}"
    if machine is not None:
        yield ""
        yield from _estimate_lines(trial.sizes, trial, engine, machine)


def report_without_measurement(
    sizes: AnalyticCosts, available_memory_bytes: int, engine: PretrainEngineRecipe, lr: float, machine: TargetHardware
) -> Iterator[str]:
    """The lines if this machine is too small for a trial."""
    free, needed = format_bytes(available_memory_bytes), format_bytes(sizes.weights.dry_run_bytes)
    yield "this machine: too little memory for a trial, so nothing was measured"
    yield f"  memory                   {free} are free; weights, gradients and moments take {needed}"
    yield from _cost_lines(sizes, engine, lr)
    yield ""
    yield from _estimate_lines(sizes, None, engine, machine)


def _local_lines(trial: DryRunMeasurement, engine: PretrainEngineRecipe) -> Iterator[str]:
    seconds = engine.batch_size / trial.images_per_second
    per_image = trial.sizes.flops(trial.num_images).total / trial.num_images
    processes = f"{trial.num_processes} process" + ("es" if trial.num_processes > 1 else "")
    yield f"this machine, measured: {processes} on {trial.device.type}, {_FLOAT_NAMES[trial.precision]}"
    if trial.num_images * trial.num_processes * engine.accumulation != engine.batch_size:
        images = format_count(trial.num_images, "image")
        yield f"  tried out                {images} per process at a time, not a whole batch"
    if trial.precision == "no" and engine.precision == "bf16":
        yield "                           in float32: the recipe's bfloat16 is not faster here"
    speed = format_number(trial.images_per_second)
    yield f"  speed                    {speed} images/s, {format_duration(seconds)} per step"
    yield (
        f"  arithmetic               {format_flops(per_image)} per image, "
        f"{format_flops(per_image * trial.images_per_second)}/s over all processes"
    )
    yield f"  memory                   {format_bytes(peak_memory_gib(trial.device) * GIB)} at most in this process"
    yield f"  whole run                {_length(engine, seconds)}"


def _cost_lines(sizes: AnalyticCosts, engine: PretrainEngineRecipe, lr: float) -> Iterator[str]:
    weights, batch = sizes.weights, engine.batch_size
    yield f"  effective learning rate  {effective_lr(lr, batch):.3g}  ({lr:g} at batch 128, this batch {batch})"
    yield (
        f"  weights                  {weights.student / 1e6:.4g} M (trained {weights.trained / 1e6:.4g} M), "
        f"teacher {weights.teacher / 1e6:.4g} M, anchor {weights.anchor / 1e6:.4g} M"
    )
    yield (
        f"  disk                     {format_bytes(disk_bytes(sizes, engine))}: "
        f"{format_count(engine.keep_checkpoints, 'checkpoint')} of {format_bytes(weights.checkpoint_bytes)}"
        f" and one being written, {'one to go back to, ' if sizes.may_roll_back else ''}their best encoders, the export"
    )


def _estimate_lines(
    sizes: AnalyticCosts, trial: DryRunMeasurement | None, engine: PretrainEngineRecipe, machine: TargetHardware
) -> Iterator[str]:
    kind, num_gpus = machine.kind, machine.num_gpus
    tflops, float_name = kind.tflops("no" if engine.precision == "no" else "bf16")
    num_images = machine.micro_batch_size(engine)
    per_image = sizes.flops(num_images).total / num_images
    images_per_second = num_gpus * tflops * 1e12 * machine.utilisation / per_image
    seconds = engine.batch_size / images_per_second
    yield f"{num_gpus} × {kind.name}, an estimate on paper and no measurement:"
    yield (
        f"  assumed                  {machine.utilisation:.0%} of {tflops:g} TFLOP/s ({float_name}) per GPU; published"
        " runs reach 19 to 58%"
    )
    if float_name == "float32" and engine.precision != "no":
        yield f"                           a {kind.name.split('-')[0]} has no bfloat16, and float16 is not offered"
    if trial is None:
        yield f"  arithmetic               {format_flops(per_image)} per image"
    yield f"  speed                    {format_number(images_per_second)} images/s, {format_duration(seconds)} per step"
    yield f"  whole run                {_length(engine, seconds)}"
    yield "  effective learning rate  as above: engine.batch_size is the batch of all GPUs together"
    yield f"  memory per GPU           {kind.memory_gib:g} GiB, of which {USABLE_MEMORY_FRACTION:.0%} are counted on"
    yield from _memory_lines(sizes, trial, engine, machine, float_name == "bfloat16")
    yield f"  disk                     {format_bytes(disk_bytes(sizes, engine))}, written by one process"


def _memory_lines(
    sizes: AnalyticCosts,
    trial: DryRunMeasurement | None,
    engine: PretrainEngineRecipe,
    machine: TargetHardware,
    bf16: bool,
) -> Iterator[str]:
    def memory_parts(parallel: str, accumulation: int) -> dict[str, float]:
        num_images = engine.batch_size // (machine.num_gpus * accumulation)
        forward_bytes = 0 if trial is None else trial.activation_bytes(num_images)
        in_bf16 = trial is not None and trial.precision == "bf16"
        return memory_per_gpu(sizes.weights, forward_bytes, machine.num_gpus, parallel, bf16, in_bf16)

    def memory_bytes(parallel: str, accumulation: int) -> float:
        return sum(memory_parts(parallel, accumulation).values())

    verdicts = ("fits", "does not fit")
    if trial is None:
        verdicts = ("and activations", "does not fit, even without activations")
    fitting, wanted = False, machine.micro_batch_size(engine)
    for parallel in machine.parallel_modes:
        parts = memory_parts(parallel, engine.accumulation)
        fits = _fits(sum(parts.values()), machine.kind)
        fitting |= fits and parallel == engine.parallel
        name = parallel if machine.num_gpus > 1 else "one GPU"
        yield f"    {name:<8} {format_bytes(sum(parts.values())):>9}  {verdicts[not fits]}"
        yield f"             {', '.join(f'{part} {format_bytes(size)}' for part, size in parts.items() if size)}"
    if trial is None:
        yield (
            f"    activations of {format_count(wanted, 'image')} at a time come on top; "
            "only a trial shows how much. Run it on a larger machine."
        )
        return
    if bf16 and trial.precision != "bf16":
        yield "    activations were measured in float32; in bfloat16 they take between half of that and all of it"
    if trial.num_images != wanted:
        yield f"    activations of {format_count(wanted, 'image')} were estimated from those of {trial.num_images}"
    if not fitting:
        yield f"    {suggest_fitting_settings(engine, machine, memory_bytes)}"


def memory_per_gpu(
    weights: ParameterCounts,
    forward_bytes: float,
    num_gpus: int,
    parallel: str,
    bf16: bool,
    includes_bf16_copies: bool = False,
) -> dict[str, float]:
    """Bytes by purpose on each of `num_gpus` GPUs that train together, with "ddp" or "fsdp".

    Weights, gradients and both moments are float32. With DDP, gradients are copied into communication buckets; bfloat16
    keeps copies of the matrices during a step, which `forward_bytes` may include. With FSDP each GPU has its share, two
    gathered layers and whole heads.
    """
    shares = num_gpus if parallel == "fsdp" else 1
    parts = {
        "weights": FLOAT32_BYTES * weights.student / shares,
        "gradients": FLOAT32_BYTES * weights.trained / shares,
        "optimiser": 2 * FLOAT32_BYTES * weights.trained / shares,
        "teacher": FLOAT32_BYTES * weights.teacher / shares,
        "anchor": FLOAT32_BYTES * weights.anchor / shares,
    }
    width = BFLOAT16_BYTES if bf16 else FLOAT32_BYTES
    if parallel == "fsdp":
        heads = weights.student - weights.encoder
        parts["gathered"] = 2 * width * weights.layer + 2 * FLOAT32_BYTES * heads
    else:
        buckets = FLOAT32_BYTES * weights.trained if num_gpus > 1 else 0
        parts["copies"] = buckets + (BFLOAT16_BYTES * weights.student if bf16 and not includes_bf16_copies else 0)
    parts["activations"] = forward_bytes
    return parts


def suggest_fitting_settings(
    engine: PretrainEngineRecipe, machine: TargetHardware, memory_bytes: Callable[[str, int], float]
) -> str:
    """The smallest changes that let a recipe fit; `memory_bytes` takes engine.parallel and engine.accumulation."""
    per_step = engine.batch_size // machine.num_gpus
    finer = [number for number in range(engine.accumulation, per_step + 1) if per_step % number == 0]
    suggestions = []
    for parallel in machine.parallel_modes:
        fitting = [number for number in finer if _fits(memory_bytes(parallel, number), machine.kind)]
        if fitting:
            settings = {"parallel": parallel, "accumulation": fitting[0]}
            changed = {key: value for key, value in settings.items() if value != getattr(engine, key)}
            suggestions.append(" and ".join(f"engine.{key}={value}" for key, value in changed.items()))
    if suggestions:
        return f"It would fit with {', or '.join(suggestions)}."
    least = min(memory_bytes(parallel, finer[-1]) for parallel in machine.parallel_modes)
    others = [] if engine.gradient_checkpointing is True else ["engine.gradient_checkpointing=true (not measured here)"]
    others += ["engine.crops=separate (not measured here)"] if engine.parallel == "ddp" else []
    others += ["more GPUs with engine.parallel=fsdp", "larger GPUs"]
    return f"With one image at a time it still needs {format_bytes(least)}. Try {', or '.join(others)}."


def disk_bytes(sizes: AnalyticCosts, engine: PretrainEngineRecipe) -> int:
    """The disk space of a run: its checkpoints, an encoder of the best probe for each of them, and the export."""
    num, weights = engine.max_checkpoints_on_disk(sizes.may_roll_back), sizes.weights
    return num * weights.checkpoint_bytes + (num + 1) * FLOAT32_BYTES * weights.encoder


def _length(engine: PretrainEngineRecipe, seconds: float) -> str:
    return f"{format_count(engine.steps, 'step')}, about {format_duration(engine.steps * seconds)} without probes"


def _fits(num_bytes: float, kind: GPUSpec) -> bool:
    return num_bytes <= USABLE_MEMORY_FRACTION * kind.memory_gib * GIB


def format_number(value: float) -> str:
    """Three significant digits without an exponent, such as 13,600,000 or 0.0312."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def format_bytes(num_bytes: float) -> str:
    return f"{format_number(num_bytes / GIB)} GiB" if num_bytes >= GIB else f"{format_number(num_bytes / 2**20)} MiB"


def format_duration(seconds: float) -> str:
    for limit, unit, name in ((1, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (100 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{format_number(seconds / unit)} {name}"
    return f"{format_number(seconds / 86_400)} days"


def format_flops(number: float) -> str:
    return f"{format_number(number / 1e12)} TFLOP" if number >= 1e12 else f"{format_number(number / 1e9)} GFLOP"


def format_count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
