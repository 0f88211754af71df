"""How scores are printed."""

from __future__ import annotations

import numpy as np

from brainfound.cli.terminal import format_number, intervals_line, scores_line
from brainfound.metrics.registry import classification_scores, regression_scores


def test_a_number_that_is_not_defined_is_a_dash():
    assert format_number(None) == "–"
    assert format_number(0.12345) == "0.123"


def test_the_line_of_scores_has_the_headline_and_what_there_is_room_for():
    scores, trivial = regression_scores([1, 2, 3], [1, 2, 4]), regression_scores([1, 2, 3], [1.5, 1.5, 1.5])
    line = scores_line(
        {"task": "regression", "num_sessions": 3, "scores": scores, "trivial": trivial | {"pearson": None}}
    )
    assert line.startswith("regression, 3 sessions: mae 0.333 (trivial 0.833), r2 ")
    assert line.endswith("(trivial –)")
    assert "rmse" not in line


def test_the_line_of_a_classification():
    scores = classification_scores([0, 1], np.eye(2))
    line = scores_line({"task": "classification", "num_sessions": 2, "scores": scores, "trivial": {}})
    assert line == "classification, 2 sessions: auroc 1.000 (trivial –), balanced_accuracy 1.000 (trivial –)"


def test_intervals_and_the_frozen_baseline_stand_in_the_line():
    ends = {
        "mae": {"low": 2.5, "high": 3.75, "num_subjects": 12},
        "r2": {"low": None, "high": None, "num_subjects": 12},
    }
    result = {
        "task": "regression",
        "num_sessions": 14,
        "scores": {"mae": 3.0, "r2": 0.5},
        "trivial": {"mae": 9.0, "r2": 0.0},
        "frozen": {"mae": 4.0, "r2": 0.25},
        "intervals": {"confidence": 0.95, "num_resamples": 2000, "scores": ends},
    }
    assert scores_line(result) == (
        "regression, 14 sessions: mae 3.000 [2.500, 3.750] (trivial 9.000, frozen 4.000), "
        "r2 0.500 (trivial 0.000, frozen 0.250)"
    )
    line = intervals_line([result])
    assert line.startswith("[…]: 95% interval, bootstrap over 12 subjects, 2000 resamples")
    assert "too few" in line
    assert line.endswith("; no interval where many resamples leave the score undefined")
    ends["mae"]["num_subjects"] = ends["r2"]["num_subjects"] = 20
    enough = intervals_line([result])
    assert enough.startswith("[…]: 95% interval, bootstrap over 20 subjects")
    assert "too few" not in enough
    assert intervals_line([{"scores": {}}]) is None


def test_a_missing_interval_has_its_reason():
    ends = {"low": None, "high": None, "num_subjects": 1}
    result = {
        "task": "regression",
        "num_sessions": 2,
        "scores": {"mae": 3.25},
        "trivial": {},
        "intervals": {"confidence": 0.9, "num_resamples": 2000, "scores": {"mae": ends}},
    }
    assert scores_line(result) == "regression, 2 sessions: mae 3.250 (trivial –)"
    assert intervals_line([result]) == "no 90% interval of 1 subject: it needs 10 or more"
    ends |= {"num_subjects": 12}
    more = result | {
        "intervals": result["intervals"] | {"scores": {"mae": {"low": 1.0, "high": 2.0, "num_subjects": 11}}}
    }
    assert intervals_line([result, more]) == (
        "[…]: 90% interval, bootstrap over 11 subjects, 2000 resamples; fewer than 20 are too few to trust it; "
        "no interval where many resamples leave the score undefined"
    )
