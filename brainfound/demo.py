"""The demo: simulate, prepare, pretrain, fine-tune, evaluate and predict a phantom cohort.

Each step is what a user would run, at small sizes, so the demo takes minutes on a CPU. The starting checkpoint is a
tiny Dinov2 with random weights in the Hub's format, because a released one may not be downloadable. The demo shows that
continued pretraining runs and its effect here, not its value on real brains.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainfound.data.store import Store
from brainfound.errors import UsageError

MARKER = "demo.json"
DEMO_CONTRASTS = ("T1w", "T2w", "FLAIR")
WITHHELD_CONTRAST = "FLAIR"
NUM_SUBJECTS = 100
SEED = 7
SPLIT = ("split.train=0.6", "split.validation=0.1", "split.test=0.3")

DEMO_TASKS: dict[str, dict[str, Any]] = {
    "tumour or healthy": {
        "recipe": "finetune-classification",
        "target": "diagnosis",
        "overrides": ("engine.steps=25", "engine.batch_size=8", "num_slices=8"),
    },
    "age": {
        "recipe": "finetune-regression",
        "target": "age_years",
        "overrides": (
            "engine.steps=20",
            "engine.batch_size=8",
            "num_slices=12",
            "head_fit_passes=8",
            "optim.lr=3e-5",
            "optim.head_lr=3e-5",
        ),
    },
    "tumour outline": {
        "recipe": "finetune-segmentation",
        "target": "mask",
        "overrides": (
            "engine.steps=90",
            "engine.batch_size=4",
            "task.decoder_width=48",
            "optim.lr=2e-3",
            "optim.head_lr=3e-3",
            # The recipe's strong augmentation needs longer runs.
            "augmentation={rotation_degrees: 15, scale: 0.2, shear: 0.1, contrast_dropout: 0.2}",
        ),
    },
}


@dataclass(frozen=True)
class Row:
    """One row of the demo's table; all rows have the same held-out subjects.

    ``adapted`` (continued pretraining) and ``from_start`` (fine-tuned from the starting checkpoint) are the scores with
    all contrasts and with one withheld.
    """

    task: str
    metric: str
    num_test: int
    trivial: float
    from_start: tuple[float, float]
    adapted: tuple[float, float]


def run_demo(
    out: Path, *, overwrite: bool = False, workers: int = 2, log: Callable[[str], None] = print, quiet: bool = True
) -> list[Row]:
    """Run the demo in a folder and return its table.

    Args:
        out: the folder for cohort/, store/, checkpoint/, pretrain/, one run per task, predictions/ and demo.json.
        overwrite: replace an earlier demo.
        workers: processes for simulation and preparation.
        log: called with one line per step.
        quiet: no progress bars.

    Raises:
        UsageError: the folder holds something other than a demo, or a demo and ``overwrite`` is not set.
    """
    _prepare_folder(out, overwrite)
    started = time.perf_counter()
    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.data.store.prepare import prepare
    from brainfound.phantom import write_phantom_cohort

    with _step(log, f"simulating {NUM_SUBJECTS} subjects"):
        cohort = write_phantom_cohort(
            out / "cohort",
            NUM_SUBJECTS,
            SEED,
            spacing_mm=2.5,
            contrasts=DEMO_CONTRASTS,
            diagnoses={"healthy": 0.5, "tumour": 0.5},
            num_sites=1,
            workers=workers,
        )
    with _step(log, "preparing the store"):
        settings = Preprocessing(contrasts=DEMO_CONTRASTS, spacing_mm=(2.5, 2.5, 5.0), size=(80, 80))
        store = prepare(cohort, out / "store", settings, workers)
    checkpoint = make_checkpoint(out / "checkpoint", image_size=store.preprocessing.size[0])
    with _step(log, "continued pretraining of the checkpoint"):
        from brainfound.pretraining.pretrain import pretrain

        export = pretrain("pretrain-demo", store, checkpoint, out / "pretrain", quiet=quiet) / "export"
    rows = [_run_task(name, store, checkpoint, export, out, log, quiet) for name in DEMO_TASKS]
    with _step(log, "predicting a held-out subject from its files"):
        _predict(out, cohort, store)
    seconds = time.perf_counter() - started
    content = {"seconds": round(seconds, 1), "withheld": WITHHELD_CONTRAST, "rows": [vars(row) for row in rows]}
    (out / MARKER).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    log(f"done in {seconds / 60:.1f} minutes")
    return rows


def make_checkpoint(folder: Path, image_size: int) -> Path:
    """A tiny Dinov2 with random weights in the Hub's format."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    from brainfound.models.model_folder import silence_transformers

    config = Dinov2Config(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=3, image_size=image_size, patch_size=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        with silence_transformers():
            Dinov2Model(config).save_pretrained(folder)
    return folder


def _run_task(
    name: str, store: Store, checkpoint: Path, export: Path, out: Path, log: Callable[[str], None], quiet: bool
) -> Row:
    """Fine-tune from the pretrained export and from the checkpoint with the same settings, and score both."""
    from brainfound.finetuning.finetune import finetune
    from brainfound.inference.evaluation import evaluate

    choice = DEMO_TASKS[name]
    overrides = (
        *SPLIT,
        "aggregator=mean",
        "evaluate_every=0",
        "frozen_baseline=false",  # the table has no column for it
        *choice["overrides"],
        "engine.precision=no",  # as in pretraining: the table must not depend on the processor's best precision
    )
    scores: dict[str, tuple[float, float]] = {}
    for kind, model in (("adapted", export), ("from_start", checkpoint)):
        words = "with continued pretraining" if kind == "adapted" else "without"
        with _step(log, f"{name}: fine-tuning {words}"):
            run = finetune(
                choice["recipe"],
                store,
                model,
                choice["target"],
                out / f"{choice['target']}-{kind.replace('_', '-')}",
                adapter="lora-r16-all",
                overrides=overrides,
                quiet=quiet,
            )
            full = evaluate(run, store)[0]
            partial = evaluate(run, store, without=(WITHHELD_CONTRAST,))[0]
        scores[kind] = (full.headline[1], partial.headline[1])
    metric, _, trivial = full.headline
    return Row(name, metric, len(full.cases), trivial, scores["from_start"], scores["adapted"])


def _predict(out: Path, cohort: Path, store: Store) -> None:
    """Segment the tumour of a held-out patient on the grid of its NIfTI files, and draw it."""
    from brainfound.data.cohort import Cohort
    from brainfound.data.splits.split_file import Split
    from brainfound.inference.loading import load
    from brainfound.models.stack_prediction import infer
    from brainfound.report.figures import plot_overlay

    run = out / "mask-adapted"
    held_out = set(Split.load(run / "splits.json").parts()["test"])
    sessions = [s for s in Cohort.read(cohort).sessions() if s.subject in held_out]
    session = next(s for s in sessions if s.covariates["diagnosis"] == "tumour")
    predictor = load(run)
    predictor.predict_session(session).save(out / "predictions", overwrite=True)
    stack = store[store.sessions["subject"].tolist().index(session.subject)]
    classes = infer(predictor.model, stack).classes
    path = out / "predictions" / "outline.png"
    plot_overlay(stack.pixels, stack.contrasts, stack.present.tolist(), stack.mask, classes, path=path)


def _prepare_folder(out: Path, overwrite: bool) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UsageError("the folder is not empty and holds no demo", where=out, remedy="Give another --out")
        if not overwrite:
            raise UsageError("the folder holds a demo already", where=out, remedy="Give --overwrite, or another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    # Written first, so that an interrupted demo can be overwritten.
    (out / MARKER).write_text("{}\n", encoding="utf-8")


@contextmanager
def _step(log: Callable[[str], None], what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    log(f"{what:<56}{time.perf_counter() - started:6.0f} s")
