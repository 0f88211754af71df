"""The lines of a dry run: what was measured here, and the estimate for another machine."""

from __future__ import annotations

from collections.abc import Iterator

from brainfound.pretraining.dry_run.gpus import GPUKind
from brainfound.pretraining.dry_run.trial import (
    BFLOAT16,
    FLOAT32,
    GIB,
    Machine,
    Sizes,
    Trial,
    Weights,
    most_memory_gib,
)
from brainfound.pretraining.execution import PretrainEngineRecipe
from brainfound.pretraining.task import num_best_encoders
from brainfound.training.schedules import effective_lr

# Of a GPU's memory; the rest goes to the driver, to libraries and to gaps between blocks.
USABLE_SHARE = 0.92
_FLOAT_NAMES = {"bf16": "bfloat16", "no": "float32"}


def report(trial: Trial, engine: PretrainEngineRecipe, lr: float, machine: Machine | None) -> Iterator[str]:
    """Lines about this machine and, if one is named, about a machine on paper.

    Args:
        engine: of the recipe, whatever part of its batch was tried out.
        lr: of the recipe, at batch 128.
    """
    yield from _here(trial, engine)
    yield from _of_sizes(trial.sizes, engine, lr)
    ln_k = "" if trial.ln_k is None else f"  (ln K = {trial.ln_k:.4f})"
    yield f"  loss                     {trial.loss:.4f}{ln_k}"
    if machine is not None:
        yield ""
        yield from _on_paper(trial.sizes, trial, engine, machine)


def report_untried(
    sizes: Sizes, free_bytes: int, engine: PretrainEngineRecipe, lr: float, machine: Machine
) -> Iterator[str]:
    """Lines where this machine is too small for a trial: what follows from the sizes alone."""
    needed = sizes.weights.trial_bytes
    yield "this machine: too little memory for a trial, so nothing was measured"
    yield f"  memory                   {size(free_bytes)} are free; weights, gradients and moments take {size(needed)}"
    yield from _of_sizes(sizes, engine, lr)
    yield ""
    yield from _on_paper(sizes, None, engine, machine)


def _here(trial: Trial, engine: PretrainEngineRecipe) -> Iterator[str]:
    seconds = engine.batch_size / trial.images_per_second
    per_image = trial.sizes.flops(trial.num_images).total / trial.num_images
    processes = f"{trial.num_processes} process" + ("es" if trial.num_processes > 1 else "")
    yield f"this machine, measured: {processes} on {trial.device.type}, {_FLOAT_NAMES[trial.precision]}"
    if trial.num_images * trial.num_processes * engine.accumulation != engine.batch_size:
        yield f"  tried out                {count(trial.num_images, 'image')} per process at a time, not a whole batch"
    if trial.precision == "no" and engine.precision == "bf16":
        yield "                           in float32: the recipe's bfloat16 is not faster here"
    yield f"  speed                    {figure(trial.images_per_second)} images/s, {duration(seconds)} per step"
    yield (
        f"  arithmetic               {operations(per_image)} per image, "
        f"{operations(per_image * trial.images_per_second)}/s over all processes"
    )
    yield f"  memory                   {size(most_memory_gib(trial.device) * GIB)} at most in this process"
    yield f"  whole run                {_length(engine, seconds)}"


def _of_sizes(sizes: Sizes, engine: PretrainEngineRecipe, lr: float) -> Iterator[str]:
    weights, batch = sizes.weights, engine.batch_size
    yield f"  effective learning rate  {effective_lr(lr, batch):.3g}  ({lr:g} at batch 128, this batch {batch})"
    yield (
        f"  weights                  {weights.student / 1e6:.4g} M (trained {weights.trained / 1e6:.4g} M), "
        f"teacher {weights.teacher / 1e6:.4g} M, anchor {weights.anchor / 1e6:.4g} M"
    )
    yield (
        f"  disk                     {size(disk_bytes(sizes, engine))}: "
        f"{count(engine.keep_checkpoints, 'checkpoint')} of {size(weights.checkpoint_bytes)} and one being written, "
        f"{'one to go back to, ' if sizes.may_roll_back else ''}their best encoders, the export"
    )


def _on_paper(sizes: Sizes, trial: Trial | None, engine: PretrainEngineRecipe, machine: Machine) -> Iterator[str]:
    kind, num_gpus = machine.kind, machine.num_gpus
    tflops, words = kind.tflops("no" if engine.precision == "no" else "bf16")
    num_images = machine.micro_batch(engine)
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
        yield f"  arithmetic               {operations(per_image)} per image"
    yield f"  speed                    {figure(images_per_second)} images/s, {duration(seconds)} per step"
    yield f"  whole run                {_length(engine, seconds)}"
    yield "  effective learning rate  as above: engine.batch_size is the batch of all GPUs together"
    yield f"  memory per GPU           {kind.memory_gib:g} GiB, of which {USABLE_SHARE:.0%} are counted on"
    if trial is None:
        yield from _memory_of_sizes(sizes.weights, engine, machine, words == "bfloat16")
    else:
        yield from _memory(trial, engine, machine, words == "bfloat16")
    yield f"  disk                     {size(disk_bytes(sizes, engine))}, written by one process"


def _memory(trial: Trial, engine: PretrainEngineRecipe, machine: Machine, bf16: bool) -> Iterator[str]:
    fitting = False
    for parallel in _ways(machine):
        parts = _parts(trial, engine, machine, parallel, engine.accumulation, bf16)
        fits = _fits(parts, machine.kind)
        fitting |= fits and parallel == engine.parallel
        yield f"    {_name(machine, parallel):<8} {size(sum(parts.values())):>9}  {'fits' if fits else 'does not fit'}"
        yield f"             {_in_words(parts)}"
    if bf16 and trial.precision != "bf16":
        yield "    activations were measured in float32; in bfloat16 they take between half of that and all of it"
    tried, wanted = trial.num_images, machine.micro_batch(engine)
    if tried != wanted:
        yield f"    activations of {count(wanted, 'image')} were reckoned from those of {tried}"
    if not fitting:
        yield f"    {advice(trial, engine, machine, bf16)}"


def _memory_of_sizes(weights: Weights, engine: PretrainEngineRecipe, machine: Machine, bf16: bool) -> Iterator[str]:
    for parallel in _ways(machine):
        parts = memory_per_gpu(weights, 0, machine.num_gpus, parallel, bf16)
        verdict = "and activations" if _fits(parts, machine.kind) else "does not fit, even without activations"
        yield f"    {_name(machine, parallel):<8} {size(sum(parts.values())):>9}  {verdict}"
        yield f"             {_in_words(parts)}"
    yield (
        f"    activations of {count(machine.micro_batch(engine), 'image')} at a time come on top; "
        "only a trial can tell how much. Ask on a larger machine."
    )


def memory_per_gpu(
    weights: Weights, forward_bytes: float, num_gpus: int, parallel: str, bf16: bool, casts_measured: bool = False
) -> dict[str, float]:
    """Bytes of each kind on one of `num_gpus` that train together.

    Weights, gradients and both moments are float32. With DDP, gradients are copied into buckets that are
    sent; bfloat16 keeps a copy of the matrices while a step lasts. With FSDP each GPU has its share, and
    beside it two gathered layers and whole heads.

    Args:
        forward_bytes: what the forward pass of its micro-batch takes.
        parallel: "ddp" or "fsdp".
        casts_measured: whether that was measured in bfloat16, and so has the copies of the matrices in it.
    """
    shares = num_gpus if parallel == "fsdp" else 1
    parts = {
        "weights": FLOAT32 * weights.student / shares,
        "gradients": FLOAT32 * weights.trained / shares,
        "optimiser": 2 * FLOAT32 * weights.trained / shares,
        "teacher": FLOAT32 * weights.teacher / shares,
        "anchor": FLOAT32 * weights.anchor / shares,
    }
    width = BFLOAT16 if bf16 else FLOAT32
    if parallel == "fsdp":
        heads = weights.student - weights.encoder
        parts["gathered"] = 2 * width * weights.layer + 2 * FLOAT32 * heads
    else:
        buckets = FLOAT32 * weights.trained if num_gpus > 1 else 0
        parts["copies"] = buckets + (BFLOAT16 * weights.student if bf16 and not casts_measured else 0)
    parts["activations"] = forward_bytes
    return parts


def advice(trial: Trial, engine: PretrainEngineRecipe, machine: Machine, bf16: bool) -> str:
    """The smallest changes that let a recipe fit into a GPU's memory, in words."""
    per_step = engine.batch_size // machine.num_gpus
    finer = [a for a in range(engine.accumulation, per_step + 1) if per_step % a == 0]
    found = []
    for parallel in _ways(machine):
        for accumulation in finer:
            if _fits(_parts(trial, engine, machine, parallel, accumulation, bf16), machine.kind):
                changes = [f"engine.parallel={parallel}"] if parallel != engine.parallel else []
                changes += [f"engine.accumulation={accumulation}"] if accumulation != engine.accumulation else []
                found.append(" and ".join(changes))
                break
    if found:
        return f"It would fit with {', or '.join(found)}."
    least = min(sum(_parts(trial, engine, machine, parallel, finer[-1], bf16).values()) for parallel in _ways(machine))
    others = [] if engine.gradient_checkpointing is True else ["engine.gradient_checkpointing=true (not measured here)"]
    others += ["engine.crops=separate (not measured here)"] if engine.parallel == "ddp" else []
    others += ["more GPUs with engine.parallel=fsdp", "larger GPUs"]
    return f"With one image at a time it still needs {size(least)}. Try {', or '.join(others)}."


def disk_bytes(sizes: Sizes, engine: PretrainEngineRecipe) -> int:
    """What a run needs on disk: its checkpoints, encoders of best probes and the export."""
    weights, may_roll_back = sizes.weights, sizes.may_roll_back
    encoders = (num_best_encoders(engine, may_roll_back) + 1) * FLOAT32 * weights.encoder
    return engine.most_checkpoints(may_roll_back) * weights.checkpoint_bytes + encoders


def _parts(
    trial: Trial, engine: PretrainEngineRecipe, machine: Machine, parallel: str, accumulation: int, bf16: bool
) -> dict[str, float]:
    forward_bytes = trial.activation_bytes(engine.batch_size // (machine.num_gpus * accumulation))
    measured = trial.precision == "bf16"
    return memory_per_gpu(trial.sizes.weights, forward_bytes, machine.num_gpus, parallel, bf16, measured)


def _length(engine: PretrainEngineRecipe, seconds: float) -> str:
    return f"{count(engine.steps, 'step')}, about {duration(engine.steps * seconds)} without probes"


def _fits(parts: dict[str, float], kind: GPUKind) -> bool:
    return sum(parts.values()) <= USABLE_SHARE * kind.memory_gib * GIB


def _ways(machine: Machine) -> tuple[str, ...]:
    return ("ddp", "fsdp") if machine.num_gpus > 1 else ("ddp",)


def _name(machine: Machine, parallel: str) -> str:
    return parallel if machine.num_gpus > 1 else "one GPU"


def _in_words(parts: dict[str, float]) -> str:
    return ", ".join(f"{part} {size(num_bytes)}" for part, num_bytes in parts.items() if num_bytes)


def figure(value: float) -> str:
    """Three digits that mean something, and no exponent.

    >>> figure(13_612_345.0), figure(48.26), figure(0.0312)
    ('13,600,000', '48.3', '0.0312')
    """
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def size(num_bytes: float) -> str:
    """Bytes in the unit that suits them.

    >>> size(3 * 2**30), size(5 * 2**20)
    ('3 GiB', '5 MiB')
    """
    return f"{figure(num_bytes / GIB)} GiB" if num_bytes >= GIB else f"{figure(num_bytes / 2**20)} MiB"


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> duration(0.0042), duration(90), duration(7200), duration(864_000)
    ('4.2 ms', '90 s', '2 h', '10 days')
    """
    for limit, unit, name in ((1, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (100 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{figure(seconds / unit)} {name}"
    return f"{figure(seconds / 86_400)} days"


def operations(number: float) -> str:
    """Floating-point operations in the unit that suits them.

    >>> operations(2.5e9), operations(5.6e12)
    ('2.5 GFLOP', '5.6 TFLOP')
    """
    return f"{figure(number / 1e12)} TFLOP" if number >= 1e12 else f"{figure(number / 1e9)} GFLOP"


def count(number: int, thing: str) -> str:
    """How many of a thing.

    >>> count(1, "step"), count(50_000, "step")
    ('1 step', '50,000 steps')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
