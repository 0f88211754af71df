"""Ranking of systems over tasks by the rule of the FOMO25 challenge.

Each metric ranks the systems, best first; ties share the mean of their ranks. The rank of a task is the mean over its
metrics, and the overall rank is the mean over the tasks. A system without a score for a task gets the rank after all
systems that have one, N_valid + 1. Source: derived from the organisers' published tables.
"""

from __future__ import annotations

import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from brainfound.errors import UsageError

RULES = ("fomo25",)
_KEY = ["system", "task", "metric"]
_COLUMNS = (*_KEY, "value", "higher_is_better")


def rank(scores: pd.DataFrame, rule: str = "fomo25") -> pd.DataFrame:
    """Rank systems over tasks, best first.

    Args:
        scores: one row per system, task and metric, with columns system, task, metric, value,
            higher_is_better. A value of ``nan`` is a missing score, as is a missing row.
        rule: the challenge whose rule applies, ``"fomo25"``.

    Returns:
        Columns system and overall_rank (1 is best, smaller is better), sorted by rank, then by name.

    Raises:
        UsageError: the rule is unknown, a column is missing, a score is given twice, or a metric has two directions.
    """
    if rule not in RULES:
        raise UsageError(f"no ranking rule {rule!r}", where="rule", expected=", ".join(RULES))
    overall = task_ranks(scores).mean(axis=1).rename("overall_rank").reset_index()
    return overall.sort_values(["overall_rank", "system"], kind="stable", ignore_index=True)


def task_ranks(scores: pd.DataFrame) -> pd.DataFrame:
    """Rank per system (rows) and task (columns), by the rule of FOMO25: the mean over the task's metrics.

    A system without any score of a task gets N_valid + 1, where N_valid systems have at least one. A system that lacks
    some of a task's metrics gets, for each of them, the rank after all systems that have it. Raises as `rank`.
    """
    _check(scores)
    systems = pd.Index(scores["system"].unique(), name="system")
    columns = {task: _ranks_of_task(of_task, systems) for task, of_task in scores.groupby("task", sort=False)}
    return pd.DataFrame(columns, index=systems).rename_axis(columns="task")


def _ranks_of_task(scores: pd.DataFrame, systems: pd.Index) -> pd.Series:
    ranks = {}
    for metric, of_metric in scores.groupby("metric", sort=False):
        values = of_metric.set_index("system")["value"].dropna().astype(float)
        ascending = not bool(of_metric["higher_is_better"].iloc[0])
        ranks[metric] = values.rank(ascending=ascending).reindex(systems, fill_value=len(values) + 1)
    mean = pd.DataFrame(ranks, index=systems).mean(axis=1)
    entered = systems.isin(scores.loc[scores["value"].notna(), "system"])
    return mean.where(entered, entered.sum() + 1)


def _check(scores: pd.DataFrame) -> None:
    if missing := [column for column in _COLUMNS if column not in scores.columns]:
        raise UsageError("a column is missing", where="scores", got=list(scores.columns), expected=", ".join(missing))
    if scores.empty:
        raise UsageError("there is nothing to rank", where="scores", got="no rows")
    if unnamed := [column for column in (*_KEY, "higher_is_better") if scores[column].isna().any()]:
        raise UsageError("a cell is empty", where=f"scores: {unnamed[0]}", remedy="Fill it; only value may be missing")
    if not is_numeric_dtype(scores["value"]) and not scores["value"].isna().all():
        raise UsageError("values are not numbers", where="scores: value", got=scores["value"].dtype)
    # A column of text "False" would count as true.
    if not is_bool_dtype(scores["higher_is_better"]) and not scores["higher_is_better"].isin([True, False]).all():
        got = scores["higher_is_better"].unique()[:4].tolist()
        raise UsageError("not true or false", where="scores: higher_is_better", got=got)
    if (twice := scores.duplicated(_KEY)).any():
        first = scores.loc[twice, _KEY].iloc[0].tolist()
        remedy = "Keep one row per system, task and metric"
        raise UsageError("a score is given twice", where="scores", got=first, remedy=remedy)
    directions = scores.groupby(["task", "metric"], sort=False)["higher_is_better"].nunique()
    if (directions > 1).any():
        raise UsageError("a metric has two directions", where="scores: higher_is_better", got=directions.idxmax())
