"""Schedules at their key points."""

from __future__ import annotations

import pytest

from brainfound.pretraining.objectives import ema
from brainfound.training import schedules


def rate(step: int, role: str, **changes) -> float:
    settings = {"peak": 1.0, "final": 0.1, "num_steps": 100, "warmup_steps": 10, "head_warmup_steps": 20}
    return schedules.learning_rate(step, role, **(settings | changes))


def test_cosine_and_linear_meet_their_ends():
    assert schedules.cosine(0, 2.0, 1.0, 10) == 2.0
    assert schedules.cosine(5, 2.0, 1.0, 10) == pytest.approx(1.5)
    assert schedules.cosine(10, 2.0, 1.0, 10) == schedules.cosine(99, 2.0, 1.0, 10) == 1.0
    assert schedules.linear(3, 0.0, 1.0, 10) == pytest.approx(0.3)
    assert schedules.linear(0, 0.04, 0.07, 0) == 0.07


def test_new_parameters_warm_up_at_once_and_end_at_the_final_rate():
    assert rate(0, "new") == pytest.approx(0.1)
    assert rate(9, "new") == pytest.approx(1.0)
    assert rate(99, "new") == pytest.approx(0.1)
    assert rate(99, "new", shape="constant") == 1.0


def test_backbone_waits_for_the_heads_then_warms_up():
    assert [rate(step, "backbone") for step in (0, 10, 19)] == [0.0, 0.0, 0.0]
    assert rate(20, "backbone") == pytest.approx(0.1)
    assert rate(29, "backbone") == pytest.approx(1.0)
    assert rate(99, "backbone") == pytest.approx(0.1)


def test_last_layer_may_be_frozen():
    assert rate(4, "last_layer", freeze_last_layer_steps=5) == 0
    assert rate(5, "last_layer", freeze_last_layer_steps=5) == rate(5, "new") > 0


def test_learning_rate_scales_with_the_square_root_of_the_batch():
    assert schedules.effective_lr(1e-4, 128) == 1e-4
    assert schedules.effective_lr(1e-4, 32) == pytest.approx(5e-5)


def test_momentum_and_temperature():
    assert schedules.cosine(0, 0.994, 1.0, 50) == 0.994
    assert schedules.cosine(50, 0.994, 1.0, 50) == 1.0
    assert schedules.linear(15, 0.04, 0.07, 30) == pytest.approx(0.055)
    assert schedules.linear(31, 0.04, 0.07, 30) == 0.07


def test_share_of_start_is_that_of_a_real_teacher():
    weight, student = 1.0, 0.0
    for step in range(40):
        kept = schedules.cosine(step, 0.9, 1.0, 40)
        weight = kept * weight + (1 - kept) * (1.0 if step < 10 else student)
    assert ema.initial_weight_fraction(0.9, 1.0, 40, 10) == pytest.approx(weight, rel=1e-12)
