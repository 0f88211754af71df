"""How scores are printed."""

from __future__ import annotations

import numpy as np

from brainfound.cli.tables import number, scores_line
from brainfound.evaluate.scores import classification_scores, regression_scores, trivial_scores


def test_a_number_that_is_not_defined_is_a_dash():
    assert number(None) == "–"
    assert number(0.12345) == "0.123"


def test_the_line_of_scores_has_the_headline_and_what_there_is_room_for():
    scores, trivial = regression_scores([1, 2, 3], [1, 2, 4]), trivial_scores("regression", [1, 2], [1, 2, 3])
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
