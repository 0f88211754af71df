"""A new metric is a function and a row of the registry: scores, tables, comparisons, pages and curves follow."""

from __future__ import annotations

from pathlib import Path

FUNCTION = '''

def median_error(target: Any, prediction: Any) -> float:
    """Median absolute error."""
    expected, predicted = value_pair(target, prediction)
    return float(np.median(np.abs(expected - predicted)))
'''
ROW = (
    '    Metric("median_error", median_error, "regression", ("values",), False, unit="target", format=".1f",\n'
    "           in_tables=True),\n"
)
MASK_FUNCTION = '''

def extent_error_mm(prediction: Any, reference: Any, spacing_mm: Sequence[float]) -> float:
    """Difference of the extents along the first axis."""
    predicted, expected = mask_pair(prediction, reference)
    extents = [np.ptp(np.flatnonzero(mask.any(axis=(1, 2)))) if mask.any() else 0 for mask in (predicted, expected)]
    return float(abs(extents[0] - extents[1]) * spacing_mm[0])
'''
MASK_ROW = (
    '    Metric("extent_error_mm", extent_error_mm, "segmentation", ("masks", "spacing_mm"), False, unit="mm",\n'
    "           in_tables=True),\n"
)
PROGRAM = """
import json, sys
import numpy as np
import pandas as pd
from pathlib import Path

import brainfound
from brainfound import metrics
from brainfound.cli.terminal import scores_line
from brainfound.experiments.folder import SCHEMA
from brainfound.experiments.page import write_experiment_page
from brainfound.experiments.folder import summarise_runs, to_json_records
from brainfound.metrics.registry import mean_case_scores, regression_scores, segmentation_case_scores
from brainfound.report.curves import _best

assert brainfound.__file__.startswith(sys.argv[1]), brainfound.__file__
assert metrics.median_error([1, 2, 3], [1, 2, 9]) == 0 and "median_error" in metrics.__all__
# scores.json
scores = regression_scores([1, 2, 3], [2, 4, 6])
assert scores["median_error"] == 2
mask = np.zeros((6, 4, 4), dtype=int)
mask[1:4] = 1
assert segmentation_case_scores(mask, mask[::2].repeat(2, axis=0), (2, 1, 1))["extent_error_mm"] == 2
# The table on a terminal, in the format of the row.
result = {"task": "regression", "num_sessions": 3, "scores": scores, "trivial": scores}
assert "median_error 2.0 (trivial 2.0)" in scores_line(result), scores_line(result)
# Intervals and comparison.
truth = np.arange(20.0)
near, far = (
    pd.DataFrame({"subject": range(20), "row": range(20), "truth": truth, "prediction": truth + error})
    for error in (1, 5)
)
found = metrics.compare({"far": far, "near": near}, "far", num_resamples=20, num_permutations=20)
row = found[(found["metric"] == "median_error") & (found["system"] == "near")].iloc[0]
assert row["difference"] == -4 and not row["higher_is_better"]
masks = pd.DataFrame({"subject": range(20), "row": range(20), "dice": 0.5, "extent_error_mm": 2.0})
assert "extent_error_mm" in set(metrics.score_intervals(masks, num_resamples=20)["metric"])
# The page of an experiment.
runs = pd.DataFrame([
    {"group": "all folds", "fold": f"fold-{k}", "seed": 0, "num_train": 20, "num_test": 10, **scores,
     **{f"trivial {name}": value for name, value in scores.items()}} for k in (1, 2)
])
folder = Path(sys.argv[1])
runs.to_csv(folder / "scores.tsv", sep="\\t", index=False)
(folder / "summary.json").write_text(json.dumps({
    "schema": SCHEMA, "kind": "repeated", "target": "age_years", "task": "regression", "headline": "mae",
    "recipe": {}, "systems": [{"name": "", "model": "m", "adapter": "full", "overrides": [], "contrasts": None}],
    "seeds": [0], "data": {"data_hash": "ab", "num_sessions": 20, "num_subjects": 20, "contrasts": {"T1w": 20}},
    "split": {"kind": "k-fold", "sha256": "cd", "num_folds": 2, "seed": 0}, "num_planned": 2, "num_runs": 2,
    "versions": {}, "baselines": ["trivial"], "scores": to_json_records(summarise_runs(runs)),
}))
page = write_experiment_page(folder).read_text()
assert "| all folds | median_error | 2.0 |" in page and "median_error: lower is better." in page, page
# The curves of a run.
assert _best("validation/median_error") == "lowest"
"""


def add(file: Path, function: str) -> None:
    file.write_text(file.read_text() + function)


def test_a_function_and_a_row_are_all_that_a_new_metric_needs(package_copy, run_on_copy, tmp_path):
    add(package_copy / "metrics" / "regression.py", FUNCTION)
    add(package_copy / "metrics" / "segmentation.py", MASK_FUNCTION)
    registry = package_copy / "metrics" / "registry.py"
    text = registry.read_text()
    text = text.replace("regression import ", "regression import median_error, ", 1)
    text = text.replace("segmentation import (", "segmentation import (\n    extent_error_mm,", 1)
    text = text.replace('    Metric("dice"', ROW + MASK_ROW + '    Metric("dice"', 1)
    registry.write_text(text)
    done = run_on_copy(PROGRAM, tmp_path)
    assert done.returncode == 0, done.stderr
