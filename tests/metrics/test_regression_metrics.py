"""Metrics of numbers against scikit-learn and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from brainfound.errors import UsageError
from brainfound.metrics.regression import mae, pearson, r2, rmse, spearman


def test_regression_metrics_are_those_of_scikit_learn_and_scipy():
    generator = np.random.default_rng(0)
    target, prediction = generator.normal(60, 10, 50), generator.normal(60, 10, 50)
    assert mae(target, prediction) == pytest.approx(np.abs(target - prediction).mean())
    assert r2(target, prediction) == pytest.approx(sk.r2_score(target, prediction))
    assert pearson(target, prediction) == pytest.approx(stats.pearsonr(target, prediction).statistic)
    assert pearson(target, 100 - target) == pytest.approx(-1)
    assert r2(torch.tensor(target), torch.tensor(prediction)) == pytest.approx(sk.r2_score(target, prediction))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=20))
@pytest.mark.filterwarnings("ignore")
def test_regression_metrics_on_few_and_tied_values(cases):
    target, prediction = np.array(cases, float).T
    assert mae(target, prediction) == pytest.approx(sk.mean_absolute_error(target, prediction))
    assert rmse(target, prediction) == pytest.approx(sk.root_mean_squared_error(target, prediction))
    if len(set(target)) > 1:
        assert r2(target, prediction) == pytest.approx(sk.r2_score(target, prediction))
    if len(set(target)) > 1 and len(set(prediction)) > 1:
        assert pearson(target, prediction) == pytest.approx(stats.pearsonr(target, prediction).statistic)
        # Spearman's correlation is Pearson's of the mid-ranks.
        ranks = [[np.mean(values < v) + np.mean(values <= v) for v in values] for values in (target, prediction)]
        assert spearman(target, prediction) == pytest.approx(np.corrcoef(ranks)[0, 1])


def test_regression_metrics_without_variation_are_undefined():
    assert math.isnan(pearson([1, 2, 3], [5, 5, 5]))
    assert math.isnan(pearson([1], [2]))
    assert math.isnan(r2([5, 5, 5], [5, 5, 5]))
    assert math.isnan(r2([5], [5]))
    assert math.isnan(r2([0, 1e-200], [0, 1]))
    assert math.isnan(spearman([1, 2, 3], [5, 5, 5]))
    assert math.isnan(spearman([4, 4], [1, 2]))
    assert r2([1, 2, 3], [2, 2, 2]) == 0.0


@pytest.mark.parametrize("metric", [mae, rmse, r2, pearson, spearman])
@pytest.mark.parametrize(
    ("target", "prediction"),
    [([1, 2], [1, 2, 3]), ([1, 2], [[1], [2]]), ([1, np.inf], [1, 2]), ([1, 2], [np.nan, 2]), ([], []), (["a"], ["b"])],
)
def test_regression_metrics_refuse_what_they_cannot_score(metric, target, prediction):
    with pytest.raises(UsageError) as error:
        metric(target, prediction)
    assert "\n" not in str(error.value)
