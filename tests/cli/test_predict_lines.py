"""The line that `brainfound predict` prints of a session."""

from __future__ import annotations

import pytest

from brainfound.cli.predict import _summary
from brainfound.inference.prediction import Prediction


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ({"target": "age_years", "value": 61.234}, "age_years 61.23 (without FLAIR)"),
        (
            {"target": "age_years", "value": 61.234, "interval": {"low": 50.0, "high": 72.5, "confidence": 0.9}},
            "age_years 61.23 [50.00, 72.50] (without FLAIR)",
        ),
        ({"target": "edema,lesion", "present": ["edema", "lesion"]}, "edema, lesion (without FLAIR)"),
        ({"target": "edema,lesion", "present": []}, "none of edema,lesion (without FLAIR)"),
        ({"class": "ill", "probabilities": {"ill": 0.75, "well": 0.25}}, "ill 0.75 (without FLAIR)"),
    ],
)
def test_an_answer_is_one_line(answer, line):
    prediction = Prediction("any", answer, contrasts=("T1w",), missing=("FLAIR",))
    assert _summary(prediction) == line
