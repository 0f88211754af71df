"""Adaptation: LoRA against full fine-tuning, a head on cached embeddings, and the overhead of a prediction.

    python benchmarks/adapt.py [--only lora,cache,predict] [--rounds 3] [--out FILE]

The two methods of `lora` run in processes of their own and alternate step by step; those of `cache` alternate whole
fine-tuning runs. Ratios are taken within rounds. Weights are random: time and memory do not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rounds import Table, figure, interleave, machine_facts, ratio, say
from workers import Worker

SECTIONS = ("lora", "cache", "predict")
SIZES = {"vits14": (384, 12, 6), "vitb14": (768, 12, 12), "tiny": (64, 2, 2)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}; commas between")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after the warm-up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", choices=tuple(SIZES), default="vits14", help="of the sections lora and cache")
    parser.add_argument("--predict-model", choices=tuple(SIZES), default="vitb14")
    parser.add_argument("--batch", type=int, default=1, help="volumes of a step")
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--image", type=int, default=224, help="side of a slice in pixels")
    parser.add_argument("--spacing-mm", type=float, default=1.0, help="of the session that is predicted")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    options = parser.parse_args(arguments)
    if unknown := set(options.only.split(",")) - set(SECTIONS):
        parser.error(f"no section {sorted(unknown)[0]}")
    return options


def compare_steps(options: argparse.Namespace, folder: Path, ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Steps of some ways of training, in turns; their facts, and their peak memory after the last step."""
    common = {
        "device": "cpu",
        "threads": options.threads,
        "size": SIZES[options.model],
        "batch": options.batch,
        "slices": options.slices,
        "image": options.image,
    }
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker("finetune", sys.executable, folder / name, common | way))
            for name, way in ways.items()
        }
        steps = {name: (lambda worker=worker: worker.ask("step")["seconds"]) for name, worker in workers.items()}
        seconds = interleave(steps, options.rounds, timed_by_themselves=steps)
        memory = {name: worker.ask("memory")["resident"] for name, worker in workers.items()}
        facts = {name: worker.facts for name, worker in workers.items()}
    return {"seconds": seconds, "peak_memory_gib": memory, "facts": facts}


def lora(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """LoRA of rank 8 against full fine-tuning of the same model on the same volumes."""
    found = compare_steps(options, folder, {"full": {"adapter": "full"}, "lora": {"adapter": "lora-r8"}})
    facts, memory, seconds = found["facts"]["lora"], found["peak_memory_gib"], found["seconds"]
    return found | {
        "trained_share": figure(facts["trained_in_encoder"] / facts["encoder"]),
        "time_over_full": ratio(seconds["lora"], seconds["full"]),
        "memory_over_full": figure(memory["lora"] / memory["full"]),
    }


def cache(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Epochs of a head on a frozen backbone, by whole runs: slices read and encoded anew, and embeddings kept."""
    import torch
    from worker_finetune import backbone_of

    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.data.store.prepare import prepare
    from brainfound.finetuning.finetune import finetune
    from brainfound.models import BrainFoundConfig, BrainFoundModel
    from brainfound.phantom import write_phantom_cohort

    torch.set_num_threads(options.threads)
    contrasts = ("T1w", "T2w", "FLAIR")
    cohort = write_phantom_cohort(
        folder / "cohort", num_subjects=12, spacing_mm=4.0, contrasts=contrasts, missing_probability=0.0
    )
    pixel_mm = 224.0 / options.image
    preprocessing = Preprocessing(
        contrasts=contrasts,
        spacing_mm=(pixel_mm, pixel_mm, min(120.0 / options.slices, 20.0)),
        size=(options.image,) * 2,
    )
    store = prepare(cohort, folder / "store", preprocessing)
    torch.manual_seed(0)
    config = BrainFoundConfig(backbone_config=backbone_of(SIZES[options.model]), contrasts=contrasts)
    BrainFoundModel(config).save_pretrained(folder / "model")
    common = [
        f"num_slices={options.slices}", f"engine.batch_size={options.batch}", "engine.log_every=1",
        'engine.precision="no"', "evaluate_every=0", "frozen_baseline=false", "head_fit_passes=0",
        "split.train=0.5", "split.validation=0.25", "split.test=0.25",
    ]  # fmt: skip
    runs = iter(range(1_000))

    def seconds_per_step(kept: bool) -> float:
        """The median of an epoch's steps, or of ten epochs' of kept embeddings; not of the first, which warms up."""
        steps = 1 + max(1, 6 // options.batch) * (10 if kept else 1)
        settings = [f"cached_embeddings={str(kept).lower()}", f"engine.steps={steps}"]
        run = finetune(
            "finetune-classification", store, folder / "model", "sex", folder / f"run-{next(runs)}",
            adapter="head-only", overrides=[*common, *settings], cache=folder / "kept", quiet=True,
        )  # fmt: skip
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return statistics.median(line["seconds_per_step"] for line in lines[1:] if "seconds_per_step" in line)

    ways = {"encoding": lambda: seconds_per_step(False), "kept": lambda: seconds_per_step(True)}
    seconds = interleave(ways, options.rounds, timed_by_themselves=ways)
    return {
        "seconds": seconds,
        "num_slices": store.num_slices,
        "rate_over_encoding": ratio(seconds["encoding"], seconds["kept"]),
    }


def predict(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A session from its files to its embedding, against the backbone alone on the same slices."""
    import torch
    from worker_finetune import backbone_of

    from brainfound.data.batches import collate
    from brainfound.data.cohort import Cohort
    from brainfound.data.preprocessing.session import prepare_session
    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.inference.predictor import Predictor
    from brainfound.models import BrainFoundConfig, BrainFoundModel
    from brainfound.phantom import write_phantom_cohort

    torch.set_num_threads(options.threads)
    contrasts = ("T1w", "T1ce", "T2w", "FLAIR")
    write_phantom_cohort(
        folder / "cohort", num_subjects=1, spacing_mm=options.spacing_mm, contrasts=contrasts, missing_probability=0.0
    )
    (session,) = Cohort.read(folder / "cohort").sessions()
    spacing = (options.spacing_mm,) * 3
    preprocessing = Preprocessing(contrasts=contrasts, spacing_mm=spacing, size=(options.image, options.image))
    config = BrainFoundConfig(backbone_config=backbone_of(SIZES[options.predict_model]), contrasts=contrasts)
    model = BrainFoundModel(config).eval()
    predictor = Predictor(model, preprocessing)
    stack = prepare_session(session, preprocessing).stack
    assert stack is not None
    batch = collate([stack])
    pixels, present = batch.pixel_values[0], batch.contrast_mask.expand(len(stack.pixels), -1)
    chunk = model.config.slice_chunk

    def forward() -> None:
        with torch.inference_mode():
            for rows, mask in zip(pixels.split(chunk), present.split(chunk), strict=True):
                model.encoder(rows, mask)

    seconds = interleave({"predict": lambda: predictor.predict_session(session), "forward": forward}, options.rounds)
    return {
        "num_slices": len(stack.pixels),
        "seconds": seconds,
        "time_over_forward": ratio(seconds["predict"], seconds["forward"]),
    }


def table(result: dict[str, Any]) -> str:
    """The measurements with their targets, as Markdown, of the sections that were run."""
    rows = Table()
    if "lora" in result:
        found = result["lora"]
        rows.row("lora: trained parameters of the backbone, share", found["trained_share"], at_most=0.02)
        rows.row("lora: time of a step over full fine-tuning", found["time_over_full"]["median"], at_most=0.8)
        rows.row("lora: peak memory over full fine-tuning", found["memory_over_full"], at_most=0.7)
    if "cache" in result:
        name = "cache: epochs of a head on kept embeddings over encoding each time, per second"
        rows.row(name, result["cache"]["rate_over_encoding"]["median"], at_least=50)
    if "predict" in result:
        name = "predict: time over the backbone's forward pass on the same slices"
        rows.row(name, result["predict"]["time_over_forward"]["median"], at_most=1.3)
    return "\n".join(rows.lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the sections, print the table."""
    options = parse(arguments)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    result: dict[str, Any] = {"machine": machine_facts(), "settings": settings}
    started = time.perf_counter()
    for name in options.only.split(","):
        say(f"section {name}")
        with tempfile.TemporaryDirectory() as folder:
            result[name] = {"lora": lora, "cache": cache, "predict": predict}[name](options, Path(folder))
    result["minutes"] = figure((time.perf_counter() - started) / 60)
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
