"""Fine-tuning in several ways on simulated sites, scored at another site; shared by `augmentation.py`, `precision.py`
and `partial_input.py`.

Models are trained on simulated subjects of two sites, with several seeds, and scored on subjects of a third site, each
run alone; every two ways are compared subject by subject. Results are kept in --work and reused.

Axes: N subjects, R runs (seeds), K classes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rounds import ends_of, figure, keep, machine_facts, say, use_one_thread

FIELD_OF_VIEW_MM = 200.0
START_RECIPE = "pretrain-demo"
PRESET_OF = {"segmentation": "strong", "classification": "mild", "regression": "mild"}
"""The augmentation of each task's recipe."""
Ways = Mapping[str, Callable[[str, int], Any]]
"""Name of a way → the recipe of a task and a seed."""


@dataclass(frozen=True)
class Task:
    """What is learnt, and how it is judged."""

    target: str
    metric: str
    measure: str
    higher_is_better: bool = True


TASKS: Mapping[str, Task] = {
    "segmentation": Task("mask", "dice", "tissue, Dice"),
    "classification": Task("diagnosis", "auroc", "diagnosis, AUROC"),
    "regression": Task("age_years", "mae", "age, MAE in years", higher_is_better=False),
}


def shared_options(doc: str) -> argparse.ArgumentParser:
    """The options that all these scripts have."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs; kept and reused")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--model", help="a Hub id or folder to fine-tune; default: a tiny ViT, pretrained here")
    parser.add_argument("--part", choices=("test", "development"), default="test", help="the sites that are scored")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--sessions",
        type=int,
        default=60,
        help="of the sites to learn from; a fifth is validation and test parts that are not used",
    )
    parser.add_argument("--test-sessions", type=int, default=100)
    parser.add_argument("--spacing-mm", type=float, default=2.5, help="of the simulation")
    parser.add_argument("--slice-mm", type=float, default=5.0, help="distance of slices in the stores")
    parser.add_argument("--patches", type=int, default=8, help="side of a slice, which shows 200 mm, in patches")
    parser.add_argument("--start-steps", type=int, default=200, help="of the tiny ViT's pretraining")
    parser.add_argument("--steps", type=int, default=100, help="of a classification or a regression")
    parser.add_argument("--segmentation-steps", type=int, default=160)
    parser.add_argument("--slices", type=int, default=8, help="per volume, in training")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every fine-tuning recipe")
    parser.add_argument("--permutations", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    return parser


def finish(options: argparse.Namespace, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure, and add the machine, the settings and the time; written to --out."""
    use_one_thread(offline=options.model is None)
    started = time.perf_counter()
    settings = {name: value for name, value in vars(options).items() if name not in ("work", "out")}
    if options.model is not None:
        settings["model"] = Path(options.model).name  # a machine's paths say nothing to a reader
    result = {"machine": machine_facts(), "settings": settings} | measure()
    result["minutes"] = figure((time.perf_counter() - started) / 60)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def run(options: argparse.Namespace, ways: Ways, work: Callable[..., dict[str, Any]] | None = None) -> dict[str, Any]:
    """Data, starting point and all runs; what each makes is named after all that it depends on.

    Args:
        work: trains and scores one recipe; None: `train_and_score`.

    Returns:
        ``found``: task → way → what each seed's run answered; ``data`` and ``seconds`` for the record.
    """
    from shifted_cohorts import describe

    from brainfound.data.store import Store

    seconds: dict[str, float] = {}

    def timed(what: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        made = work()
        seconds[what] = figure(time.perf_counter() - started)
        say(f"{what}: {seconds[what]:.0f} s")
        return made

    stores = timed("data", lambda: make_stores(options))
    learnt, scored = Store.open(stores["pretraining"]), Store.open(stores[options.part])
    model = options.model or timed("start", lambda: pretrain_start(options, learnt))
    found = timed("runs", lambda: all_runs(options, stores, model, ways, work or train_and_score))
    data = {"learnt from": describe(learnt), "scored": describe(scored)}
    return {"found": found, "data": data, "seconds": seconds}


def make_stores(options: argparse.Namespace) -> dict[str, Path]:
    """The folder of each part's store; the part to learn from also pretrains the tiny ViT."""
    from shifted_cohorts import CONTRASTS, PARTS, key_of, make_store

    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.models.loading import read_patch_size

    side = options.patches * (8 if options.model is None else read_patch_size(options.model, CONTRASTS))
    pixel_mm = FIELD_OF_VIEW_MM / side
    preprocessing = Preprocessing(
        contrasts=CONTRASTS, spacing_mm=(pixel_mm, pixel_mm, options.slice_mm), size=(side, side)
    )
    folders = {}
    for part in PARTS:
        if part.name in ("pretraining", options.part):
            num = options.sessions if part.name == "pretraining" else options.test_sessions
            made_of = {"part": asdict(part), "num": num, "maps": [], "spacing_mm": options.spacing_mm,
                       "preprocessing": preprocessing.model_dump()}  # fmt: skip
            folder = options.work / f"own-{part.name}-{key_of(made_of)}"
            make_store(folder, part, num, None, options.spacing_mm, preprocessing, options.workers)
            folders[part.name] = folder / "store"
    return folders


def pretrain_start(options: argparse.Namespace, store: Any) -> str:
    """A tiny ViT that has filled in hidden patches of the sites to learn from, without a label."""
    import torch
    from shifted_cohorts import key_of

    from brainfound.pretraining.pretrain import pretrain
    from brainfound.pretraining.recipe import PretrainRecipe
    from brainfound.recipes import load

    torch.set_num_threads(options.workers)
    steps, patch = options.start_steps, 8
    recipe = load(
        PretrainRecipe, START_RECIPE, "train",
        ["objective={kind: masked_autoencoder, decoder: {width: 96, layers: 2, heads: 3}}",
         f"views.global_size={max(2, options.patches * 4 // 5) * patch}", "views.num_local=0", "probe.every=0",
         f"engine.steps={steps}", f"engine.checkpoint_every={max(1, steps // 2)}", "guard.enabled=false"],
    )  # fmt: skip
    folder = options.work / f"start-{key_of({'recipe': recipe.model_dump(mode='json'), 'data': store.content_hash})}"
    if not (folder / "export" / "config.json").is_file():
        pretrain(recipe, store, out=folder, resume=(folder / "recipe.yaml").is_file(), quiet=True)
    return str(folder / "export")


def recipe_of(
    task: str, seed: int, options: argparse.Namespace, preset: str | None = None, changes: Sequence[str] = ()
) -> Any:
    """The project's recipe, with fewer steps, and rates higher by as much (at most tenfold).

    Args:
        preset: another augmentation. Contrasts are withheld as often as in the recipe: only the changes of
            images differ.
        changes: ``KEY=VALUE`` strings, of this way alone.
    """
    from brainfound.finetuning.recipe import FinetuneRecipe
    from brainfound.recipes import load

    own = load(FinetuneRecipe, f"finetune-{task}", "train")
    steps = options.segmentation_steps if task == "segmentation" else options.steps
    faster = min(10.0, own.engine.steps / steps)
    own_changes = [
        f"seed={seed}", f"augmentation={preset or PRESET_OF[task]}",
        f"augmentation.contrast_dropout={own.augmentation.contrast_dropout}",
        f"optim.lr={own.optim.lr * faster}", f"optim.head_lr={own.optim.head_lr * faster}",
        f"num_slices={options.slices}", "evaluate_every=0",
        "split.train=0.8", "split.validation=0.1", "split.test=0.1",
        f"engine.steps={steps}", f"engine.checkpoint_every={steps}", 'engine.precision="no"',
    ]  # fmt: skip
    if task == "segmentation":
        own_changes.append("task.decoder_width=48")
    return load(FinetuneRecipe, f"finetune-{task}", "train", [*own_changes, *options.set, *changes])


def all_runs(
    options: argparse.Namespace, stores: Mapping[str, Path], model: str, ways: Ways, work: Callable[..., dict[str, Any]]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Task → way → what each seed's run answered at the other site; some runs at a time."""
    from shifted_cohorts import key_of
    from worker_processes import in_processes

    from brainfound.data.store import Store

    learnt, scored = stores["pretraining"], stores[options.part]
    content = [Store.open(store).content_hash for store in (learnt, scored)]
    jobs, places = [], []
    for seed in options.seeds:  # a run that is cut off has all tasks and ways of its first seeds
        for task in options.tasks:
            for way, recipe_for in ways.items():
                recipe = recipe_for(task, seed)
                made_of = {"recipe": recipe.model_dump(mode="json"), "model": model, "content": content}
                folder = options.work / f"{work.__name__}-{task}-{way.replace(' ', '-')}-{seed}-{key_of(made_of)}"
                jobs.append((recipe, learnt, scored, model, TASKS[task].target, folder))
                places.append((task, way))
    found: dict[str, dict[str, list[dict[str, Any]]]] = {task: {way: [] for way in ways} for task in options.tasks}
    for (task, way), answers in zip(places, in_processes(work, jobs, options.workers), strict=True):
        found[task][way].append(answers)
    return found


def train_and_score(recipe: Any, learnt: Path, scored: Path, model: str, target: str, folder: Path) -> dict[str, Any]:
    """One fine-tuning, and its answers at the other site; both are read where they are there already."""
    import torch

    import brainfound
    from brainfound.data.store import Store
    from brainfound.finetuning.finetune import finetune
    from brainfound.finetuning.scoring import score_sessions

    torch.set_num_threads(1)
    kept = folder / "elsewhere.json"
    if not kept.is_file():
        finetune(recipe, learnt, model, target, folder, resume=(folder / "recipe.yaml").is_file(), quiet=True)
        store, predictor = Store.open(scored), brainfound.load(folder)
        # Not `evaluate`: subjects of the two cohorts are other people, but are numbered alike.
        found = score_sessions(predictor.model, store, range(len(store)), predictor.target, predictor.num_slices)
        cases = found.cases.drop(columns=["subject", "session"]).to_dict("list")
        keep(kept, {"trivial": found.headline[2], "cases": cases})
    return json.loads(kept.read_text(encoding="utf-8"))


def judge(
    found: Mapping[str, Mapping[str, list[dict[str, Any]]]], permutations: int, resamples: int = 1000
) -> dict[str, Any]:
    """Scores of each way, and the gain of each over each before it, of every task.

    The test exchanges two ways within subjects; seeds go with them. Holm's correction is over all comparisons.
    """
    from brainfound.metrics.statistics import bootstrap_interval, holm, paired_permutation_test

    judged: dict[str, Any] = {}
    tests = []
    for task, by_way in found.items():
        metric, sign = metric_of(task), 1.0 if TASKS[task].higher_is_better else -1.0
        truth, values = subject_values(task, by_way)
        scores = {}
        for way, of_runs in values.items():
            interval = bootstrap_interval(metric, truth, of_runs, num_resamples=resamples)
            runs = [figure(metric(truth, of_runs[:, [run]])) for run in range(of_runs.shape[1])]
            scores[way] = {"mean": figure(interval.estimate), "interval": ends_of(interval), "runs": runs}
        gains = {}
        for before, after in combinations(values, 2):
            interval = bootstrap_interval(
                lambda labels, a, b, metric=metric, sign=sign: sign * (metric(labels, a) - metric(labels, b)),
                truth, values[after], values[before], num_resamples=resamples,
            )  # fmt: skip
            p = paired_permutation_test(
                values[after], values[before], lambda x, metric=metric, truth=truth: metric(truth, x), permutations
            )
            gains[f"{after} over {before}"] = {"gain": figure(interval.estimate), "interval": ends_of(interval), "p": p}
        tests += list(gains.values())
        trivial = next(iter(by_way.values()))[0]["trivial"]
        judged[task] = {"measure": TASKS[task].measure, "trivial": figure(trivial), "scores": scores, "gains": gains}
    for gain, adjusted in zip(tests, holm([gain["p"] for gain in tests]), strict=True):
        gain["p"], gain["p_holm"] = figure(gain["p"]), figure(float(adjusted))
    return judged


def subject_values(
    task: str, by_way: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Truth (N,), and of each way what every subject got: Dice or absolute error (N, R), or ranks (N, R, K) of the
    probabilities within run and class, since runs need not agree on their scale."""
    from scipy.stats import rankdata

    truth = np.zeros(0)
    values: dict[str, np.ndarray] = {}
    for way, runs in by_way.items():
        tables = [{name: np.array(column) for name, column in run["cases"].items()} for run in runs]
        if task == "segmentation":
            truth = tables[0]["reference_pixels"]
            values[way] = np.stack([table["dice"] for table in tables], axis=1)
        elif task == "regression":
            truth = tables[0]["truth"]
            values[way] = np.stack([np.abs(table["prediction"] - truth) for table in tables], axis=1)
        else:
            names = [name for name in tables[0] if name.startswith("p(")]
            truth = np.array([names.index(f"p({label})") for label in tables[0]["truth"]])
            ranks = [rankdata(np.stack([table[name] for name in names], axis=1), axis=0) for table in tables]
            values[way] = np.stack(ranks, axis=1)
    return truth, values


def metric_of(task: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """Of truth (N,) and values (N, R, …): the mean over runs, each scored alone: their mean would be an ensemble."""
    from brainfound.metrics import auroc

    if task != "classification":
        return lambda truth, values: float(values.mean())
    return lambda truth, values: float(np.mean([auroc(truth, values[:, run]) for run in range(values.shape[1])]))


def table(result: Mapping[str, Any]) -> str:
    """Scores and gains, as Markdown."""
    ways = list(next(iter(result["tasks"].values()))["scores"])
    lines = [f"| scored at another site | {' | '.join(ways)} | without an image |", "|---" * (len(ways) + 2) + "|"]
    for of_task in result["tasks"].values():
        cells = [f"{of['mean']:.3g} ({of['interval'][0]:.3g}–{of['interval'][1]:.3g})"
                 for of in of_task["scores"].values()]  # fmt: skip
        lines.append(f"| {of_task['measure']} | {' | '.join(cells)} | {of_task['trivial']:.3g} |")
    lines += ["", "| | gain (95 % interval) | p | p, Holm |", "|---|---|---|---|"]
    for of_task in result["tasks"].values():
        for what, of in of_task["gains"].items():
            low, high = of["interval"]
            lines.append(f"| {of_task['measure']}: {what} | {of['gain']:+.3g} ({low:+.3g} to {high:+.3g}) | "
                         f"{of['p']:.2g} | {of['p_holm']:.2g} |")  # fmt: skip
    return "\n".join(lines)
