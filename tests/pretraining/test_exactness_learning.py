"""Schedules, parameter groups, AdamW, clipping and the EMA against closed formulas.

Where we differ from DINOv2 (arXiv 2304.07193) on purpose, a test says so by name:
the warm-up starts at peak / steps, not at 0, and the last step has the final rate; weight decay is
constant; tokens do not decay (as in BEiT, 2106.08254); the mask token, which released checkpoints
leave at zero, learns at the full rate with the heads.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2WithRegistersConfig

from brainfound.models import BrainFoundConfig, BrainFoundModel
from brainfound.pretraining.objectives.networks import DistillationModel
from brainfound.pretraining.objectives.self_distillation import SelfDistillation
from brainfound.training import optim
from brainfound.training.optim import OptimRecipe, make_optimizer, parameter_groups

PEAK, FINAL, STEPS, WARMUP, WAIT = 3e-4, 1e-6, 37, 5, 8


# Schedules, at every step of a run


def half_cosine(start: float, end: float, num: int) -> np.ndarray:
    """DINOv2's schedule: `num` values of a half cosine, of which `end` would be the next."""
    return end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.arange(num) / num))


def every_step(role: str, **changes) -> list[float]:
    settings = {"peak": PEAK, "final": FINAL, "num_steps": STEPS, "warmup_steps": WARMUP, "head_warmup_steps": WAIT}
    return [optim.learning_rate(step, role, **(settings | changes)) for step in range(STEPS)]


def rise_and_fall(num: int) -> np.ndarray:
    """A line of `WARMUP` steps up to the peak, then half a cosine whose last value is the final rate."""
    rise = PEAK * np.arange(1, WARMUP + 1) / WARMUP
    fall = np.append(half_cosine(PEAK, FINAL, num - WARMUP - 1), FINAL)
    return np.concatenate([rise, fall])


def test_what_is_new_learns_over_the_whole_run():
    np.testing.assert_allclose(every_step("new"), rise_and_fall(STEPS), rtol=1e-12)


def test_the_backbone_waits_and_then_learns_over_what_is_left():
    np.testing.assert_allclose(
        every_step("backbone"), np.append(np.zeros(WAIT), rise_and_fall(STEPS - WAIT)), rtol=1e-12
    )


def test_the_last_layer_is_frozen_and_then_joins_the_curve():
    expected = rise_and_fall(STEPS)
    expected[:11] = 0
    np.testing.assert_allclose(every_step("last_layer", freeze_last_layer_steps=11), expected, rtol=1e-12)


def test_linear_and_constant_curves():
    rise = PEAK * np.arange(1, WARMUP + 1) / WARMUP
    line = np.append(rise, np.linspace(PEAK, FINAL, STEPS - WARMUP))
    np.testing.assert_allclose(every_step("new", shape="linear"), line, rtol=1e-12)
    np.testing.assert_allclose(every_step("new", shape="constant"), np.append(rise, [PEAK] * (STEPS - WARMUP)))


def test_without_a_warmup_the_first_step_has_the_peak():
    assert every_step("new", warmup_steps=0)[0] == PEAK
    assert every_step("new", warmup_steps=0)[-1] == FINAL


def test_the_differences_from_the_published_curve_are_those_that_are_reported():
    """DINOv2 warms up on linspace(0, peak) and ends one step short of the final rate."""
    published = np.append(np.linspace(0, PEAK, WARMUP), half_cosine(PEAK, FINAL, STEPS - WARMUP))
    ours = np.array(every_step("new"))
    assert published[0] == 0 < ours[0]
    assert published[-1] > ours[-1] == FINAL
    assert np.abs(published - ours).max() <= PEAK / WARMUP


def test_momentum_and_temperature_at_every_step():
    momentum = [optim.cosine(step, 0.992, 1.0, STEPS) for step in range(STEPS)]
    np.testing.assert_allclose(momentum, half_cosine(0.992, 1.0, STEPS), rtol=1e-14)
    temperature = [optim.linear(step, 0.04, 0.07, 10) for step in range(STEPS)]
    np.testing.assert_allclose(temperature, np.append(np.linspace(0.04, 0.07, 11), [0.07] * (STEPS - 11)), rtol=1e-12)


def test_the_objective_reports_the_same_curves(model, recipe):
    content = recipe("objective.momentum=[0.95, 1.0]", "objective.teacher_temperature_warmup_steps=7")
    objective = SelfDistillation(model.encoder, content.objective, content.views, num_steps=20, seed=0)
    reported = [objective.schedule(step) for step in range(20)]
    np.testing.assert_allclose([r["momentum"] for r in reported], half_cosine(0.95, 1.0, 20))
    temperature = np.append(np.linspace(0.04, 0.07, 8), [0.07] * 12)
    np.testing.assert_allclose([r["teacher_temperature"] for r in reported], temperature)


def test_the_rate_grows_with_the_square_root_of_the_batch():
    for batch in (1, 64, 128, 3072):
        assert optim.effective_lr(2e-4, batch) == pytest.approx(2e-4 * (batch / 128) ** 0.5, rel=1e-12)


# Parameter groups on the library's real ViTs


def backbone_config(kind: str):
    small = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    if kind == "registers":
        return Dinov2WithRegistersConfig(**small, num_register_tokens=3)
    return Dinov2Config(**small, use_swiglu_ffn=kind == "swiglu")


@pytest.fixture(params=["plain", "swiglu", "registers"])
def student(request, recipe) -> DistillationModel:
    torch.manual_seed(0)
    model = BrainFoundModel(BrainFoundConfig(backbone_config=backbone_config(request.param).to_dict()))
    objective = recipe().objective
    return DistillationModel(model.encoder, objective.head, objective.shared_head, objective.drop_path, seed=0)


def grouped(student: nn.Module, settings: OptimRecipe) -> dict[int, dict]:
    """id of a parameter → its group."""
    groups = parameter_groups(student.named_parameters(), 4, settings)
    return {id(parameter): group for group in groups for parameter in group["params"]}


def kinds(student: DistillationModel) -> dict[int, tuple[str, int | None]]:
    """id of a parameter → (what it is, its layer), told by the module that owns it and not by a name."""
    found: dict[int, tuple[str, int | None]] = {}
    backbone = student.encoder.backbone
    layer_of = {id(p): number for number, block in enumerate(backbone.encoder.layer, 1) for p in block.parameters()}
    layer_of |= {id(p): 5 for p in backbone.layernorm.parameters()}
    layer_of |= {id(p): 0 for p in backbone.embeddings.parameters()}
    for module in student.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm):
                kind = "norm"
            elif isinstance(module, nn.Conv2d):
                kind = "patch bias" if name == "bias" else "patch kernel"
            elif isinstance(module, nn.Linear):
                kind = "bias" if name == "bias" else "matrix"
            elif parameter.ndim == 1:
                kind = "layer scale"
            else:
                kind = "token"
            found[id(parameter)] = (kind, layer_of.get(id(parameter)))
    return found


def test_every_parameter_is_in_exactly_one_group(student):
    listed = [
        id(p) for group in parameter_groups(student.named_parameters(), 4, OptimRecipe()) for p in group["params"]
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in student.parameters()} == set(kinds(student))


def test_learning_rates_fall_layer_by_layer_as_in_beit(student):
    """decay ** (layers + 1 − layer): embeddings are layer 0, block i is layer i, the last norm layers + 1."""
    groups, what = grouped(student, OptimRecipe(layer_decay=0.7, patch_embed_scale=0.2)), kinds(student)
    embeddings = student.encoder.backbone.embeddings
    new = {id(embeddings.mask_token), id(embeddings.patch_embeddings.contrast_embedding.weight)}
    seen = set()
    for parameter in student.parameters():
        kind, layer = what[id(parameter)]
        scale = 1.0 if layer is None or id(parameter) in new else 0.7 ** (4 + 1 - layer)
        if kind in ("patch kernel", "patch bias"):
            scale *= 0.2
        assert groups[id(parameter)]["lr_scale"] == pytest.approx(scale, rel=1e-12), (kind, layer)
        seen.add((kind, layer))
    assert {layer for _, layer in seen} == {None, 0, 1, 2, 3, 4, 5}
    assert groups[id(embeddings.cls_token)]["lr_scale"] == pytest.approx(0.7**5)
    assert groups[id(embeddings.position_embeddings)]["lr_scale"] == pytest.approx(0.7**5)


def test_only_matrices_and_patch_kernels_decay(student):
    groups, what = grouped(student, OptimRecipe()), kinds(student)
    decaying = {what[id(p)][0] for p in student.parameters() if groups[id(p)]["decays"]}
    resting = {what[id(p)][0] for p in student.parameters() if not groups[id(p)]["decays"]}
    assert decaying == {"matrix", "patch kernel"}
    assert resting == {"bias", "patch bias", "norm", "layer scale", "token"}


def test_roles(student):
    groups = grouped(student, OptimRecipe())
    embeddings = student.encoder.backbone.embeddings
    new = [embeddings.mask_token, embeddings.patch_embeddings.contrast_embedding.weight]
    new += [p for head in student.heads.values() for p in head.mlp.parameters()]
    last = [head.last_layer.weight for head in student.heads.values()]
    roles = {id(p): "new" for p in new} | {id(p): "last_layer" for p in last}
    for parameter in student.parameters():
        assert groups[id(parameter)]["role"] == roles.get(id(parameter), "backbone")


# One optimiser step by hand


def adamw_by_hand(weights, gradients_per_step, rates, decay, beta1, beta2):
    """Loshchilov and Hutter, algorithm 2, with the decay apart from the gradient; eps 1e-8 outside of the root."""
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step, (gradient, rate) in enumerate(zip(gradients_per_step, rates, strict=True), start=1):
        weights = weights - rate * decay * weights
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        unbiased = second / (1 - beta2**step)
        weights = weights - rate * (first / (1 - beta1**step)) / (np.sqrt(unbiased) + 1e-8)
    return weights


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_adamw_with_decoupled_decay(dtype, tolerance):
    """Rates change between the steps and may be 0 (a waiting backbone): the moments grow, the weight stays."""
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal((5, 3)), rng.standard_normal((4, 5, 3))
    rates = [0.0, 1e-2, 2e-2, 5e-3]
    for decays in (True, False):
        parameter = nn.Parameter(torch.tensor(start, dtype=dtype))
        group = {"params": [parameter], "role": "backbone", "lr_scale": 0.5, "decays": decays}
        optimizer = make_optimizer([group], OptimRecipe(beta1=0.85, beta2=0.97))
        for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.param_groups[0]["weight_decay"] = 0.3 if decays else 0.0
            parameter.grad = torch.tensor(gradient, dtype=dtype)
            optimizer.step()
            if step == 0:
                np.testing.assert_array_equal(
                    parameter.detach().numpy(), start.astype(parameter.detach().numpy().dtype)
                )
        expected = adamw_by_hand(start, gradients, rates, 0.3 if decays else 0.0, 0.85, 0.97)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


# Clipping and the teacher


def test_each_submodule_is_clipped_on_its_own(model, recipe):
    """Backbone, DINO head and iBOT head are the clip groups, and hold every parameter once."""
    content = recipe()
    objective = SelfDistillation(model.encoder, content.objective, content.views, num_steps=4, seed=0)
    groups = objective.clip_groups()
    students = objective.student
    expected = {
        "backbone": students.encoder.parameters(),
        "dino_head": students.heads["dino"].parameters(),
        "ibot_head": students.heads["ibot"].parameters(),
    }
    assert {name: [id(p) for p in parameters] for name, parameters in groups.items()} == {
        name: [id(p) for p in parameters] for name, parameters in expected.items()
    }


def test_the_teacher_follows_the_moving_average_at_every_step(model, recipe):
    """In double precision over a whole run: the weights are the sum of all students with the published weights."""
    content = recipe("objective.momentum=[0.7, 1.0]", "objective.anchor_gram_weight=0", "objective.anchor_cls_weight=0")
    steps = 5
    objective = SelfDistillation(model.encoder, content.objective, content.views, num_steps=steps, seed=0)
    expected = [p.detach().double().numpy() for p in objective.teacher.parameters()]
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        with torch.no_grad():
            for parameter in objective.student.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        taken = float(step != 3)  # one step is skipped
        momentum = 1 - (1 - half_cosine(0.7, 1.0, steps)[step]) * taken
        expected = [
            momentum * old + (1 - momentum) * new.detach().double().numpy()
            for old, new in zip(expected, objective.student.parameters(), strict=True)
        ]
        before = copy.deepcopy(objective.teacher.state_dict())
        objective.after_step(step, torch.tensor(taken))
        if not taken:
            assert all(torch.equal(before[name], value) for name, value in objective.teacher.state_dict().items())
    for teacher, value in zip(objective.teacher.parameters(), expected, strict=True):
        np.testing.assert_allclose(teacher.detach().numpy(), value, rtol=1e-6, atol=1e-6)
