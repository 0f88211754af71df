"""Probes: what they find in good and in empty features."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, r2_score

from brainfound.errors import RecipeError, TrainingError
from brainfound.pretraining.monitoring.probes import Probe, ProbeRecipe, ProbeScores, choose_probe_target
from tests.table_store import TableStore


def table_store(table: pd.DataFrame, num_slices: int = 4) -> TableStore:
    sessions = table.assign(first_row=np.arange(len(table)) * num_slices, num_slices=num_slices)
    if "image_hash" not in table:
        sessions["image_hash"] = [f"{number:04x}" for number in range(len(table))]
    return TableStore(
        sessions,
        contrasts=("T1w", "T2w"),
        present=np.ones((len(table), 1), dtype=bool),
        slice_positions_mm=np.tile(np.linspace(-30, 30, num_slices), len(table)),
        session_rows=lambda session: np.arange(num_slices) + session * num_slices,
    )


def table(num: int = 24, **columns) -> pd.DataFrame:
    return pd.DataFrame({"subject": [f"s{i:02d}" for i in range(num)], **columns})


def test_the_target_follows_what_the_store_knows():
    ages = np.linspace(20, 80, 24)
    diagnosis = ["AD"] * 12 + ["CN"] * 12
    assert choose_probe_target(table_store(table(age_years=ages, diagnosis=diagnosis))) == "diagnosis"
    assert choose_probe_target(table_store(table(age_years=ages, diagnosis=["AD"] * 4 + ["CN"] * 20))) == "age_years"
    assert choose_probe_target(table_store(table(age_years=[50.0] * 24, sex=["F", "M"] * 12, site=["a"] * 24))) == "sex"
    assert choose_probe_target(table_store(table(sex=["F"] * 24, site=["a"] * 12 + ["b"] * 12))) == "site"
    both = table_store(table(sex=["F"] * 20 + ["M"] * 4, site=[None] * 12 + ["b"] * 12))
    assert choose_probe_target(both) == "slice_position"
    both.present = np.ones((24, 2), dtype=bool)
    assert choose_probe_target(both) == "contrast"
    both.present[4:, 1] = False  # four sessions are not enough
    assert choose_probe_target(both) == "slice_position"


@pytest.mark.parametrize("target", ["diagnosis", "age_years", "sex", "site", "slice_position"])
def test_informative_features_score_high_and_noise_does_not(target):
    ages = np.linspace(20, 80, 24)
    groups = {"diagnosis": ["AD", "CN"] * 12, "sex": ["F", "M"] * 12, "site": ["a", "b"] * 12}
    store = table_store(table(age_years=ages, **groups))
    probe = Probe(store, ProbeRecipe(target=target, slices_per_session=4), seed=0)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(24, 4, 6))
    signal = noise * 0.1
    group = np.array([0, 1] * 12)[:, None]
    values = dict.fromkeys(groups, group) | {"age_years": ages[:, None] / 20}
    value = values.get(target, np.linspace(-1, 1, 4)[None])
    signal[:, :, 0] += value * 3
    good, bad = probe.score(probe.predict(signal)), probe.score(probe.predict(noise))
    assert good.linear > 0.9
    assert good.knn > bad.knn + 0.3
    assert bad.linear < 0.75
    assert good.chance == (0.5 if target in groups else 0)


def test_no_subject_is_on_both_sides():
    store = table_store(table(age_years=np.linspace(20, 80, 24)))
    store.sessions["subject"] = [f"s{i // 2}" for i in range(24)]
    probe = Probe(store, ProbeRecipe(), seed=0)
    for fold in probe.folds:
        assert not set(probe.subjects[fold["train"]]) & set(probe.subjects[fold["test"]])
    assert sorted(np.concatenate([fold["test"] for fold in probe.folds])) == list(range(24))


@pytest.mark.parametrize("target", ["age_years", "slice_position"])
def test_an_image_under_two_names_is_on_one_side(target):
    """Every image is there twice, under another subject's name."""
    hashes = [f"{i % 12:02x}" for i in range(24)]
    store = table_store(table(age_years=np.linspace(20, 80, 24), image_hash=hashes))
    probe = Probe(store, ProbeRecipe(target=target, slices_per_session=2), seed=0)
    per_session = 2 if target == "slice_position" else 1
    assert len(probe.folds) == ProbeRecipe().folds
    for fold in probe.folds:
        train, test = ({hashes[i // per_session] for i in fold[part]} for part in ("train", "test"))
        assert train
        assert not train & test


def test_features_that_are_not_finite_score_nan():
    probe = Probe(table_store(table(age_years=np.linspace(20, 80, 24))), ProbeRecipe(), seed=0)
    scores = probe.score(probe.predict(np.full((24, 8, 3), np.nan)))
    assert np.isnan(scores.linear)


def test_one_subject_cannot_be_probed():
    with pytest.raises(TrainingError, match=r"probe\.every=0"):
        Probe(table_store(pd.DataFrame({"subject": ["s0", "s0"]})), ProbeRecipe(), seed=0)


def test_a_probe_is_repeatable_and_leaves_the_encoder_as_it_was(store, model):
    probe = Probe(store, ProbeRecipe(slices_per_session=2, folds=3), seed=0)
    model.encoder.train()
    first, second = (probe.run(model.encoder, torch.device("cpu")) for _ in range(2))
    assert dataclasses.asdict(first) == dataclasses.asdict(second)
    assert model.encoder.training
    assert first.target == "age_years"


def test_the_contrast_of_an_embedding_is_probed_with_one_contrast_at_a_time():
    store = table_store(table(8))
    store.present = np.array([[True, True]] * 6 + [[True, False]] * 2)
    probe = Probe(store, ProbeRecipe(target="contrast", slices_per_session=2, max_sessions=14), seed=0)
    assert (probe.present.sum(axis=1) == 1).all()
    assert [probe.present[:, i].sum() for i in (0, 1)] == [7, min(6, sum(probe.views < 6) // 2)]
    assert probe.labels.tolist() == ["T1w" if shown[0] else "T2w" for shown in probe.present]
    for fold in probe.folds:
        assert not set(probe.views[fold["train"]]) & set(probe.views[fold["test"]])
    signal = np.random.default_rng(0).normal(size=(len(probe.views), 2, 3)) * 0.1
    signal[:, :, 0] += probe.present[:, :1]
    assert probe.score(probe.predict(signal)).linear == 1
    store.present[:, 1] = False
    with pytest.raises(RecipeError, match=r"two classes \(got 1 class, with so many sessions: 8, expected two"):
        Probe(store, ProbeRecipe(target="contrast"), seed=0)


@pytest.mark.parametrize(
    ("target", "columns", "message"),
    [
        ("diagnosis", {}, r"no such column.*probe\.target=auto, which takes slice_position"),
        ("diagnosis", {"diagnosis": ["AD"] * 24}, "got 1 class, with so many sessions: 24"),
        ("sex", {"sex": [None] * 24}, "got 0 classes, with so many sessions: none"),
        ("age_years", {"age_years": [50.0] + [None] * 23}, "got 1 of 24 sessions, expected two or more"),
    ],
)
def test_a_target_that_is_not_known_enough_is_counted(target, columns, message):
    with pytest.raises(RecipeError, match=message):
        Probe(table_store(table(**columns)), ProbeRecipe(target=target), seed=0)


def test_a_prediction_stays_among_the_ages_that_were_seen():
    """One image far from all others costs what one wrong answer can cost; unclipped, R² would be -1e6."""
    ages = np.linspace(20, 80, 24)
    probe = Probe(table_store(table(age_years=ages)), ProbeRecipe(slices_per_session=1), seed=0)
    signal = np.random.default_rng(0).normal(size=(24, 1, 3)) * 0.01
    signal[:, 0, 0] += ages / 60
    signal[12, 0, 0] = 1e3
    assert probe.score(probe.predict(signal)).linear > -1


def test_huge_and_infinite_features_are_scored_without_an_error():
    probe = Probe(table_store(table(age_years=np.linspace(20, 80, 24))), ProbeRecipe(slices_per_session=1), seed=0)
    features = np.random.default_rng(0).normal(size=(24, 1, 3)).astype(np.float32)
    assert np.isfinite(probe.score(probe.predict(features * 1e37)).linear)
    features[3] = np.inf
    assert np.isnan(probe.score(probe.predict(features)).knn)


@pytest.mark.parametrize(("target", "measure"), [("site", balanced_accuracy_score), ("age_years", r2_score)])
def test_the_measures_are_those_of_scikit_learn(target, measure):
    store = table_store(table(age_years=np.linspace(20, 80, 24), site=["a", "b", "c"] * 8))
    probe = Probe(store, ProbeRecipe(target=target), seed=0)
    predicted = probe.predict(np.random.default_rng(0).normal(size=(24, 8, 3)))
    scores = probe.score(predicted)
    for model in ("linear", "knn"):
        assert getattr(scores, model) == pytest.approx(measure(probe.labels, predicted[model]))


def test_the_standard_error_is_that_of_resampled_subjects():
    """Two equal sessions of each subject are drawn together: they make the score no surer."""
    rng = np.random.default_rng(0)
    ages, error = rng.uniform(20, 80, 24), rng.normal(0, 6, 24)
    sessions = table(48, age_years=np.repeat(ages, 2))
    sessions["subject"] = [f"s{i // 2:02d}" for i in range(48)]
    probe = Probe(table_store(sessions), ProbeRecipe(target="age_years"), seed=0)
    assert probe.labels.tolist() == np.repeat(ages, 2).tolist()
    scores = [r2_score(ages[drawn], (ages + error)[drawn]) for drawn in rng.integers(24, size=(4000, 24))]
    assert probe._standard_error(probe.labels + np.repeat(error, 2)) == pytest.approx(np.std(scores), rel=0.2)


def test_the_log_names_the_guarding_score():
    scores = ProbeScores(0.6, 0.4, 0.02, "r2", "age_years", patch=0.7)
    assert scores.line("linear")["probe"] == 0.6
    line = scores.line("knn")
    assert (line["probe"], line["probe/linear"], line["probe/knn"], line["probe/patch"]) == (0.4, 0.6, 0.4, 0.7)
    assert (line["probe_chance"], line["probe_target"]) == (0.0, "age_years")
