"""The lines of a dry run: the measurements here, and the estimate for another machine."""

from __future__ import annotations

from collections.abc import Iterator

from brainfound.pretraining.dry_run.gpus import GPUSpec, TargetHardware
from brainfound.pretraining.dry_run.memory import GIB, peak_memory_gib
from brainfound.pretraining.dry_run.trial import (
    BFLOAT16_BYTES,
    FLOAT32_BYTES,
    AnalyticCosts,
    DryRunMeasurement,
    ParameterCounts,
)
from brainfound.pretraining.execution import PretrainEngineRecipe
from brainfound.training.schedules import effective_lr

# Of a GPU's memory; the rest goes to the driver, to libraries and to gaps between blocks.
USABLE_MEMORY_FRACTION = 0.92
_FLOAT_NAMES = {"bf16": "bfloat16", "no": "float32"}


def report(
    trial: DryRunMeasurement, engine: PretrainEngineRecipe, lr: float, machine: TargetHardware | None
) -> Iterator[str]:
    """Lines about this machine and, if one is named, about a machine on paper.

    Args:
        engine: of the recipe, with its whole batch.
        lr: of the recipe, at batch 128.
    """
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
    """Lines where this machine is too small for a trial: only what follows from the sizes."""
    needed = sizes.weights.dry_run_bytes
    yield "this machine: too little memory for a trial, so nothing was measured"
    yield (
        f"  memory                   {format_bytes(available_memory_bytes)} are free;"
        f" weights, gradients and moments take {format_bytes(needed)}"
    )
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
    tflops, words = kind.tflops("no" if engine.precision == "no" else "bf16")
    num_images = machine.micro_batch_size(engine)
    per_image = sizes.flops(num_images).total / num_images
    images_per_second = num_gpus * tflops * 1e12 * machine.utilisation / per_image
    seconds = engine.batch_size / images_per_second
    yield f"{num_gpus} × {kind.name}, an estimate on paper and no measurement:"
    yield (
        f"  assumed                  {machine.utilisation:.0%} of {tflops:g} TFLOP/s ({words}) per GPU; published"
        " runs reach 19 to 58%"
    )
    if words == "float32" and engine.precision != "no":
        yield f"                           a {kind.name.split('-')[0]} has no bfloat16, and float16 is not offered"
    if trial is None:
        yield f"  arithmetic               {format_flops(per_image)} per image"
    yield f"  speed                    {format_number(images_per_second)} images/s, {format_duration(seconds)} per step"
    yield f"  whole run                {_length(engine, seconds)}"
    yield "  effective learning rate  as above: engine.batch_size is the batch of all GPUs together"
    yield f"  memory per GPU           {kind.memory_gib:g} GiB, of which {USABLE_MEMORY_FRACTION:.0%} are counted on"
    yield from _memory_lines(sizes, trial, engine, machine, words == "bfloat16")
    yield f"  disk                     {format_bytes(disk_bytes(sizes, engine))}, written by one process"


def _memory_lines(
    sizes: AnalyticCosts,
    trial: DryRunMeasurement | None,
    engine: PretrainEngineRecipe,
    machine: TargetHardware,
    bf16: bool,
) -> Iterator[str]:
    """Memory per GPU; without a trial, that of weights, gradients and moments."""
    verdicts = ("fits", "does not fit")
    if trial is None:
        verdicts = ("and activations", "does not fit, even without activations")
    fitting, wanted = False, machine.micro_batch_size(engine)
    for parallel in machine.parallel_modes:
        if trial is None:
            parts = memory_per_gpu(sizes.weights, 0, machine.num_gpus, parallel, bf16)
        else:
            parts = _memory_breakdown(trial, engine, machine, parallel, engine.accumulation, bf16)
        fits = _fits(parts, machine.kind)
        fitting |= fits and parallel == engine.parallel
        name = parallel if machine.num_gpus > 1 else "one GPU"
        yield f"    {name:<8} {format_bytes(sum(parts.values())):>9}  {verdicts[not fits]}"
        yield f"             {', '.join(f'{part} {format_bytes(size)}' for part, size in parts.items() if size)}"
    if trial is None:
        yield (
            f"    activations of {format_count(wanted, 'image')} at a time come on top; "
            "only a trial can tell how much. Ask on a larger machine."
        )
        return
    if bf16 and trial.precision != "bf16":
        yield "    activations were measured in float32; in bfloat16 they take between half of that and all of it"
    if trial.num_images != wanted:
        yield f"    activations of {format_count(wanted, 'image')} were reckoned from those of {trial.num_images}"
    if not fitting:
        yield f"    {suggest_fitting_settings(trial, engine, machine, bf16)}"


def memory_per_gpu(
    weights: ParameterCounts,
    forward_bytes: float,
    num_gpus: int,
    parallel: str,
    bf16: bool,
    includes_bf16_copies: bool = False,
) -> dict[str, float]:
    """Bytes of each kind on one of `num_gpus` that train together.

    Weights, gradients and both moments are float32. With DDP, gradients are copied into buckets that are
    sent; bfloat16 keeps a copy of the matrices during a step. With FSDP each GPU has its share, two gathered layers
    and whole heads.

    Args:
        forward_bytes: of the forward pass of its micro-batch.
        parallel: "ddp" or "fsdp".
        includes_bf16_copies: whether that was measured in bfloat16, with the copies of the matrices.
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
    trial: DryRunMeasurement, engine: PretrainEngineRecipe, machine: TargetHardware, bf16: bool
) -> str:
    """The smallest changes that let a recipe fit into a GPU's memory, in words."""
    per_step = engine.batch_size // machine.num_gpus
    finer = [a for a in range(engine.accumulation, per_step + 1) if per_step % a == 0]
    found = []
    for parallel in machine.parallel_modes:
        for accumulation in finer:
            if _fits(_memory_breakdown(trial, engine, machine, parallel, accumulation, bf16), machine.kind):
                changes = [f"engine.parallel={parallel}"] if parallel != engine.parallel else []
                changes += [f"engine.accumulation={accumulation}"] if accumulation != engine.accumulation else []
                found.append(" and ".join(changes))
                break
    if found:
        return f"It would fit with {', or '.join(found)}."
    least = min(
        sum(_memory_breakdown(trial, engine, machine, parallel, finer[-1], bf16).values())
        for parallel in machine.parallel_modes
    )
    others = [] if engine.gradient_checkpointing is True else ["engine.gradient_checkpointing=true (not measured here)"]
    others += ["engine.crops=separate (not measured here)"] if engine.parallel == "ddp" else []
    others += ["more GPUs with engine.parallel=fsdp", "larger GPUs"]
    return f"With one image at a time it still needs {format_bytes(least)}. Try {', or '.join(others)}."


def disk_bytes(sizes: AnalyticCosts, engine: PretrainEngineRecipe) -> int:
    """The disk space of a run: its checkpoints, an encoder of the best probe for each of them, and the export."""
    weights, may_roll_back = sizes.weights, sizes.may_roll_back
    encoders = (engine.max_checkpoints_on_disk(may_roll_back) + 1) * FLOAT32_BYTES * weights.encoder
    return engine.max_checkpoints_on_disk(may_roll_back) * weights.checkpoint_bytes + encoders


def _memory_breakdown(
    trial: DryRunMeasurement,
    engine: PretrainEngineRecipe,
    machine: TargetHardware,
    parallel: str,
    accumulation: int,
    bf16: bool,
) -> dict[str, float]:
    forward_bytes = trial.activation_bytes(engine.batch_size // (machine.num_gpus * accumulation))
    measured = trial.precision == "bf16"
    return memory_per_gpu(trial.sizes.weights, forward_bytes, machine.num_gpus, parallel, bf16, measured)


def _length(engine: PretrainEngineRecipe, seconds: float) -> str:
    return f"{format_count(engine.steps, 'step')}, about {format_duration(engine.steps * seconds)} without probes"


def _fits(parts: dict[str, float], kind: GPUSpec) -> bool:
    return sum(parts.values()) <= USABLE_MEMORY_FRACTION * kind.memory_gib * GIB


def format_number(value: float) -> str:
    """Three significant digits, without an exponent.

    >>> format_number(13_612_345.0), format_number(48.26), format_number(0.0312)
    ('13,600,000', '48.3', '0.0312')
    """
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def format_bytes(num_bytes: float) -> str:
    """Bytes in MiB or GiB.

    >>> format_bytes(3 * 2**30), format_bytes(5 * 2**20)
    ('3 GiB', '5 MiB')
    """
    return f"{format_number(num_bytes / GIB)} GiB" if num_bytes >= GIB else f"{format_number(num_bytes / 2**20)} MiB"


def format_duration(seconds: float) -> str:
    """A time in a suitable unit.

    >>> format_duration(0.0042), format_duration(90), format_duration(7200), format_duration(864_000)
    ('4.2 ms', '90 s', '2 h', '10 days')
    """
    for limit, unit, name in ((1, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (100 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{format_number(seconds / unit)} {name}"
    return f"{format_number(seconds / 86_400)} days"


def format_flops(number: float) -> str:
    """Floating-point operations in GFLOP or TFLOP.

    >>> format_flops(2.5e9), format_flops(5.6e12)
    ('2.5 GFLOP', '5.6 TFLOP')
    """
    return f"{format_number(number / 1e12)} TFLOP" if number >= 1e12 else f"{format_number(number / 1e9)} GFLOP"


def format_count(number: int, thing: str) -> str:
    """A number with its noun.

    >>> format_count(1, "step"), format_count(50_000, "step")
    ('1 step', '50,000 steps')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
