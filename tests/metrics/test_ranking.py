"""The ranking rule on an example worked by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from brainfound.errors import UsageError
from brainfound.metrics.ranking import rank, task_ranks


def _scores(*rows):
    return pd.DataFrame(rows, columns=["system", "task", "metric", "value", "higher_is_better"])


@pytest.fixture
def example():
    """Three systems, three tasks; C did not enter the segmentation task.

    infarct (AUROC ↑):           A 0.80 → 1    B 0.70 → 2.5   C 0.70 → 2.5
    meningioma: Dice ↑           A 0.20 → 2    B 0.30 → 1     C –    → 3 (two are valid)
                NSD ↑            A 0.40 → 1    B 0.10 → 2     C –    → 3
                mean               1.5           1.5            3
    age: MAE ↓                   A 12 → 3      B 11 → 2       C 10 → 1
         r ↑                     A 0.5 → 2     B 0.6 → 1      C 0.4 → 3
                mean               2.5           1.5            2
    overall                      5/3           5.5/3          7.5/3
    """
    return _scores(
        ("A", "infarct", "auroc", 0.8, True),
        ("B", "infarct", "auroc", 0.7, True),
        ("C", "infarct", "auroc", 0.7, True),
        ("A", "meningioma", "dice", 0.2, True),
        ("B", "meningioma", "dice", 0.3, True),
        ("A", "meningioma", "nsd", 0.4, True),
        ("B", "meningioma", "nsd", 0.1, True),
        ("A", "age", "mae_years", 12.0, False),
        ("B", "age", "mae_years", 11.0, False),
        ("C", "age", "mae_years", 10.0, False),
        ("A", "age", "pearson", 0.5, True),
        ("B", "age", "pearson", 0.6, True),
        ("C", "age", "pearson", 0.4, True),
    )


def test_ranking_of_the_worked_example(example):
    ranking = rank(example)
    assert list(ranking.columns) == ["system", "overall_rank"]
    assert ranking["system"].tolist() == ["A", "B", "C"]
    assert ranking["overall_rank"].to_numpy() == pytest.approx([5 / 3, 5.5 / 3, 7.5 / 3])
    by_task = task_ranks(example)
    assert by_task.loc["C", "meningioma"] == 3
    assert by_task.loc["A"].to_dict() == {"infarct": 1, "meningioma": 1.5, "age": 2.5}


def test_order_of_rows_does_not_matter_and_nan_is_missing(example):
    with_nan = pd.concat(
        [example, _scores(("C", "meningioma", "dice", np.nan, True), ("C", "meningioma", "nsd", np.nan, True))]
    )
    shuffled = with_nan.sample(frac=1, random_state=3).reset_index(drop=True)
    pd.testing.assert_frame_equal(rank(shuffled), rank(example))


def test_a_missing_metric_ranks_after_those_that_have_it(example):
    partial = example.copy()
    partial.loc[(partial["system"] == "A") & (partial["metric"] == "pearson"), "value"] = np.nan
    # MAE: A 3, B 2, C 1. r: B 1, C 2, A 3 (two are valid).
    assert task_ranks(partial)["age"].to_dict() == {"A": 3.0, "B": 1.5, "C": 1.5}


def test_a_missing_task_counts_every_system_that_entered_it(example):
    partial = example[~((example["system"] == "B") & (example["metric"] == "nsd"))]
    # B lacks one metric but entered the task, so two systems are valid and C gets 3.
    assert task_ranks(partial)["meningioma"].to_dict() == {"A": 1.5, "B": 1.5, "C": 3.0}


def test_ties_are_sorted_by_name():
    ranking = rank(_scores(("b", "t", "m", 1, True), ("a", "t", "m", 1, True)))
    assert ranking["system"].tolist() == ["a", "b"]
    assert ranking["overall_rank"].tolist() == [1.5, 1.5]


def test_what_cannot_be_ranked_is_refused(example):
    with pytest.raises(UsageError, match="higher_is_better"):
        rank(example.drop(columns="higher_is_better"))
    with pytest.raises(UsageError, match="twice"):
        rank(pd.concat([example, example.iloc[:1]]))
    with pytest.raises(UsageError, match="two directions"):
        rank(example.assign(higher_is_better=[True] * 7 + [False, True] + [True] * 4))
    with pytest.raises(UsageError, match="not true or false"):
        rank(example.assign(higher_is_better=example["higher_is_better"].astype(str)))
    with pytest.raises(UsageError, match="not numbers"):
        rank(example.assign(value=example["value"].astype(str)))
    with pytest.raises(UsageError, match="nothing to rank"):
        rank(example.iloc[:0])
    with pytest.raises(UsageError, match="empty"):
        rank(example.assign(system=["A", None] + ["x"] * 11))


def test_the_rule_is_named_and_an_unknown_one_is_refused(example):
    pd.testing.assert_frame_equal(rank(example, rule="fomo25"), rank(example))
    with pytest.raises(UsageError, match="no ranking rule 'fomo26'.*fomo25"):
        rank(example, rule="fomo26")
