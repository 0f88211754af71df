"""Age and tissue of real brains by cross-validation: fine-tuned models against a mean, regional volumes and a U-Net.

    python benchmarks/real_brains.py --cohort FOLDER --model FOLDER --work FOLDER --out results.json

The cohort is a folder with a manifest.tsv of T1w scans, ages, and anatomical masks with the codes of MUSE. Every
subject is tested once, by a model that has not seen them; each way is trained with several seeds on the same folds.
Nothing is tuned here: settings are the recipes', with fewer steps. Results are kept in --work and reused.

Axes: N subjects, R runs (seeds), S slices, H W pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rounds import ends_of, figure, keep, machine_facts, say, use_one_thread

CONTRAST = "T1w"
TISSUES: Mapping[str, tuple[int, ...]] = {
    "ventricles": (4, 11, 49, 50, 51, 52),
    "hippocampi": (47, 48),
    "deep grey": (23, 30, 31, 32, 36, 37, *range(55, 63), 75, 76),
    "cortex": tuple(range(100, 208)),
    "white matter": tuple(range(81, 96)),
    "cerebellum": (38, 39, 40, 41, 71, 72, 73),
    "brain stem": (35,),
}
"""Codes of MUSE that make up each tissue (accumbens, amygdala and basal forebrain count as deep grey, the fornix as
white matter); other codes, such as the fluid around the brain, are background."""
TARGETS = {"regression": "age_years", "segmentation": "mask"}
GRIDS = {"regression": ((2.5, 2.5, 5.0), (80, 80)), "segmentation": ((2.0, 2.0, 4.0), (112, 112))}
"""Millimetres of a voxel, and pixels of a slice."""
LORA, FULL, NEW = "BrainFound, LoRA", "BrainFound, full", "the same from new weights, full"
FROZEN, UNET, REGIONS, MEAN = "linear on the frozen backbone", "3-D U-Net", "ridge on regional volumes", "mean"
MEASURED = "ridge on tissue volumes that a BrainFound segmentation measures"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohort", type=Path, required=True, help="folder with manifest.tsv, scans and masks")
    parser.add_argument("--model", required=True, help="a BrainFound folder of T1w, T2w and FLAIR")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs; kept and reused")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--tasks", nargs="+", choices=tuple(TARGETS), default=list(TARGETS))
    parser.add_argument("--ways", nargs="+", choices=(LORA, FULL, NEW), default=[LORA, FULL, NEW])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of a regression")
    parser.add_argument("--segmentation-steps", type=int, default=200)
    parser.add_argument("--slices", type=int, default=16, help="per volume of a regression")
    parser.add_argument(
        "--faster", type=float, default=10.0, help="rates are raised as steps are fewer, at most so much"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every fine-tuning recipe")
    parser.add_argument("--segmenter", type=Path, help="a fine-tuning run on the tissues of simulated heads, whose "
                        "volumes of these brains are then one more baseline")  # fmt: skip
    parser.add_argument("--unet-seconds", type=float, help="of training; default: the total of the first way")
    parser.add_argument("--permutations", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    use_one_thread(offline=False)
    started = time.perf_counter()
    settings = {name: value for name, value in vars(options).items() if name not in ("work", "out", "cohort")}
    for name in ("model", "segmenter"):  # a machine's paths say nothing to a reader
        settings[name] = settings[name] and Path(settings[name]).name
    result: dict[str, Any] = {"machine": machine_facts(), "settings": settings, "tasks": {}}
    for task in options.tasks:
        result["tasks"][task] = run_task(task, options)
        result["minutes"] = figure((time.perf_counter() - started) / 60)
        if options.out:  # after each task, so that a later failure loses nothing
            options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(result))


def run_task(task: str, options: argparse.Namespace) -> dict[str, Any]:
    """All ways of one task, on the same folds."""
    from regional_volumes import mean_age, measured_shares, regional_ridge, regional_shares
    from worker_processes import in_processes

    from brainfound.data.store import Store
    from brainfound.finetuning.splits import make_split

    folder = make_store(task, options)
    store = Store.open(folder)
    split = make_split(store, validation=0.1, folds=options.folds, target=TARGETS[task], seed=0)
    split_file = options.work / f"{task}-split.json"
    split.save(split_file)
    say(f"{task}: {len(store)} sessions, {store.num_slices} slices")
    cells = [(fold, seed) for seed in options.seeds for fold in split.folds]
    kept = options.work / f"{task}-new-weights"
    new = str(_new_weights(options.model, kept)) if NEW in options.ways else ""
    jobs, places = [], []
    for fold, seed in cells:  # a run that is cut off has all ways of its first seeds
        for way in options.ways:
            model = new if way == NEW else options.model
            jobs.append((task, way, fold, seed, folder, split_file, model, options))
            places.append((way, fold, seed))
    answers = dict(zip(places, in_processes(fine_tune, jobs, options.workers), strict=True))
    first = options.ways[0]
    rivals = [
        (task, fold, seed, folder, split_file, options.unet_seconds or answers[first, fold, seed]["seconds"], options)
        for fold, seed in cells
    ]
    for (fold, seed), of_unet in zip(cells, in_processes(train_unet, rivals, options.workers), strict=True):
        answers[UNET, fold, seed] = of_unet
        answers[FROZEN, fold, seed] = answers[first, fold, seed]["frozen"]
    if task == "regression":
        shares = {REGIONS: regional_shares(store, options.cohort)}
        if options.segmenter is not None:
            shares[MEASURED] = measured_shares(Store.open(make_store("segmentation", options)), options.segmenter)
        for fold, seed in cells:
            parts = split.sessions(store, fold)
            for way, of_way in shares.items():
                answers[way, fold, seed] = regional_ridge(store, of_way, parts)
            answers[MEAN, fold, seed] = mean_age(store, parts)
    return judge(task, answers, cells, len(store), options)


def make_store(task: str, options: argparse.Namespace) -> Path:
    """The store of a task's grid, with the three contrasts that the model knows; only T1w was scanned."""
    import nibabel as nib
    import pandas as pd
    from shifted_cohorts import CONTRASTS

    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.data.store.prepare import prepare

    folder = options.work / f"{task}-store"
    if folder.is_dir():
        return folder
    merged = options.work / "cohort"
    merged.mkdir(parents=True, exist_ok=True)
    table = pd.read_csv(options.cohort / "manifest.tsv", sep="\t", dtype={"subject": str})
    table = table[table["contrast"] == CONTRAST].copy()
    for row, mask in table["mask"].items():
        image = nib.load(options.cohort / mask)
        codes = np.asarray(image.dataobj).round().astype(int)
        tissues = np.zeros(codes.shape, np.uint8)
        for number, members in enumerate(TISSUES.values(), start=1):
            tissues[np.isin(codes, members)] = number
        file = merged / f"{table.loc[row, 'subject']}-tissue.nii.gz"
        nib.save(nib.Nifti1Image(tissues, image.affine), file)
        table.loc[row, "mask"] = file.name
        table.loc[row, "path"] = os.path.relpath((options.cohort / table.loc[row, "path"]).resolve(), merged.resolve())
    table.to_csv(merged / "manifest.tsv", sep="\t", index=False)
    spacing_mm, size = GRIDS[task]
    preprocessing = Preprocessing(contrasts=CONTRASTS, spacing_mm=spacing_mm, size=size)
    prepare(merged, folder, preprocessing, options.workers)
    return folder


def _new_weights(model: str, folder: Path) -> Path:
    """A model of the same kind that has learnt nothing."""
    import torch

    from brainfound.models import BrainFoundModel

    if not (folder / "config.json").is_file():
        config = BrainFoundModel.from_pretrained(model).config
        with torch.random.fork_rng():
            torch.manual_seed(0)
            BrainFoundModel(config).save_pretrained(folder)
    return folder


def recipe_of(task: str, way: str, seed: int, options: argparse.Namespace) -> Any:
    """The project's recipe with fewer steps, and rates higher by as much (at most `options.faster` times)."""
    from brainfound.finetuning.recipe import FinetuneRecipe
    from brainfound.recipes import load

    own = load(FinetuneRecipe, f"finetune-{task}", "train")
    steps = options.steps if task == "regression" else options.segmentation_steps
    faster = min(options.faster, own.engine.steps / steps)
    # Of all weights a tenth of the adapters' rate, as is usual.
    backbone = own.optim.lr * faster * (1.0 if way == LORA else 0.1)
    changes = [
        f"seed={seed}", f"optim.lr={backbone}", f"optim.head_lr={own.optim.head_lr * faster}",
        f"adapter={own.adapter if way == LORA else 'full'}", "augmentation.contrast_dropout=0",
        "evaluate_every=0", f"engine.steps={steps}", f"engine.checkpoint_every={steps}", 'engine.precision="no"',
        f"frozen_baseline={str(way == options.ways[0]).lower()}",
    ]  # fmt: skip
    changes += [f"num_slices={options.slices}"] if task == "regression" else ["task.decoder_width=48"]
    return load(FinetuneRecipe, f"finetune-{task}", "train", [*changes, *options.set])


def fine_tune(
    task: str, way: str, fold: str, seed: int, data: Path, split: Path, model: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One run, and what it answered about the fold's test part."""
    import pandas as pd
    import torch
    from shifted_cohorts import key_of

    from brainfound.data.store import Store
    from brainfound.finetuning.finetune import finetune

    torch.set_num_threads(1)
    recipe, store = recipe_of(task, way, seed, options), Store.open(data)
    made_of = {"recipe": recipe.model_dump(mode="json"), "model": model, "data": store.content_hash}
    folder = options.work / f"{task}-{options.ways.index(way)}-{fold}-{seed}-{key_of(made_of)}"
    kept = folder / "answers.json"
    if not kept.is_file():
        began = time.process_time()
        begun = (folder / "recipe.yaml").is_file()
        finetune(recipe, store, model, TARGETS[task], folder, split=split, fold=fold, resume=begun, quiet=True)
        answers: dict[str, Any] = {"seconds": time.process_time() - began}
        read = _errors if task == "regression" else _dice_by_tissue
        answers |= read(pd.read_csv(folder / "cases.tsv", sep="\t"))
        if recipe.frozen_baseline:
            answers["frozen"] = read(pd.read_csv(folder / "frozen-cases.tsv", sep="\t"))
        keep(kept, answers)
    return json.loads(kept.read_text(encoding="utf-8"))


def train_unet(
    task: str, fold: str, seed: int, data: Path, split: Path, seconds: float, options: argparse.Namespace
) -> dict[str, Any]:
    """The U-Net of one fold and seed, and what it answered."""
    import small_unet
    import torch

    from brainfound.data.splits.split_file import Split
    from brainfound.data.store import Store
    from brainfound.finetuning.tasks import resolve

    kept = options.work / f"{task}-unet-{fold}-{seed}-{seconds:.0f}.json"
    if not kept.is_file():
        torch.set_num_threads(1)
        store = Store.open(data)
        parts = Split.load(split).sessions(store, fold)
        target = resolve(store, parts["train"].tolist(), TARGETS[task], task)
        augmentation = recipe_of(task, options.ways[0], seed, options).augmentation
        net, steps = small_unet.train(store, parts["train"].tolist(), target, CONTRAST, augmentation, seconds, seed)
        scored = small_unet.score(net, store, parts["test"].tolist(), target, CONTRAST)
        read = _errors if task == "regression" else _dice_by_tissue
        keep(kept, {"steps": steps, "seconds": seconds} | read(scored.cases))
    return json.loads(kept.read_text(encoding="utf-8"))


def _errors(cases: Any) -> dict[str, Any]:
    """Of a table of cases the absolute error of every session, in years."""
    return {"rows": cases["row"].tolist(), "age": (cases["prediction"] - cases["truth"]).abs().tolist()}


def _dice_by_tissue(cases: Any) -> dict[str, Any]:
    """Of a table of cases Dice of every tissue of every session, and their mean, "all"."""
    answers = {name: cases[f"dice(label {number})"].tolist() for number, name in enumerate(TISSUES, start=1)}
    return {"rows": cases["row"].tolist(), "all": cases["dice"].tolist()} | answers


def judge(
    task: str,
    answers: Mapping[tuple[str, str, int], Mapping[str, Any]],
    cells: Sequence[tuple[str, int]],
    num_sessions: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Scores of each way, compared with the first: intervals and tests over subjects; each run is scored alone."""
    from brainfound.metrics.statistics import bootstrap_interval, holm, paired_permutation_test

    ways = list(dict.fromkeys(way for way, _, _ in answers))
    measures = ["age"] if task == "regression" else ["all", *TISSUES]
    values: dict[str, dict[str, np.ndarray]] = {}
    for way in ways:
        values[way] = {}
        for measure in measures:
            of_way = np.full((num_sessions, len(options.seeds)), np.nan)
            for fold, seed in cells:
                answer = answers[way, fold, seed]
                if measure in answer:
                    of_way[answer["rows"], options.seeds.index(seed)] = answer[measure]
            if not np.isnan(of_way).any():
                values[way][measure] = of_way

    def mean(found: np.ndarray) -> float:
        return float(found.mean())

    first, sign = ways[0], -1.0 if task == "regression" else 1.0
    scores: dict[str, Any] = {}
    tested = []
    for way, by_measure in values.items():
        scores[way] = {}
        for measure, of_way in by_measure.items():
            scores[way][measure] = {
                "mean": figure(mean(of_way)), "interval": ends_of(bootstrap_interval(mean, of_way, num_resamples=1000)),
                "runs": [figure(run) for run in of_way.mean(axis=0)],
            }  # fmt: skip
        if way != first and measures[0] in by_measure:
            ours, theirs = values[first][measures[0]], by_measure[measures[0]]
            gain = bootstrap_interval(lambda a, b: sign * (mean(a) - mean(b)), ours, theirs, num_resamples=1000)
            p = paired_permutation_test(ours, theirs, mean, options.permutations)
            scores[way]["gain of the first"] = {
                "mean": figure(gain.estimate),
                "interval": ends_of(gain),
                "p": figure(p),
            }
            tested.append(scores[way]["gain of the first"])
    for gain, adjusted in zip(tested, holm([gain["p"] for gain in tested]), strict=True):
        gain["p_holm"] = figure(float(adjusted))
    seconds = {
        way: figure(float(np.median([answers[way, fold, seed]["seconds"] for fold, seed in cells])))
        for way in ways
        if all("seconds" in answers[way, fold, seed] for fold, seed in cells)
    }
    steps = [answers[UNET, fold, seed]["steps"] for fold, seed in cells]
    return {"scores": scores, "processor_seconds": seconds, "unet_steps": [min(steps), max(steps)]}


def table(result: Mapping[str, Any]) -> str:
    """Scores and gains, as Markdown."""
    lines = []
    for task, found in result["tasks"].items():
        measures = ["age"] if task == "regression" else ["all", *TISSUES]
        shown = ["age, MAE in years"] if task == "regression" else ["Dice, mean of seven", *TISSUES]
        first = next(iter(found["scores"]))
        lines += ["", f"| {task} | {' | '.join(shown)} | gain of {first} (95 % interval), p by Holm |"]
        lines.append("|---" * (len(shown) + 2) + "|")
        for way, scores in found["scores"].items():
            cells = []
            for measure in measures:
                of = scores.get(measure)
                wide = measure == measures[0]
                ends = f" ({of['interval'][0]:.3g}–{of['interval'][1]:.3g})" if of and wide else ""
                cells.append(f"{of['mean']:.3g}{ends}" if of else "")
            gain = scores.get("gain of the first")
            gain_text = (
                f"{gain['mean']:+.3g} ({gain['interval'][0]:+.3g} to {gain['interval'][1]:+.3g}), "
                f"p = {gain['p_holm']:.2g}" if gain else ""
            )  # fmt: skip
            lines.append(f"| {way} | {' | '.join(cells)} | {gain_text} |")
        lines.append(f"\nprocessor seconds per run: {found['processor_seconds']}; U-Net steps {found['unet_steps']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
