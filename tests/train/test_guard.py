"""Gauges and stops."""

from __future__ import annotations

import math

import pytest
import torch

from brainfound.errors import TrainingError
from brainfound.train.guard import Guard, GuardRecipe, effective_rank, mean_cosine

HEALTHY = {
    "loss": 3.0,
    "loss_dino": 6.0,
    "ln_k": 6.93,
    "teacher_entropy": 0.9,
    "effective_rank": 40.0,
    "mean_cosine": 0.4,
}


def test_effective_rank_counts_directions():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 3, generator=generator)).Q
    coordinates = torch.linalg.qr(torch.randn(64, 3, generator=generator)).Q
    coordinates = torch.linalg.qr(coordinates - coordinates.mean(dim=0)).Q
    assert effective_rank(coordinates @ basis.T + 5) == pytest.approx(3, abs=0.05)
    assert effective_rank(torch.ones(8, 4)) == 0


def test_mean_cosine_is_that_of_the_pairs():
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    pairs = [torch.cosine_similarity(features[i], features[j], dim=0) for i in range(5) for j in range(5) if i != j]
    assert mean_cosine(features) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert mean_cosine(torch.ones(4, 3)) == pytest.approx(1)


@pytest.mark.parametrize(
    "symptom",
    [
        {"teacher_entropy": 0.05},
        {"effective_rank": 1.5},
        {"mean_cosine": 0.997},
        {"loss_dino": 6.93},
        {"loss_dino": 6.9, "view_margin": 0.02},
    ],
)
def test_collapse_stops_after_confirmation_and_only_after_the_grace(symptom):
    guard = Guard(GuardRecipe(grace_steps=10, confirm_looks=3))
    for step in range(1, 11):
        guard.look(step, HEALTHY | symptom)
    guard.look(11, HEALTHY | symptom)
    guard.look(12, HEALTHY | symptom)
    guard.look(13, HEALTHY)  # one healthy look starts the count again
    guard.look(14, HEALTHY | symptom)
    guard.look(15, HEALTHY | symptom)
    with pytest.raises(TrainingError, match="collapsed"):
        guard.look(16, HEALTHY | symptom)


def test_a_disabled_guard_only_counts():
    guard = Guard(GuardRecipe(enabled=False, grace_steps=0, confirm_looks=1))
    guard.look(1, HEALTHY | {"mean_cosine": 1.0})
    assert guard.state.collapsed_looks == 1


def test_a_probe_drop_stops_when_it_stays():
    guard = Guard(GuardRecipe(probe_drop=0.1, probe_patience=2))
    for step, score in enumerate((0.6, 0.7, 0.55, 0.65)):
        guard.judge(step, score, 0.01)
    assert (guard.state.best_score, guard.state.best_step, guard.state.dropped_probes) == (0.7, 1, 0)
    guard.judge(4, 0.5, 0.01)
    with pytest.raises(TrainingError, match=r"0\.700 \(step 1\)"):
        guard.judge(5, math.nan, 0.0)
    assert guard.exports_best()


def test_noise_is_no_drop():
    guard = Guard(GuardRecipe(probe_drop=0.05, probe_patience=1))
    guard.judge(0, 0.7, 0.2)
    guard.judge(1, 0.4, 0.2)  # within two standard errors
    assert not guard.exports_best()


def test_a_guard_goes_on_from_its_state():
    guard = Guard(GuardRecipe())
    guard.judge(0, 0.5, 0.1)
    again = Guard(GuardRecipe())
    again.load_state_dict(guard.state_dict())
    assert again.state == guard.state
    assert not again.is_best(0.4)
    assert not again.is_best(math.nan)
