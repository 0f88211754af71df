"""Probes of embeddings whose content is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from brainfound.errors import UsageError
from brainfound.metrics import embedding_probes
from brainfound.metrics.embedding_probes import site_probe


def cohort(num=60, width=8):
    """Subjects of three sites, well and ill everywhere; noise to put something into."""
    index = np.arange(num)
    subjects = [f"s{i}" for i in index]
    site, ill = np.array(["Oslo", "Bern", "Rome"])[index % 3], np.where(index // 3 % 2, "ill", "well")
    return subjects, site, ill, np.random.default_rng(0).normal(size=(num, width))


def test_the_site_is_predicted_from_embeddings_that_hold_it_and_the_label_is_not():
    subjects, site, ill, noise = cohort()
    scanner = noise + 8 * (site[:, None] == np.unique(site)) @ np.eye(3, 8)
    found = site_probe(scanner, site, ill, subjects, seed=0, num_resamples=200)
    assert found.site.estimate > 0.95
    assert found.site_chance == pytest.approx(1 / 3)
    assert found.label.low < 0.5 < found.label.high
    assert (found.label_metric, found.label_chance, found.num_folds) == ("balanced_accuracy", 0.5, 5)
    subjects, site, ill, noise = cohort(num=180)
    disease = noise + 8 * (ill == "ill")[:, None] * np.eye(1, 8)
    found = site_probe(disease, site, ill, subjects, seed=0, num_resamples=200)
    assert found.label.estimate > 0.95
    assert found.site.low < 1 / 3 < found.site.high
    assert site_probe(disease, site, ill, subjects, seed=0, num_resamples=200) == found


def test_a_number_is_predicted_as_one():
    subjects, site, _, noise = cohort()
    age = np.random.default_rng(1).uniform(20, 80, 60)
    found = site_probe(noise + age[:, None] * np.eye(1, 8), site, age, subjects, seed=0, num_resamples=50)
    assert found.label_metric == "r2"
    assert found.label_chance == 0.0
    assert found.label.estimate > 0.9
    assert site_probe(noise, site, age, subjects, seed=0, num_resamples=50).label.estimate < 0.2


def test_a_subject_is_never_on_both_sides():
    # Each subject has a mark of its own and four sessions: a split of sessions would tell everything by heart.
    generator = np.random.default_rng(0)
    subjects = np.repeat(np.arange(24), 4)
    marks = 20 * generator.normal(size=(24, 64))[subjects]
    site, ill = np.array(["A", "B"])[subjects % 2], np.array([0, 1])[subjects // 2 % 2]
    found = site_probe(marks + generator.normal(size=marks.shape), site, ill, subjects, seed=0, num_resamples=50)
    assert found.site.estimate < 0.8
    assert found.label.estimate < 0.8


def test_what_cannot_be_probed_is_refused():
    subjects, site, ill, noise = cohort()
    ages = np.linspace(20, 80, 60)
    lonely = np.where(np.arange(60) == 0, "Mars", site)
    for changed, message in (
        ({"embeddings": noise[1:]}, "not one value per embedding"),
        ({"embeddings": noise[:, 0]}, "not embeddings"),
        ({"embeddings": np.where(noise > 2, np.nan, noise)}, "not finite"),
        ({"site": ["Oslo"] * 60}, "single class"),
        ({"label": ["ill"] * 60}, "single class"),
        ({"site": lonely}, "Mars has a single subject"),
        ({"label": np.where(np.arange(60) == 0, "rare", ill)}, "rare has a single subject"),
        ({"label": [None, *ill[1:]]}, "missing"),
        ({"label": [np.nan, *ages[1:]]}, "missing"),
        ({"site": [None, *site[1:]]}, "missing"),
        ({"subjects": [None, *subjects[1:]]}, "missing"),
        ({"site": None, "label": ages, "subjects": ["one"] * 60}, "a single subject"),
    ):
        arguments = {"embeddings": noise, "site": site, "label": ill, "subjects": subjects} | changed
        with pytest.raises(UsageError, match=message) as error:
            site_probe(**arguments, seed=0)
        assert "\n" not in str(error.value)


def test_site_and_label_may_be_probed_alone():
    subjects, site, ill, noise = cohort()
    for arguments in ({"site": site, "label": None}, {"site": None, "label": ill}):
        found = site_probe(noise, **arguments, subjects=subjects, seed=0, num_resamples=50)
        for name, column in arguments.items():
            assert (getattr(found, name) is None) == (column is None)
            assert (getattr(found, f"{name}_chance") is None) == (column is None)
    assert found.label_metric == "balanced_accuracy"


def _sessions(stable, noise, num=20, width=6):
    """Embeddings of two sessions of each subject, in one table."""
    generator = np.random.default_rng(0)
    of_subject = np.repeat(generator.normal(0, stable, (num, width)), 2, axis=0)
    embeddings = of_subject + generator.normal(0, noise, (2 * num, width))
    return embeddings, np.repeat([f"s{i:02}" for i in range(num)], 2), np.tile([1, 2], num)


def test_icc_is_that_of_the_analysis_of_variance():
    embeddings, subjects, sessions = _sessions(1.0, 0.7)
    found = embedding_probes.test_retest(embeddings, subjects, sessions)
    for dimension in range(embeddings.shape[1]):
        table = embeddings[:, dimension].reshape(20, 2)
        total = table.size * table.var()
        rows, columns = 2 * 20 * table.mean(1).var(), 20 * 2 * table.mean(0).var()
        between, error = rows / 19, (total - rows - columns) / 19
        assert found.icc[dimension] == pytest.approx((between - error) / (between + error))
    assert found.median_icc == pytest.approx(np.median(found.icc))
    assert found.num_subjects == 20


def test_shrout_and_fleiss_example():
    """Table 2 of the paper has six targets and four judges, ICC(3,1) = 0.71; of any two judges the formula is alike."""
    ratings = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
    assert embedding_probes._icc_3_1(ratings[:, :, None])[0] == pytest.approx(0.71, abs=0.005)


def test_stable_embeddings_are_identified_and_noise_is_at_chance():
    stable = embedding_probes.test_retest(*_sessions(1.0, 0.05))
    assert stable.identification == 1.0
    assert stable.median_icc > 0.98
    assert stable.chance == pytest.approx(1 / 20)
    noise = embedding_probes.test_retest(*_sessions(0.0, 1.0))
    assert noise.identification < 0.2
    assert abs(noise.median_icc) < 0.3
    # A shift of all second sessions is forgiven by ICC(3,1).
    embeddings, subjects, sessions = _sessions(1.0, 0.05)
    shifted = embedding_probes.test_retest(embeddings + 3.0 * (sessions == 2)[:, None], subjects, sessions)
    assert shifted.median_icc == pytest.approx(stable.median_icc)


def test_embeddings_that_have_collapsed_are_at_chance():
    _, subjects, sessions = _sessions(1.0, 1.0)
    for value in (0.0, 3.0):
        found = embedding_probes.test_retest(np.full((40, 6), value), subjects, sessions)
        assert found.identification == pytest.approx(1 / 20)
        assert math.isnan(found.median_icc)
    embeddings = _sessions(1.0, 0.5)[0]
    embeddings[:, 2] = 1.0
    found = embedding_probes.test_retest(embeddings, subjects, sessions)
    assert np.flatnonzero(np.isnan(found.icc)).tolist() == [2]
    assert found.median_icc == pytest.approx(np.nanmedian(found.icc))


def test_only_subjects_with_two_sessions_count_and_the_order_of_rows_does_not():
    embeddings, subjects, sessions = _sessions(1.0, 0.5)
    found = embedding_probes.test_retest(embeddings, subjects, sessions)
    order = np.random.default_rng(1).permutation(40)
    again = embedding_probes.test_retest(embeddings[order], subjects[order], sessions[order])
    assert again.icc == pytest.approx(found.icc)
    assert again.identification == found.identification
    more = np.concatenate([embeddings, np.full((2, 6), 9.0)])
    third = embedding_probes.test_retest(more, [*subjects, "s00", "alone"], [*sessions, 3, 1])
    assert third.icc == pytest.approx(found.icc)
    assert third.num_subjects == 20


def test_what_is_no_test_and_retest_is_refused():
    embeddings, subjects, sessions = _sessions(1.0, 0.5)
    with pytest.raises(UsageError, match="two subjects with two sessions"):
        embedding_probes.test_retest(embeddings[:3], subjects[:3], sessions[:3])
    with pytest.raises(UsageError, match="twice"):
        embedding_probes.test_retest(embeddings, subjects, np.ones(40))
    with pytest.raises(UsageError, match="not one value"):
        embedding_probes.test_retest(embeddings, subjects[1:], sessions)
    with pytest.raises(UsageError, match="not finite"):
        embedding_probes.test_retest(embeddings * np.nan, subjects, sessions)
