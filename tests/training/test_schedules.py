"""Schedules at their ends; `tests/pretraining/test_exactness_learning.py` has every step of the learning rate."""

from __future__ import annotations

import pytest

from brainfound.pretraining.objectives import ema
from brainfound.training import optim


def test_cosine_and_linear_meet_their_ends():
    assert optim.cosine(0, 2.0, 1.0, 10) == 2.0
    assert optim.cosine(5, 2.0, 1.0, 10) == pytest.approx(1.5)
    assert optim.cosine(10, 2.0, 1.0, 10) == optim.cosine(99, 2.0, 1.0, 10) == 1.0
    assert optim.linear(3, 0.0, 1.0, 10) == pytest.approx(0.3)
    assert optim.linear(0, 0.04, 0.07, 0) == 0.07


def test_share_of_start_is_that_of_a_real_teacher():
    weight, student = 1.0, 0.0
    for step in range(40):
        kept = optim.cosine(step, 0.9, 1.0, 40)
        weight = kept * weight + (1 - kept) * (1.0 if step < 10 else student)
    assert ema.initial_weight_fraction(0.9, 1.0, 40, 10) == pytest.approx(weight, rel=1e-12)
