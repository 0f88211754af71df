"""The head that is fitted before training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainfound.models import BrainFoundForClassification, BrainFoundForRegression
from brainfound.train.head_start import _folds, _subject_numbers, fit_head
from brainfound.train.objectives.base import StepKey
from brainfound.train.targets import resolve_target
from brainfound.train.volumes import VolumeAugmentation, VolumeReader

STILL = VolumeAugmentation(rotation_degrees=0, scale=0, shear=0, contrast_dropout=0)


def held_out(small_store, column: str, task: str):
    """Target and parts: the cohort's ages rise with the subject's number and every second is ill."""
    test = [1, 4, 7, 10]
    train = [index for index in range(12) if index not in test]
    return resolve_target(small_store, train, task, column), train, test


KEY = StepKey(seed=0, step=0, micro_batch=0, rank=0)


def answers(model, small_store, sessions) -> torch.Tensor:
    volumes, _ = VolumeReader(small_store, sessions, 50).read(range(len(sessions)), KEY)
    with torch.no_grad():
        output = model.eval()(**volumes.inputs())
    return output.predictions if hasattr(output, "predictions") else output.logits.softmax(-1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_a_fitted_regression_starts_better_than_a_random_one(small_store, tiny_backbone):
    target, train, test = held_out(small_store, "age_years", "regression")
    model = BrainFoundForRegression.from_backbone(
        tiny_backbone, contrasts=small_store.contrasts, target_mean=target.mean, target_std=target.std
    )
    ages = torch.tensor(target.values(small_store, test))
    before = (answers(model, small_store, test) - ages).abs().mean()
    fit_head(model, VolumeReader(small_store, train, 50), STILL, target, 2, 4, seed=0)
    after = (answers(model, small_store, test) - ages).abs().mean()
    assert after < 0.7 * before


def test_a_fitted_classification_starts_better_than_a_random_one(small_store, tiny_backbone):
    target, train, test = held_out(small_store, "diagnosis", "classification")
    names = dict(enumerate(target.names))
    model = BrainFoundForClassification.from_backbone(
        tiny_backbone, contrasts=small_store.contrasts, id2label=names, label2id={v: k for k, v in names.items()}
    )
    labels = torch.tensor(target.values(small_store, test))

    def error() -> float:
        return float(-answers(model, small_store, test)[torch.arange(len(test)), labels].log().mean())

    before = error()
    fit_head(model, VolumeReader(small_store, train, 50), STILL, target, 2, 4, seed=0)
    assert error() < 0.7 * before


def test_only_the_last_layer_changes_and_the_same_seed_gives_the_same(small_store, tiny_backbone):
    target, train, _ = held_out(small_store, "age_years", "regression")

    def fitted() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = BrainFoundForRegression.from_backbone(tiny_backbone, contrasts=small_store.contrasts)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        fit_head(model, VolumeReader(small_store, train, 3), VolumeAugmentation(), target, 1, 4, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        after = model.state_dict()
        assert {n for n in after if not torch.equal(after[n], before[n])} == {"head.score.weight", "head.score.bias"}
        return after

    first, second = fitted(), fitted()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("classified", [False, True])
def test_folds_never_split_the_passes_of_a_session(classified):
    sessions = np.tile(np.arange(12), 4)
    classes = sessions % 2 if classified else None
    folds = _folds(sessions, classes)
    assert folds is not None
    assert len(folds) == 5
    for train, test in folds:
        assert not set(sessions[train]) & set(sessions[test])
        assert len(train) + len(test) == len(sessions)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(len(sessions)))


def test_folds_never_split_the_sessions_of_a_subject():
    subjects = [f"s{n // 2}" for n in range(12)]
    sessions = np.tile(np.arange(12)[::-1], 3)
    people = _subject_numbers(subjects, sessions)
    folds = _folds(people, None)
    assert folds is not None
    for train, test in folds:
        assert not {subjects[i] for i in sessions[train]} & {subjects[i] for i in sessions[test]}
    assert _subject_numbers([f"s{n}" for n in range(12)], sessions).tolist() == sessions.tolist()


def test_too_few_sessions_for_folds():
    assert _folds(np.array([3, 3, 3]), None) is None
    assert _folds(np.array([0, 0, 1, 2]), np.array([1, 1, 0, 0])) is None
