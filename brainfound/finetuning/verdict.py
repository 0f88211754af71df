"""The verdict on a fine-tuned model: whether it is any good, in words for a reader who does not know the metrics.

The model is compared, on the same test subjects, with a linear model on the frozen features and with the answer that
is the same for everybody. A difference counts as clear where its bootstrap interval over subjects excludes 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from brainfound.finetuning.best_step import BestStep
from brainfound.finetuning.scoring import SessionScores
from brainfound.finetuning.tasks import Task, VolumeTask
from brainfound.metrics.comparison import compare
from brainfound.metrics.registry import METRICS, PRIMARY_METRIC, format_score

MIN_SPREAD = 0.25
"""Share of the labels' standard deviation below which a regression's answers count as collapsed."""
MIN_PROBABILITY_SPREAD = 0.03
"""Standard deviation of a probability over subjects below which a classification's answers count as collapsed."""
MIN_MARKED = 0.1
"""Share of the sessions with a structure below which, if any of them is marked at all, a segmentation has collapsed."""
MAX_WORSENING = 0.1
"""Share of the best validation score by which the last one may be worse without a remark."""

_FROZEN, _TRIVIAL = "a linear model on the frozen features", "the same answer for everybody"
INNER_FOLDS = "inner folds"
"""Stands for a part where out-of-fold answers are scored."""
_SUBJECTS = {INNER_FOLDS: "subjects left out in turn"}
_METRIC_WORDS = {"mae": "mean error", "auroc": "AUROC", "dice": "Dice"}


class Verdict(NamedTuple):
    """Whether a model is better than its baselines."""

    label: Literal["better", "unclear", "not better", "collapsed"]
    """better: clearly better than every baseline. unclear: better, but the difference may be chance. not better: some
    baseline is as good or better. collapsed: all subjects get nearly the same answer."""
    text: str
    """One line."""


class _Baseline(NamedTuple):
    name: str
    score: float
    is_clear: bool
    """Whether the difference from the model is more than chance."""


def judge(
    task: Task, tested: SessionScores, frozen: SessionScores | None, best: BestStep | None, part: str = "test"
) -> Verdict:
    """Compare a model's answers on the test part with those of its baselines.

    Args:
        tested: the model's scores on the test part, or on another part by which the model was chosen.
        frozen: those of the frozen baseline on the same sessions, if it was fitted.
        best: the validation scores of the run, if it evaluated.
        part: the part that was scored.
    """
    metric = METRICS[PRIMARY_METRIC[task.kind]]
    score, baselines = tested.scores[metric.name], _find_baselines(task, metric.name, tested, frozen)
    collapse = _describe_collapse(task, tested.cases)
    as_good = [baseline for baseline in baselines if metric.drop(score, baseline.score) <= 0]
    if collapse:
        label, lead = "collapsed", "Do not use this model"
    elif not np.isfinite(score) or not baselines:
        label, lead = "unclear", "Not comparable with a baseline"
    elif as_good:
        worst = as_good[-1]
        relation = "Clearly worse than" if worst.is_clear else "Not better than"
        label, lead = "not better", f"{relation} {worst.name}"
    elif all(baseline.is_clear for baseline in baselines):
        label, lead = "better", "Clearly better than its baselines"
    else:
        label, lead = "unclear", "Better than its baselines, but the difference may be chance"
    count = tested.cases["subject"].nunique()
    who = _SUBJECTS.get(part, f"{part} subjects")
    measured = f"{_METRIC_WORDS[metric.name]} {format_score(metric.name, score)} on {count} {who}"
    for baseline in baselines:
        measured += f"; {baseline.name} {format_score(metric.name, baseline.score)}"
    untested = None if part == "test" else "These subjects took part in choosing it: test it on another cohort"
    sentences = [f"{lead}: {measured}", collapse, _describe_worsening(best), untested]
    return Verdict(label, " ".join(f"{sentence}." for sentence in sentences if sentence))  # type: ignore[arg-type]


def _find_baselines(task: Task, metric: str, tested: SessionScores, frozen: SessionScores | None) -> list[_Baseline]:
    """The baselines that have a score, the frozen one first."""
    found = []
    if frozen is not None:
        found.append((_FROZEN, frozen.scores[metric], frozen.cases))
    answer = task.trivial_answer() if isinstance(task, VolumeTask) else None
    cases = None if answer is None else tested.cases.assign(**task.answer_columns(answer))  # type: ignore[attr-defined]
    found.append((_TRIVIAL if isinstance(task, VolumeTask) else "the whole head", tested.trivial[metric], cases))
    return [
        _Baseline(name, score, cases is not None and _is_clear(tested.cases, cases, metric))
        for name, score, cases in found
        if np.isfinite(score)
    ]


def _is_clear(cases: pd.DataFrame, others: pd.DataFrame, metric: str) -> bool:
    """Whether the interval of the difference excludes 0; without an interval it is not clear."""
    row = compare({"model": cases, "baseline": others}, "baseline", [metric]).iloc[1]
    return bool(row["difference_low"] > 0 or row["difference_high"] < 0)


def _describe_collapse(task: Task, cases: pd.DataFrame) -> str | None:
    """How the answers have collapsed, if they have; None for fewer than three sessions."""
    if len(cases) < 3:
        return None
    if "prediction" in cases:
        spread, labels = float(cases["prediction"].std()), float(cases["truth"].std())
        if spread < MIN_SPREAD * labels:
            return (
                f"All subjects get nearly the same {task.column}: answers have a standard deviation of {spread:.3g}, "
                f"labels of {labels:.3g}"
            )
    elif probabilities := [column for column in cases if column.startswith("p(")]:
        spread = float(cases[probabilities].std().max())
        if spread < MIN_PROBABILITY_SPREAD:
            return f"All subjects get nearly the same probabilities: their standard deviation is {spread:.2g}"
    elif "predicted_pixels" in cases:
        marked = cases["predicted_pixels"][cases["reference_pixels"] > 0] > 0
        if len(marked) and marked.mean() < MIN_MARKED:
            return f"Nothing is marked in {int((~marked).sum())} of the {len(marked)} sessions that have the structure"
    return None


def _describe_worsening(best: BestStep | None) -> str | None:
    if best is None or best.worsening <= MAX_WORSENING:
        return None
    return f"Training made it worse, so an earlier step is exported: {best.describe()}"
