"""The head that is fitted before training."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from brainfound.finetuning.fitted_heads import AugmentedPasses, fit_head, fold_standardisation
from brainfound.finetuning.linear_models import subject_folds, subject_group_indices
from brainfound.finetuning.tasks import resolve
from brainfound.finetuning.volumes import VolumeAugmentation, VolumeReader
from brainfound.models import BrainFoundForClassification, BrainFoundForRegression
from brainfound.training.randomness import StepKey

STILL = VolumeAugmentation(rotation_degrees=0, scale=0, shear=0, contrast_dropout=0)


def held_out(small_store, column: str, task: str):
    """Target and parts: the cohort's ages rise with the subject's number and every second is ill."""
    test = [1, 4, 7, 10]
    train = [index for index in range(12) if index not in test]
    return resolve(small_store, train, column, task), train, test


KEY = StepKey(seed=0, step=0, micro_batch=0, rank=0)


def answers(model, small_store, sessions) -> torch.Tensor:
    volumes, _ = VolumeReader(small_store, sessions, 50).read(range(len(sessions)), KEY)
    with torch.no_grad():
        output = model.eval()(**volumes.inputs())
    return output.predictions if hasattr(output, "predictions") else output.logits.softmax(-1)


def test_a_fitted_regression_starts_better_than_a_random_one(small_store, tiny_backbone):
    target, train, test = held_out(small_store, "age_years", "regression")
    model = BrainFoundForRegression.from_backbone(
        tiny_backbone, contrasts=small_store.contrasts, target_mean=target.mean, target_std=target.std
    )
    ages = torch.tensor(target.values(small_store, test))
    before = (answers(model, small_store, test) - ages).abs().mean()
    fit_head(model, target, AugmentedPasses(VolumeReader(small_store, train, 50), STILL, 2, 4, seed=0))
    after = (answers(model, small_store, test) - ages).abs().mean()
    assert after < 0.7 * before


def test_the_fitted_layer_standardises_until_it_is_folded(small_store, tiny_backbone):
    """One step at the same rate moves the answers of raw features together, and those of standardised ones hardly."""
    target, train, test = held_out(small_store, "age_years", "regression")
    model = BrainFoundForRegression.from_backbone(
        tiny_backbone, contrasts=small_store.contrasts, target_mean=target.mean, target_std=target.std
    )
    names = set(model.state_dict())
    fit_head(model, target, AugmentedPasses(VolumeReader(small_store, train, 50), STILL, 2, 4, seed=0))
    assert set(model.state_dict()) == names, "nothing more is saved"
    shared = model.head.score.input_mean.sign()  # the signs of a gradient that all volumes share
    folded = copy.deepcopy(model)
    fold_standardisation(folded)
    before = answers(model, small_store, test)
    torch.testing.assert_close(answers(folded, small_store, test), before, rtol=1e-4, atol=1e-3)
    assert not folded.head.score._forward_pre_hooks
    assert not hasattr(folded.head.score, "input_mean")
    shifts = []
    for one in (model, folded):
        with torch.no_grad():
            one.head.score.weight += 0.01 * shared
        shifts.append((answers(one, small_store, test) - before).mean().abs())
    assert shifts[0] < 0.5 * shifts[1]


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
    fit_head(model, target, AugmentedPasses(VolumeReader(small_store, train, 50), STILL, 2, 4, seed=0))
    assert error() < 0.7 * before


def test_only_the_last_layer_changes_and_the_same_seed_gives_the_same(small_store, tiny_backbone):
    target, train, _ = held_out(small_store, "age_years", "regression")

    def fitted() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = BrainFoundForRegression.from_backbone(tiny_backbone, contrasts=small_store.contrasts)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        fit_head(
            model, target, AugmentedPasses(VolumeReader(small_store, train, 3), VolumeAugmentation(), 1, 4, seed=3)
        )
        assert torch.equal(torch.get_rng_state(), state)
        after = model.state_dict()
        assert {n for n in after if not torch.equal(after[n], before[n])} == {"head.score.weight", "head.score.bias"}
        return after

    first, second = fitted(), fitted()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bins_start_around_the_answer_of_a_point(small_store, tiny_backbone):
    target, train, test = held_out(small_store, "age_years", "regression")
    reader = VolumeReader(small_store, train, 50)
    scale = {"target_mean": target.mean, "target_std": target.std}
    point = BrainFoundForRegression.from_backbone(tiny_backbone, contrasts=small_store.contrasts, **scale)
    bins = BrainFoundForRegression.from_backbone(
        tiny_backbone, contrasts=small_store.contrasts, **scale,
        regression_head="bins", regression_bins=60, regression_range=[-60.0, 160.0],
    )  # fmt: skip
    for model in (point, bins):
        fit_head(model, target, AugmentedPasses(reader, STILL, 1, 4, seed=0))
    torch.testing.assert_close(answers(bins, small_store, test), answers(point, small_store, test), atol=0.5, rtol=0)


def test_each_label_of_several_is_fitted(small_store, tiny_backbone, monkeypatch):
    monkeypatch.setitem(small_store.sessions, "ill", [0, 1] * 6)
    monkeypatch.setitem(small_store.sessions, "old", [0] * 6 + [1] * 6)
    _, train, _ = held_out(small_store, "age_years", "regression")
    target = resolve(small_store, train, "ill,old", "classification")
    model = BrainFoundForClassification.from_backbone(
        tiny_backbone, contrasts=small_store.contrasts, num_labels=2, problem_type="multi_label_classification"
    )
    reader = VolumeReader(small_store, train, 50)
    labels = torch.tensor(target.values(small_store, train), dtype=torch.float32)
    volumes, _ = reader.read(range(len(train)), KEY)

    def loss() -> float:
        with torch.no_grad():
            return float(model.eval()(**volumes.inputs(), labels=labels).loss)

    before = loss()
    fit_head(model, target, AugmentedPasses(reader, STILL, 2, 4, seed=0))
    assert loss() < 0.8 * before


def test_class_weights_count_in_the_fit(small_store, tiny_backbone, monkeypatch):
    # A label that no image tells: all that is left is how much each class weighs.
    monkeypatch.setitem(small_store.sessions, "coin", ["heads", "tails", "tails", "heads"] * 3)
    train = list(range(12))
    target = resolve(small_store, train, "coin", "classification")

    def share_of_second(weights: list[float]) -> float:
        torch.manual_seed(0)
        model = BrainFoundForClassification.from_backbone(
            tiny_backbone, contrasts=small_store.contrasts, num_labels=2, class_weights=weights
        )
        fit_head(model, target, AugmentedPasses(VolumeReader(small_store, train, 50), STILL, 1, 4, seed=0))
        return float(answers(model, small_store, train)[:, 1].mean())

    assert share_of_second([0.5, 1.5]) > 0.6
    assert share_of_second([1.5, 0.5]) < 0.4


@pytest.mark.parametrize("classified", [False, True])
def test_folds_never_split_the_passes_of_a_session(classified):
    sessions = np.tile(np.arange(12), 4)
    classes = sessions % 2 if classified else None
    folds = subject_folds(sessions, classes)
    assert len(folds) == 5
    for train, test in folds:
        assert not set(sessions[train]) & set(sessions[test])
        assert len(train) + len(test) == len(sessions)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(len(sessions)))


def test_folds_never_split_the_sessions_of_a_subject():
    subjects = [f"s{n // 2}" for n in range(12)]
    sessions = np.tile(np.arange(12)[::-1], 3)
    people = subject_group_indices(subjects, sessions)
    folds = subject_folds(people, None)
    assert len(folds) == 5
    for train, test in folds:
        assert not {subjects[i] for i in sessions[train]} & {subjects[i] for i in sessions[test]}
    assert subject_group_indices([f"s{n}" for n in range(12)], sessions).tolist() == sessions.tolist()


def test_too_few_sessions_for_folds():
    assert subject_folds(np.array([3, 3, 3]), None) is None
    assert subject_folds(np.array([0, 0, 1, 2]), np.array([1, 1, 0, 0])) is None
