"""The reliability plot."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

from brainfound.errors import UsageError
from brainfound.metrics.calibration import reliability_bins
from brainfound.report.figures import plot_reliability


def test_a_plot_of_each_curve(tmp_path):
    rng = np.random.default_rng(0)
    shares, labels = rng.dirichlet([1, 1], 60), rng.integers(0, 2, 60)
    bins = reliability_bins(shares, labels)
    one = imread(plot_reliability({"raw": bins}, path=tmp_path / "deep" / "one.png", title="test part"))
    other = reliability_bins(shares**2 / (shares**2).sum(axis=1, keepdims=True), labels)
    two = imread(plot_reliability({"raw": bins, "calibrated": other}, path=tmp_path / "two.png"))
    assert min(*one.shape[:2]) > 400
    assert (one < 0.9).any()
    assert not np.array_equal(one, two)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["one.png", "two.png"]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(UsageError, match="curves"):
        plot_reliability({}, path=tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
