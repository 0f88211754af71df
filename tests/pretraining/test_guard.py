"""Collapse metrics, probe drops, stops and rollbacks of the guard."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from brainfound.errors import TrainingError
from brainfound.pretraining.monitoring.guard import (
    Guard,
    GuardRecipe,
    effective_rank,
    feature_health_metrics,
    mean_cosine,
    read_retention_scores,
    view_margin,
)
from brainfound.pretraining.objectives.losses import cross_entropy
from brainfound.training.task import RollbackRequested

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


def test_metrics_of_nonfinite_features_are_nan():
    for value in (math.nan, math.inf):
        features = torch.ones(6, 3)
        features[2, 1] = value
        metrics = feature_health_metrics(features, torch.arange(3).repeat(2))
        assert all(math.isnan(metrics[name]) for name in ("effective_rank", "mean_cosine", "view_margin"))
        assert math.isnan(effective_rank(features))
        assert math.isnan(mean_cosine(features))


def test_view_margin_is_that_of_the_pairs():
    generator = torch.Generator().manual_seed(2)
    images = torch.tensor([7, 7, 3, 3, 3, 1])
    features = torch.randn(6, 4, generator=generator)
    centred = features - features.mean(dim=0)
    same, other = [], []
    for i in range(6):
        for j in range(6):
            if i != j:
                pair = torch.cosine_similarity(centred[i], centred[j], dim=0)
                (same if images[i] == images[j] else other).append(float(pair))
    assert view_margin(features, images) == pytest.approx(sum(same) / len(same) - sum(other) / len(other), abs=1e-6)
    assert view_margin(torch.ones(6, 4), images) == 0
    assert math.isnan(view_margin(features, torch.arange(6)))


def test_metrics_use_at_most_256_images():
    features = torch.randn(600, 3, generator=torch.Generator().manual_seed(3))
    images = torch.arange(300).repeat(2)
    some = feature_health_metrics(features, images)
    assert some == feature_health_metrics(features[images < 256], images[images < 256])
    assert some["highest_rank"] == 3


def test_thresholds_of_rank_are_those_of_the_batch():
    """Five images can show no more than four directions: a rank of 1.5 is then no collapse, and 4 no warning."""
    guard = Guard(GuardRecipe(grace_steps=0))
    assert not guard.collapse_symptoms(HEALTHY | {"effective_rank": 1.5, "highest_rank": 4})
    assert guard.collapse_symptoms(HEALTHY | {"effective_rank": 0.0, "highest_rank": 4})
    assert guard.collapse_symptoms(HEALTHY | {"effective_rank": 1.5, "highest_rank": 127})
    line = HEALTHY | {"step": 1, "effective_rank": 4.0}
    assert not guard.new_warnings(line | {"highest_rank": 15})
    assert "below 10" in guard.new_warnings(line | {"highest_rank": 127})[0]
    assert not guard.new_warnings(line | {"highest_rank": 127})  # once is enough


def test_warnings_do_not_stop():
    guard = Guard(GuardRecipe(confirm_log_lines=1, grace_steps=0))
    line = HEALTHY | {"step": 5, "gram_distance": 0.5}
    assert "Gram distance 0.5" in guard.new_warnings(line)[0]
    guard.on_log_line(5, line)
    probe = {"step": 0, "probe_chance": 0.5, "probe_standard_error": 0.1, "probe_target": "sex"}
    assert not guard.new_warnings(probe | {"probe": 0.75})
    assert "not clearly above chance" in guard.new_warnings(probe | {"probe": 0.65})[0]


@pytest.mark.parametrize("num_local", [0, 2, 8])
def test_a_uniform_answer_costs_ln_k_whatever_the_crops(num_local):
    """What the guard compares the logged CLS loss with."""
    targets = torch.softmax(torch.randn(10, 7, generator=torch.Generator().manual_seed(4)), dim=-1)
    other, both = torch.arange(10).roll(5)[:, None], torch.stack((torch.arange(5), torch.arange(5, 10)), dim=1)
    loss = 0.0
    for target_rows in (other, both.repeat(num_local, 1)):
        weights = torch.full((len(target_rows),), 1 / (5 * (2 + 2 * num_local)))
        loss += float(cross_entropy(torch.ones(len(target_rows), 7), targets, 0.1, weights, target_rows))
    line = {"loss_dino": loss, "ln_k": math.log(7)}
    assert "equals ln K" in Guard(GuardRecipe()).collapse_symptoms(line)[0]


def test_few_images_make_a_noisy_margin_and_one_image_says_nothing():
    guard = Guard(GuardRecipe())
    line = HEALTHY | {"loss_dino": 6.9, "view_margin": 0.07}
    assert guard.collapse_symptoms(line | {"highest_rank": 15})
    assert not guard.collapse_symptoms(line | {"highest_rank": 7})
    assert guard.collapse_symptoms(line | {"highest_rank": 7, "view_margin": 0.04})
    one = feature_health_metrics(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))
    assert "view_margin" not in one
    assert not guard.collapse_symptoms(HEALTHY | one)


def test_a_low_view_margin_with_a_loss_that_is_learnt_is_no_symptom():
    """Crops that show different contrasts may be unlike each other and yet be learnt from."""
    assert not Guard(GuardRecipe()).collapse_symptoms(HEALTHY | {"view_margin": -0.1})


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
    guard = Guard(GuardRecipe(grace_steps=10, confirm_log_lines=3))
    for step in range(1, 11):
        guard.on_log_line(step, HEALTHY | symptom)
    guard.on_log_line(11, HEALTHY | symptom)
    guard.on_log_line(12, HEALTHY | symptom)
    guard.on_log_line(13, HEALTHY)  # one healthy look starts the count again
    guard.on_log_line(14, HEALTHY | symptom)
    guard.on_log_line(15, HEALTHY | symptom)
    with pytest.raises(TrainingError, match="collapsed"):
        guard.on_log_line(16, HEALTHY | symptom)


def test_features_that_are_not_finite_need_no_grace():
    guard = Guard(GuardRecipe(grace_steps=1000, confirm_log_lines=2))
    broken = HEALTHY | {"effective_rank": math.nan}
    guard.on_log_line(1, broken)
    with pytest.raises(TrainingError, match="collapsed: they are not finite, in 2 log lines"):
        guard.on_log_line(2, broken)


def test_a_failure_goes_back_to_the_best_probe_and_then_stops():
    recipe = GuardRecipe(on_failure="roll_back", max_rollbacks=2, rollback_lr_factor=0.5, probe_patience=1)
    guard = Guard(recipe)
    for step, score in enumerate((0.6, 0.7, 0.69)):
        guard.record_probe(step, score, 0.0)
    assert [guard.should_keep_checkpoint(step) for step in range(3)] == [False, True, False]
    for rollback in (1, 2):
        with pytest.raises(RollbackRequested) as rollback_request:
            guard.record_probe(9, 0.1, 0.0)
        assert rollback_request.value.step == 1
        assert guard.on_rollback() == {"rollbacks": rollback, "lr_scale": 0.5**rollback}
        assert (guard.state.dropped_probes, guard.state.last_score) == (0, 0.7)
        assert not guard.should_export_best()  # the run stands at the best step
        again = Guard(recipe)
        again.load_state_dict(guard.state_dict())
        guard = again
    with pytest.raises(TrainingError, match="after 2 rollbacks") as stop:
        guard.record_probe(9, 0.1, 0.0)
    assert not isinstance(stop.value, RollbackRequested)
    assert guard.should_export_best()


def test_there_is_no_going_back_without_a_probe():
    guard = Guard(GuardRecipe(on_failure="roll_back", confirm_log_lines=1, grace_steps=0))
    with pytest.raises(TrainingError, match="no probe gave a step") as stop:
        guard.on_log_line(1, HEALTHY | {"mean_cosine": 1.0})
    assert not isinstance(stop.value, RollbackRequested)
    assert "export/ holds the last teacher" in str(stop.value)
    assert not Guard(GuardRecipe(on_failure="roll_back", enabled=False)).may_roll_back


def test_after_a_collapse_the_best_probed_teacher_is_exported():
    """It may have come after the last probe, which was still good."""
    guard = Guard(GuardRecipe(confirm_log_lines=1, grace_steps=0))
    guard.record_probe(0, 0.7, 0.01)
    guard.record_probe(5, 0.69, 0.01)
    assert not guard.should_export_best()
    with pytest.raises(TrainingError, match="teacher of step 0"):
        guard.on_log_line(7, HEALTHY | {"mean_cosine": 1.0})
    assert guard.should_export_best()
    assert not guard.should_keep_checkpoint(0)


def test_a_disabled_guard_only_counts():
    guard = Guard(GuardRecipe(enabled=False, grace_steps=0, confirm_log_lines=1))
    guard.on_log_line(1, HEALTHY | {"mean_cosine": 1.0})
    assert guard.state.collapsed_log_lines == 1


def test_a_probe_drop_stops_when_it_stays():
    guard = Guard(GuardRecipe(probe_drop=0.1, probe_patience=2))
    for step, score in enumerate((0.6, 0.7, 0.55, 0.65)):
        guard.record_probe(step, score, 0.01)
    assert (guard.state.best_score, guard.state.best_step, guard.state.dropped_probes) == (0.7, 1, 0)
    guard.record_probe(4, 0.5, 0.01)
    with pytest.raises(TrainingError, match=r"0\.700 \(step 1\)"):
        guard.record_probe(5, math.nan, 0.0)
    assert guard.should_export_best()


def test_a_retention_drop_stops_when_it_stays():
    """The target rises all the while; the best teacher is of the last probe at which nothing was down."""
    guard = Guard(GuardRecipe(retention_drop=0.1, retention_errors=3, probe_patience=2))
    scores = [(0.5, 0.80, 0.9), (0.6, 0.82, 0.6), (0.7, 0.75, 0.9), (0.8, 0.70, 0.6), (0.9, 0.71, 0.9)]
    for step, (target, texture, place) in enumerate(scores):
        retention = {"texture": (texture, 0.01), "place": (place, 0.2)}  # of place, 0.3 is within three errors
        best = guard.is_best(step, target, retention)
        assert best == (step < 3)
        if step < 4:
            guard.record_probe(step, target, 0.01, retention)
    assert not guard.state.failed
    assert guard.should_export_best()
    with pytest.raises(
        TrainingError, match=r"texture fell from 0\.820 \(step 1\) to 0\.710 and stayed down for 2 p"
    ) as stop:
        guard.record_probe(4, target, 0.01, retention)
    assert "place" not in str(stop.value)
    assert (guard.state.best_step, guard.state.best_score) == (2, 0.7)
    assert "the teacher of step 2" in str(stop.value)


def test_drops_of_different_things_do_not_add_up():
    guard = Guard(GuardRecipe(retention_drop=0.1, probe_patience=2))
    guard.record_probe(0, 0.5, 0.0, {"texture": (0.8, 0.0), "place": (0.9, 0.0)})
    for step in range(1, 7):
        low = "texture" if step % 2 else "place"
        guard.record_probe(step, 0.5, 0.0, {"texture": (0.8, 0.0), "place": (0.9, 0.0)} | {low: (0.1, 0.0)})
    assert guard.should_export_best()


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_many_things_seldom_stops_a_run(seed):
    """400 runs of 12 probes of 12 things that did not change: most of the noise stays through a run, some does not."""
    rng = np.random.default_rng(seed)
    errors = np.concatenate([np.full(6, 0.005), np.full(6, 0.1)])  # of the first half, 0.05 is ten errors
    stopped = 0
    for _ in range(400):
        guard = Guard(GuardRecipe())
        lasting = rng.normal(size=12)
        for step in range(12):
            noise = 0.9 * lasting + 0.44 * rng.normal(size=12)  # together one standard error
            scores = 0.6 + errors * noise * (step > 0)
            try:
                guard.record_probe(step, 0.5, 0.03, {str(i): (scores[i], errors[i]) for i in range(12)})
            except TrainingError:
                stopped += 1
                break
    assert stopped <= 8


def test_retention_of_random_features_is_only_logged():
    guard = Guard(GuardRecipe(grace_steps=0, probe_patience=1), from_scratch=True)
    guard.record_probe(1, 0.5, 0.0, {"texture": (0.9, 0.0)})
    guard.record_probe(2, 0.6, 0.0, {"texture": (0.1, 0.0)})
    assert not guard.should_export_best()


def test_after_a_rollback_no_retention_probe_is_dropped():
    guard = Guard(GuardRecipe(on_failure="roll_back", probe_patience=1))
    guard.record_probe(0, 0.5, 0.0, {"texture": (0.9, 0.0)})
    with pytest.raises(RollbackRequested) as rollback_request:
        guard.record_probe(1, 0.6, 0.0, {"texture": (0.4, 0.0)})
    assert rollback_request.value.step == 0
    guard.on_rollback()
    assert not guard.should_export_best()
    assert guard.state.retention["texture"].best_score == 0.9


def test_a_checkpoint_without_retention_state_is_restored():
    guard = Guard(GuardRecipe())
    guard.record_probe(0, 0.5, 0.1)
    state = guard.state_dict()
    del state["retention"]
    guard.load_state_dict(state)
    guard.record_probe(1, 0.5, 0.1, {"texture": (0.4, 0.0)})
    assert guard.state.retention["texture"].best_step == 1
    again = Guard(GuardRecipe())
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again.state == guard.state


def test_retention_scores_are_read_from_a_log_line():
    line = {"probe": 0.5, "retention/sex": 0.8, "retention_error/sex": 0.1, "retention/patch_texture": 0.4}
    assert read_retention_scores(line | {"retention_error/patch_texture": 0.0}) == {
        "sex": (0.8, 0.1),
        "patch_texture": (0.4, 0.0),
    }


def test_what_new_weights_score_is_nothing_to_be_kept():
    scores = ((0, 0.5), (10, 0.1), (20, 0.05), (30, 0.2), (40, 0.1))
    guard = Guard(GuardRecipe(grace_steps=20, probe_patience=1), from_scratch=True)
    for step, score in scores[:4]:
        guard.record_probe(step, score, 0.0)
        assert guard.state.best_step == step
    with pytest.raises(TrainingError, match=r"from 0\.200 \(step 30\)"):
        guard.record_probe(*scores[4], 0.0)
    continued = Guard(GuardRecipe(grace_steps=20, probe_patience=1))
    continued.record_probe(*scores[0], 0.0)
    with pytest.raises(TrainingError, match=r"from 0\.500 \(step 0\)"):
        continued.record_probe(*scores[1], 0.0)


def test_noise_is_no_drop():
    guard = Guard(GuardRecipe(probe_drop=0.05, probe_patience=1))
    guard.record_probe(0, 0.7, 0.2)
    guard.record_probe(1, 0.4, 0.2)  # within two standard errors
    assert not guard.should_export_best()


def test_a_guard_goes_on_from_its_state():
    guard = Guard(GuardRecipe())
    guard.record_probe(0, 0.5, 0.1)
    again = Guard(GuardRecipe())
    again.load_state_dict(guard.state_dict())
    assert again.state == guard.state
    assert not again.is_best(3, 0.4)
    assert not again.is_best(3, math.nan)
