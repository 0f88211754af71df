"""The objective: copies, targets, teacher, anchor."""

from __future__ import annotations

import copy

import pytest
import torch

from brainfound.errors import RecipeError
from brainfound.pretraining.objectives import losses
from brainfound.pretraining.objectives.self_distillation import SelfDistillation
from brainfound.pretraining.slices import PretrainBatch
from brainfound.training import distributed
from brainfound.training.randomness import StepKey


def make(model, recipe, *overrides: str) -> SelfDistillation:
    content = recipe("objective.anchor_gram_weight=1.0", "objective.anchor_cls_weight=0.1", *overrides)
    return SelfDistillation(model.encoder, content.objective, content.views, num_steps=10, seed=0)


@pytest.fixture
def objective(model, recipe):
    return make(model, recipe)


KEY = StepKey(seed=0, step=0, micro_batch=0, rank=0)


def test_teacher_and_anchor_start_as_copies_heads_included(objective, model):
    for old, new in zip(objective.teacher.parameters(), objective.student.parameters(), strict=True):
        assert torch.equal(old, new)
        assert old.data_ptr() != new.data_ptr()
    for old, new in zip(objective.anchor.parameters(), model.encoder.parameters(), strict=True):
        assert torch.equal(old, new)
    dino, ibot = objective.student.heads["dino"], objective.student.heads["ibot"]
    assert not torch.equal(dino.last_layer.weight, ibot.last_layer.weight)


def test_every_parameter_of_the_student_gets_a_gradient_and_nothing_else_does(objective, batch):
    loss, _ = objective.loss(objective.student, batch, KEY)
    loss.backward()
    assert [n for n, p in objective.student.named_parameters() if p.grad is None] == []
    for frozen in (objective.teacher, objective.anchor):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


def test_shared_head_is_one_module_and_trains(model, recipe, batch):
    objective = make(model, recipe, "objective.shared_head=true")
    assert objective.student.ibot_head is objective.student.heads["dino"]
    loss, _ = objective.loss(objective.student, batch, KEY)
    loss.backward()
    assert all(p.grad is not None for p in objective.student.parameters())


def test_a_step_is_a_function_of_its_key(objective, batch):
    def loss(step: int) -> float:
        torch.manual_seed(0)
        return float(objective.loss(objective.student, batch, StepKey(0, step, 0, 0))[0].detach())

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)


def test_a_teacher_equal_to_the_student_does_not_drift(objective):
    before = copy.deepcopy(objective.teacher)
    for step in range(5):
        objective.after_step(step, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), objective.teacher.parameters(), strict=True))


def test_parts_of_the_loss_add_up_and_match_the_teacher_targets(objective, batch):
    loss, metrics = objective.loss(objective.student, batch, KEY)
    names = ("dino_global", "dino_local", "ibot", "koleo", "anchor_gram", "anchor_cls")
    total = sum(objective.weight(name) * metrics[f"loss_{name}"] for name in names)
    torch.testing.assert_close(loss.detach(), total)
    targets, _ = objective._last
    expected = losses.sinkhorn_knopp(targets.cls_projection.scores(), 0.04)
    torch.testing.assert_close(targets.cls_targets.take(slice(None)), expected)


def test_the_anchor_is_silent_at_the_start_and_speaks_when_the_student_moves(model, recipe, batch):
    objective = make(model, recipe, "objective.drop_path=0")
    _, metrics = objective.loss(objective.student, batch, KEY)
    assert metrics["loss_anchor_gram"] < 1e-10
    assert metrics["loss_anchor_cls"].abs() < 1e-5
    with torch.no_grad():
        for parameter in objective.student.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    _, metrics = objective.loss(objective.student, batch, KEY)
    assert metrics["loss_anchor_gram"] > 1e-3


@pytest.mark.parametrize(("probability", "num_slices"), [(1.0, 8), (0.75, 1)])
def test_an_anchor_without_an_unmasked_crop_is_refused(model, recipe, probability, num_slices):
    masked = f"objective.mask_probability={probability}"
    with pytest.raises(RecipeError, match="mask_probability"):
        make(model, recipe, masked).require_batch_size(num_slices)
    make(model, recipe, masked, "objective.anchor_gram_weight=0", "objective.anchor_cls_weight=0").require_batch_size(
        num_slices
    )
    make(model, recipe).require_batch_size(num_slices)


@pytest.mark.parametrize(
    "override",
    [
        "objective.teacher_temperature=[0,0.07]",
        "objective.teacher_temperature=[0.04,.nan]",
        "objective.momentum=[0.9,1.1]",
        "objective.mask_ratio=[0.5,0.1]",
        "objective.mask_ratio=[-1,0.5]",
    ],
)
def test_ranges_that_make_no_sense_are_refused(recipe, override):
    with pytest.raises(RecipeError, match=override.partition("=")[0].partition(".")[2]):
        recipe(override)


def test_something_must_be_learnt(recipe):
    with pytest.raises(RecipeError, match="nothing to learn"):
        recipe(*(f"objective.{name}_weight=0" for name in ("dino", "ibot", "koleo", "anchor_gram", "anchor_cls")))


def test_parts_without_weight_are_not_computed(model, recipe, batch, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("computed for nothing")

    for name in ("koleo", "gram_loss"):
        monkeypatch.setattr(losses, name, refuse)
    objective = make(model, recipe, "objective.koleo_weight=0", "objective.anchor_gram_weight=0")
    _, metrics = objective.loss(objective.student, batch, KEY)
    assert "loss_anchor_cls" in metrics
    assert not {"loss_koleo", "loss_anchor_gram"} & metrics.keys()


def test_koleo_does_not_pair_slices_of_a_session(objective, batch):
    output_cls = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    sessions = torch.zeros(8, dtype=torch.long)
    one_session = PretrainBatch(batch.pixels, batch.present, sessions)
    _, metrics = objective.loss(objective.student, one_session, KEY)
    assert metrics["loss_koleo"] == 0
    assert losses.koleo(output_cls) != 0


def test_koleo_may_pair_slices_of_a_session_where_the_recipe_says_so(model, recipe, batch):
    one_session = PretrainBatch(batch.pixels, batch.present, torch.zeros(8, dtype=torch.long))
    objective = make(model, recipe, "objective.koleo_within_sessions=true")
    _, metrics = objective.loss(objective.student, one_session, KEY)
    assert metrics["loss_koleo"] != 0


@pytest.mark.parametrize("over_ranks", [True, False])
def test_koleo_looks_at_all_ranks_or_at_its_own(model, recipe, batch, monkeypatch, over_ranks):
    gathered = []
    monkeypatch.setattr(distributed, "gather_rows", lambda rows: gathered.append(rows) or rows)
    objective = make(model, recipe, f"objective.koleo_over_ranks={over_ranks}".lower())
    objective.loss(objective.student, batch, KEY)
    assert bool(gathered) == over_ranks


def test_koleo_learns_whether_autocast_may_touch_it(model, recipe, batch, monkeypatch):
    told = []
    koleo = losses.koleo
    monkeypatch.setattr(losses, "koleo", lambda cls, groups, in_float32: told.append(in_float32) or koleo(cls, groups))
    for value in ("true", "false"):
        objective = make(model, recipe, f"objective.koleo_in_float32={value}")
        objective.loss(objective.student, batch, KEY)
    assert told == [True, True, False, False]


def test_heads_drawn_apart_differ_and_the_encoders_do_not(model, recipe):
    objective, again = (make(model, recipe, "objective.copied_heads=false") for _ in range(2))
    student, teacher = objective.student, objective.teacher
    for old, new in zip(teacher.encoder.parameters(), student.encoder.parameters(), strict=True):
        assert torch.equal(old, new)
    prototypes = [head.last_layer.weight for one in (student, teacher) for head in one.heads.values()]
    assert all(not torch.equal(a, b) for at, a in enumerate(prototypes) for b in prototypes[:at])
    for old, new in zip(teacher.parameters(), again.teacher.parameters(), strict=True):
        assert torch.equal(old, new)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_gauges_of_a_healthy_and_a_constant_teacher(objective, batch):
    objective.loss(objective.student, batch, KEY)
    health_metrics = objective.health_metrics()
    assert health_metrics["effective_rank"] > 2
    assert 0.1 < health_metrics["teacher_entropy"] <= 1
    with torch.no_grad():
        objective.teacher.encoder.backbone.layernorm.weight.zero_()
        objective.teacher.encoder.backbone.layernorm.bias.fill_(1)
    objective.loss(objective.student, batch, KEY)
    health_metrics = objective.health_metrics()
    assert health_metrics["effective_rank"] == 0
    assert health_metrics["mean_cosine"] == pytest.approx(1)


def test_state_round_trip(model, recipe, objective):
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            parameter.add_(1)
    fresh = make(model, recipe)
    fresh.load_state_dict({name: tensor.clone() for name, tensor in objective.state_dict().items()})
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.teacher.parameters(), objective.teacher.parameters(), strict=True)
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({})


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("views.num_local=0",),
        ("views.num_local=7", "views.local_size=8"),  # pieces of several crops, the last one smaller
        ("objective.mask_probability=0.05",),  # of few crops: one pass masks nothing
        ("objective.mask_probability=0.95",),  # one pass shows nothing whole
    ],
)
def test_separate_passes_change_nothing_but_memory(model, recipe, batch, settings):
    objective = make(model, recipe, "objective.drop_path=0", *settings)

    def step(separate: bool):
        objective.separate_passes = separate
        objective.student.zero_grad()
        loss, metrics = objective.loss(objective.student, batch, KEY)
        (loss * 0.5).backward()
        return loss, metrics, {name: p.grad for name, p in objective.student.named_parameters()}

    (loss, packed, expected), (same, separate, found) = step(False), step(True)
    torch.testing.assert_close(same, loss)
    assert separate.keys() == packed.keys()
    for name, value in packed.items():
        torch.testing.assert_close(separate[name], value)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
