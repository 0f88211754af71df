"""Which contrasts does a task need, and does withholding some in training help where some are missing?

    python benchmarks/partial_input.py --work FOLDER --out results.json

Models are trained on simulated subjects of two sites, with and without contrast dropout, with several seeds; subjects
of a third site are scored with every non-empty subset of the contrasts. `shifted_runs.py` explains how runs are made.

Axes: N subjects, R runs (seeds), U subsets of the contrasts that lack one or more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rounds import ends_of, figure, keep
from shifted_runs import TASKS, Ways, finish, metric_of, recipe_of, run, shared_options, subject_values

WITH, WITHOUT = "contrast dropout", "none"
GAIN = "dropout over none, a contrast missing"


def main(arguments: list[str] | None = None) -> None:
    parser = shared_options(__doc__)
    parser.add_argument("--dropout", type=float, default=0.4, help="how often a contrast is withheld in training")
    options = parser.parse_args(arguments)
    print(table(finish(options, lambda: measure(options))))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    result = run(options, ways(options), train_and_score_subsets)
    return {"tasks": judge(result.pop("found"), options.permutations)} | result


def ways(options: argparse.Namespace) -> Ways:
    """The recipes with and without contrast dropout."""
    return {
        name: partial(recipe_of, options=options, changes=[f"augmentation.contrast_dropout={dropout}"])
        for name, dropout in ((WITH, options.dropout), (WITHOUT, 0.0))
    }


def train_and_score_subsets(
    recipe: Any, learnt: Path, scored: Path, model: str, target: str, folder: Path
) -> dict[str, Any]:
    """One fine-tuning, and its answers at the other site for every subset; read where they are there already."""
    import torch

    import brainfound
    from brainfound.data.store import Store
    from brainfound.experiments.systems import non_empty_subsets
    from brainfound.finetuning.finetune import finetune
    from brainfound.finetuning.scoring import score_sessions

    torch.set_num_threads(1)
    kept = folder / "subsets.json"
    if not kept.is_file():
        finetune(recipe, learnt, model, target, folder, resume=(folder / "recipe.yaml").is_file(), quiet=True)
        store, predictor = Store.open(scored), brainfound.load(folder)
        answers = {}
        for subset in non_empty_subsets(store.contrasts):
            absent = [contrast for contrast in store.contrasts if contrast not in subset]
            found = score_sessions(
                predictor.model, store, range(len(store)), predictor.target, predictor.num_slices, absent
            )
            cases = found.cases.drop(columns=["subject", "session"]).to_dict("list")
            answers["+".join(subset)] = {"trivial": found.headline[2], "cases": cases}
        keep(kept, answers)
    return json.loads(kept.read_text(encoding="utf-8"))


def judge(
    found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], permutations: int, resamples: int = 1000
) -> dict[str, Any]:
    """Of each task: the score of every subset both ways, its gain over the trivial answer, and dropout over none.

    The last is the mean gain over all subsets that lack a contrast; the test exchanges both ways within subjects, all
    subsets and seeds of a subject together. Holm's correction is over the tasks.
    """
    from brainfound.metrics.statistics import bootstrap_interval, holm, paired_permutation_test

    judged: dict[str, Any] = {}
    for task, by_way in found.items():
        sign = 1.0 if TASKS[task].higher_is_better else -1.0
        subsets = list(by_way[WITH][0])
        of_task = metric_of(task)
        scores: dict[str, Any] = {}
        values: dict[str, dict[str, np.ndarray]] = {}
        for subset in subsets:
            truth, values[subset] = subject_values(
                task, {way: [r[subset] for r in runs] for way, runs in by_way.items()}
            )
            trivial = by_way[WITH][0][subset]["trivial"]
            scores[subset] = {"trivial": figure(trivial)}
            for way, of_runs in values[subset].items():
                interval = bootstrap_interval(of_task, truth, of_runs, num_resamples=resamples)
                gain = sorted(sign * (end - trivial) for end in (interval.low, interval.high))
                scores[subset][way] = {
                    "mean": figure(interval.estimate), "interval": ends_of(interval),
                    "gain_over_trivial": [figure(sign * (interval.estimate - trivial)), *map(figure, gain)],
                }  # fmt: skip
        full = subsets[0]
        partial = [subset for subset in subsets if subset != full]

        def over_subsets(truth: np.ndarray, stacked: np.ndarray, of_task: Any = of_task) -> float:
            return float(np.mean([of_task(truth, stacked[:, place]) for place in range(stacked.shape[1])]))

        after, before = (np.stack([values[subset][way] for subset in partial], axis=1) for way in (WITH, WITHOUT))
        interval = bootstrap_interval(
            lambda labels, a, b, sign=sign: sign * (over_subsets(labels, a) - over_subsets(labels, b)),
            truth, after, before, num_resamples=resamples,
        )  # fmt: skip
        p = paired_permutation_test(after, before, lambda x, truth=truth: over_subsets(truth, x), permutations)
        judged[task] = {
            "measure": TASKS[task].measure, "scores": scores,
            GAIN: {
                "gain": figure(interval.estimate), "interval": ends_of(interval), "p": figure(p),
            },
        }  # fmt: skip
    tests = [of[GAIN] for of in judged.values()]
    for test, adjusted in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = figure(float(adjusted))
    return judged


def table(result: Mapping[str, Any]) -> str:
    """Scores of every subset, and what dropout gains, as Markdown."""
    lines = []
    for of_task in result["tasks"].values():
        lines += ["", f"| {of_task['measure']} | {WITH} | its gain over no image | {WITHOUT} | its gain |",
                  "|---|---|---|---|---|"]  # fmt: skip
        for subset, of in of_task["scores"].items():
            cells = []
            for way in (WITH, WITHOUT):
                low, high = of[way]["interval"]
                gain, least, most = of[way]["gain_over_trivial"]
                cells += [f"{of[way]['mean']:.3g} ({low:.3g}–{high:.3g})", f"{gain:+.3g} ({least:+.3g} to {most:+.3g})"]
            lines.append(f"| {subset} | {' | '.join(cells)} |")
        test = of_task[GAIN]
        low, high = test["interval"]
        lines.append(f"\n{WITH} over {WITHOUT}, mean of subsets that lack a contrast: {test['gain']:+.3g} "
                     f"({low:+.3g} to {high:+.3g}), p = {test['p']:.2g}, Holm {test['p_holm']:.2g}")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
