"""Linear models of frozen features against scikit-learn's."""

import numpy as np
from sklearn.cross_decomposition import PLSRegression
from sklearn.linear_model import RidgeCV

from brainfound.finetuning.linear_models import fit_pls, fit_ridge, subject_folds


def _cohort(num_features=30):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(24, num_features))
    return features, features[:, 0] + 2 * rng.normal(size=24), np.arange(24) // 2


def test_the_ridge_is_that_of_scikit_learn():
    features, values, subjects = _cohort()
    weight, bias, error = fit_ridge(features, values, subjects)
    penalties, folds = np.logspace(-1, 5, 13), subject_folds(subjects, None)
    expected = RidgeCV(alphas=penalties, cv=folds, scoring="neg_mean_squared_error").fit(features, values)
    np.testing.assert_allclose(weight, expected.coef_, rtol=1e-8)
    np.testing.assert_allclose([bias, error], [expected.intercept_, -expected.best_score_], rtol=1e-8)


def test_partial_least_squares_choose_their_components_on_left_out_subjects():
    features, values, subjects = _cohort()
    weight, bias = fit_pls(features, values, subjects)
    predicted = features @ weight + bias
    fits = [PLSRegression(number, scale=False).fit(features, values).predict(features) for number in range(1, 9)]
    (same,) = np.nonzero([np.allclose(fit, predicted) for fit in fits])
    assert len(same) == 1
    assert same[0] < 7
    few, few_bias = fit_pls(features[:3], values[:3], subjects[:3])
    assert np.isfinite([*few, few_bias]).all()
