"""Age and sex in two cohorts of real brains: `finetune auto` on frozen features against every single candidate.

    python benchmarks/two_cohorts.py --cohorts FOLDER FOLDER --model MODEL --work FOLDER --out results.json

Each cohort is a folder with a manifest.tsv of T1w scans, ages and sexes. Three questions, all with linear candidates:

    repeated    repeated splits by subject, 70 % to learn from: auto, its candidates, the frozen baseline, trivial
    external    learn from one cohort, test on the other, both ways
    few         repeated splits with 10, 20 and all learning subjects (of each sex alike)

Features are computed once and kept in --work. The errors of repeated splits are not independent: intervals are those of
Nadeau and Bengio, "Inference for the generalization error", Machine Learning 2003. Nothing is tuned on a test part.

Axes: N subjects, R head outputs, T statistics, L blocks of the backbone, D width.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rounds import figure, machine_facts, say, use_one_thread

CONTRAST, TARGETS = "T1w", ("age_years", "sex")
AUTO, FROZEN, TRIVIAL = "auto", "penalised-cls-mean", "trivial"
TEST_SHARE, INNER_FOLDS = 0.3, 5


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohorts", nargs=2, type=Path, required=True, help="folders with a manifest.tsv")
    parser.add_argument("--model", required=True, help="a ViT or an export of BrainFound")
    parser.add_argument("--work", type=Path, required=True, help="folder for stores and features; kept and reused")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--picture", type=Path, help="file for the curves over the number of subjects, PNG")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first split")
    parser.add_argument("--slices", type=int, default=24, help="per volume")
    parser.add_argument("--few", nargs="+", type=int, default=[10, 20], help="numbers of learning subjects")
    parser.add_argument("--spacing-mm", type=float, default=2.0)
    parser.add_argument("--size", type=int, default=112, help="pixels of a slice's side")
    return parser.parse_args(arguments)


class Data:
    """The frozen features (N T L 2 D) and the labels of a cohort."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        from brainfound import Cohort, prepare
        from brainfound.data.preprocessing.settings import Preprocessing
        from brainfound.data.store import Store
        from brainfound.finetuning.auto.features import volume_features
        from brainfound.finetuning.embedding_cache import EmbeddingCache
        from brainfound.models import BrainFoundModel
        from brainfound.models.configuration import evenly_spaced_layers
        from brainfound.models.loading import load_initial_model, read_backbone_config

        self.name, path = folder.name, options.work / folder.name
        own = {"contrasts": (CONTRAST,), "size": (options.size,) * 2, "spacing_mm": (options.spacing_mm,) * 3}
        if not path.is_dir():
            prepare(Cohort.read(folder), path, Preprocessing(**own))
        self.store = Store.open(path)
        depth = int(read_backbone_config(options.model, self.store.contrasts).num_hidden_layers)
        fields = {"slice_features": "cls_and_patches", "feature_layers": evenly_spaced_layers(depth)}
        model = load_initial_model(BrainFoundModel, options.model, self.store.contrasts, aggregator="mean", **fields)
        cache = EmbeddingCache(model, self.store, options.work / "embeddings", options.slices)
        sessions = list(range(len(self.store)))
        cache.ensure_embedded(sessions)
        self.features = volume_features(cache, sessions)

    def task(self, target: str, learn: np.ndarray) -> Any:
        from brainfound.finetuning.tasks import AutoTaskRecipe, TargetColumn, resolve

        return resolve(self.store, learn.tolist(), TargetColumn.find(self.store, target), AutoTaskRecipe())

    def labels(self, target: str) -> list[Any]:
        return self.store.covariate(target).tolist()


def strata(labels: list[Any]) -> list[Any]:
    """Sexes as they are; ages above or below their median."""
    if isinstance(labels[0], str):
        return labels
    return [bool(label > np.median(labels)) for label in labels]


def learn_all(features: np.ndarray, values: np.ndarray, labels: list[Any], task: Any, seed: int) -> dict[str, Any]:
    """Every candidate fitted to all subjects, and `auto`, chosen by inner folds: name → its linear model."""
    from brainfound.data.splits import dividing
    from brainfound.finetuning.auto.features import LinearModel
    from brainfound.finetuning.auto.judge import TRIVIAL as CONSTANT
    from brainfound.finetuning.auto.judge import Judge
    from brainfound.finetuning.auto.linear import fit_candidate, trivial_scores
    from brainfound.finetuning.auto.recipe import LinearRecipe
    from brainfound.finetuning.tasks import Regression

    subjects = np.arange(len(values))
    candidates = [
        one for one in LinearRecipe().candidates() if one.method == "penalised" or isinstance(task, Regression)
    ]
    names = [one.name for one in candidates]
    folds = dividing.k_folds(
        [str(subject) for subject in subjects], min(INNER_FOLDS, len(values) // 2), seed, {"label": strata(labels)}
    )
    judge = Judge(task, values, subjects, [[(part["train"], part["test"]) for part in folds]])
    for name in (CONSTANT, *names):
        judge.results[name] = judge.new_result(len(trivial_scores(task, values)))
    for train, test in judge.repeats[0]:
        judge.results[CONSTANT].scores[0, test] = trivial_scores(task, values[train])
        for one in candidates:
            fitted = fit_candidate(one, features[train], values[train], subjects[train], task)
            judge.results[one.name].scores[0, test] = fitted.scores(features[test])
    judge.add_average(names)
    choice = judge.choose(names)
    models = {one.name: fit_candidate(one, features, values, subjects, task) for one in candidates}
    models[TRIVIAL] = LinearModel.constant(trivial_scores(task, values), features)
    mixed = [(models[name], weight) for name, weight in choice.weights.items()]
    models[AUTO] = LinearModel.combine(*zip(*mixed, strict=True)) if mixed else models[TRIVIAL]
    return models


def score(
    models: Mapping[str, Any], task: Any, features: np.ndarray, values: np.ndarray
) -> dict[str, dict[str, float]]:
    """Name → metric → value on test subjects."""
    from brainfound.finetuning.auto.linear import as_answer

    found = {}
    for name, model in models.items():
        answers = [as_answer(task, row) for row in model.scores(features)]
        found[name] = task.compute_scores(values.tolist(), answers)
    return found


def divide(labels: list[Any], seed: int, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Places of the learning subjects (``count`` of them, None for all) and of the test subjects."""
    from brainfound.data.splits import dividing

    names = [str(place) for place in range(len(labels))]
    parts = dividing.split_by_subject(
        names, {"learn": 1 - TEST_SHARE, "test": TEST_SHARE}, seed, {"label": strata(labels)}
    )
    learn = np.random.default_rng(seed).permutation(parts["learn"])
    if count is not None:
        kinds = np.array(strata(labels), dtype=object)[learn]
        place = {kind: np.cumsum(kinds == kind) for kind in dict.fromkeys(kinds)}
        order = np.argsort([place[kind][k] for k, kind in enumerate(kinds)], kind="stable")
        learn = learn[order][:count]
    return np.sort(learn), parts["test"]


def repeat(data: Data, target: str, seeds: Iterable[int], count: int | None, kept: Path) -> list[dict[str, Any]]:
    """The scores of each split, kept in a file."""
    found = json.loads(kept.read_text()) if kept.is_file() else []
    known = {row["seed"] for row in found}
    labels = data.labels(target)
    for seed in seeds:
        if seed in known:
            continue
        learn, test = divide(labels, seed, count)
        task = data.task(target, learn)
        own = [labels[place] for place in learn]
        models = learn_all(data.features[learn], task.values(data.store, learn.tolist()), own, task, seed)
        scores = score(models, task, data.features[test], task.values(data.store, test.tolist()))
        found.append({"seed": seed, "num_learn": len(learn), "num_test": len(test), "scores": scores})
        kept.write_text(json.dumps(found))
    return [row for row in found if row["seed"] in set(seeds)]


def difference(rows: list[dict[str, Any]], metric: str, name: str, other: str) -> list[float]:
    """Mean over splits of one system's score minus another's, with the ends of its 95 % interval."""
    from scipy.stats import t

    values = np.array([row["scores"][name][metric] - row["scores"][other][metric] for row in rows])
    share = rows[0]["num_test"] / rows[0]["num_learn"]
    error = np.sqrt(values.var(ddof=1) * (1 / len(values) + share))
    reach = t.ppf(0.975, len(values) - 1) * error
    return [figure(value) for value in (values.mean(), values.mean() - reach, values.mean() + reach)]


def summarise(rows: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Means over splits, and what auto gains on the frozen, the trivial and the best single candidate in hindsight."""
    totals: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, scores in row["scores"].items():
            totals[name].append(scores[metric])
    means = {name: figure(float(np.mean(values))) for name, values in totals.items()}
    best = (min if metric in ("mae", "log_loss") else max)(set(means) - {AUTO, TRIVIAL}, key=lambda name: means[name])
    own = {"num_splits": len(rows), "num_learn": rows[0]["num_learn"], "best in hindsight": best, "means": means}
    for other in (FROZEN, TRIVIAL, best):
        own[f"auto minus {other}"] = difference(rows, metric, AUTO, other)
    return own


def external(source: Data, other: Data, target: str) -> dict[str, Any]:
    """Learn from all of one cohort, test on the other."""
    labels = source.labels(target)
    everybody = np.arange(len(labels))
    task = source.task(target, everybody)
    models = learn_all(source.features, task.values(source.store, everybody.tolist()), labels, task, 0)
    values = task.values(other.store, list(range(len(other.store))))
    scores = score(models, task, other.features, values)
    return {name: scores[name] for name in (AUTO, FROZEN, TRIVIAL)}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """The score over the number of learning subjects, a panel per target and cohort."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {**results["few"], **results["repeated"]}
    panels = [name.removesuffix(", all") for name in results["repeated"] if ", log_loss," not in name]
    figure = Figure(figsize=(8, 5.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    styles = {AUTO: ("#0072B2", "-"), FROZEN: ("#D55E00", "--"), TRIVIAL: ("#777777", ":")}
    for axes, panel in zip(figure.subplots(2, 2).flat, panels, strict=True):
        own = sorted((row for name, row in rows.items() if name.startswith(panel)), key=lambda row: row["num_learn"])
        counts = [row["num_learn"] for row in own]
        for name, (colour, style) in styles.items():
            label = {FROZEN: "linear on frozen features", TRIVIAL: "the same for everybody"}.get(name, name)
            axes.plot(counts, [row["means"][name] for row in own], style, color=colour, marker="o", label=label)
        axes.set_title(panel.rpartition(",")[0], fontsize=9)
        axes.set(xlabel="learning subjects", ylabel="MAE, years" if "mae" in panel else "AUROC", xticks=counts)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    use_one_thread(offline=True)
    import torch

    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine_facts(), "repeated": {}, "external": {}, "few": {}}
    cohorts = [Data(folder, options) for folder in options.cohorts]
    seeds = range(options.first_seed, options.first_seed + options.splits)
    for target in TARGETS:
        metrics = ("mae",) if target == "age_years" else ("auroc", "log_loss")
        for data, other in zip(cohorts, reversed(cohorts), strict=True):
            say(f"{target} of {data.name}")
            for count in (None, *options.few):
                kept = options.work / f"{data.name}-{target}-{count or 'all'}.json"
                rows = repeat(data, target, seeds, count, kept)
                place = results["repeated" if count is None else "few"]
                for metric in metrics:
                    place[f"{target} of {data.name}, {metric}, {count or 'all'}"] = summarise(rows, metric)
            results["external"][f"{target}: from {data.name} to {other.name}"] = external(data, other, target)
    print(json.dumps(results, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.picture is not None:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
