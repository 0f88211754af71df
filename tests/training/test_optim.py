"""Parameter groups: everything once, at the right rate."""

from __future__ import annotations

import pytest
import torch

from brainfound.pretraining.objectives.encoder_with_heads import DistillationModel
from brainfound.training.optim import (
    OptimRecipe,
    allocate_moments,
    clip_gradients,
    make_optimizer,
    parameter_groups,
    parameter_settings,
)


@pytest.fixture
def student(model, recipe):
    objective = recipe().objective
    return DistillationModel(model.encoder, objective.head, objective.shared_head, objective.drop_path, seed=0)


def traits(student, part: str, settings: OptimRecipe):
    ((name, parameter),) = [(n, p) for n, p in student.named_parameters() if n.endswith(part)]
    return parameter_settings(name, parameter, num_layers=2, recipe=settings)


def test_groups_hold_every_parameter_exactly_once(student):
    groups = parameter_groups(student.named_parameters(), 2, OptimRecipe())
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in student.parameters())
    assert len(grouped) == len(set(grouped))


def test_layers_learn_slower_towards_the_input(student):
    settings = OptimRecipe(layer_decay=0.5, patch_embed_scale=0.2)
    scales = {
        part: traits(student, part, settings).lr_scale
        for part in (
            "backbone.layernorm.weight",
            "layer.1.norm1.weight",
            "layer.0.norm1.weight",
            "cls_token",
            "projection.weight",
        )
    }
    assert scales == {
        "backbone.layernorm.weight": 1.0,
        "layer.1.norm1.weight": 0.5,
        "layer.0.norm1.weight": 0.25,
        "cls_token": 0.125,
        "projection.weight": 0.125 * 0.2,
    }


def test_what_the_checkpoint_does_not_bring_is_new_and_learns_at_the_full_rate(student):
    for part in ("mask_token", "contrast_embedding.weight", "heads.ibot.mlp.0.weight"):
        assert (traits(student, part, OptimRecipe()).role, traits(student, part, OptimRecipe()).lr_scale) == (
            "new",
            1.0,
        )
    assert traits(student, "heads.dino.last_layer.weight", OptimRecipe()).role == "last_layer"
    assert traits(student, "layer.0.norm1.weight", OptimRecipe()).role == "backbone"


def test_only_matrices_decay(student):
    decaying = {name for name, p in student.named_parameters() if parameter_settings(name, p, 2, OptimRecipe()).decays}
    assert "encoder.backbone.embeddings.patch_embeddings.projection.weight" in decaying
    assert "heads.dino.mlp.0.weight" in decaying
    for part in ("bias", "norm", "lambda1", "token", "position_embeddings", "contrast_embedding"):
        assert not [name for name in decaying if part in name]


def test_an_optimiser_state_fits_a_second_one(student):
    def make():
        return make_optimizer(parameter_groups(student.named_parameters(), 2, OptimRecipe()), OptimRecipe())

    first = make()
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    second = make()
    second.load_state_dict(first.state_dict())
    assert [g["role"] for g in second.param_groups] == [g["role"] for g in first.param_groups]
    assert len(second.state) == len(list(student.parameters()))


def test_moments_made_beforehand_are_those_of_the_first_step():
    def two_steps(beforehand):
        torch.manual_seed(0)
        layer, untouched = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        groups = [{"params": [*layer.parameters(), *untouched.parameters()]}]
        optimizer = make_optimizer(groups, OptimRecipe())
        if beforehand:
            allocate_moments(optimizer)
        for _ in range(2):
            layer(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        weights = [*layer.parameters(), *untouched.parameters()]
        return weights, [optimizer.state[parameter] for parameter in layer.parameters()]

    weights, moments = two_steps(beforehand=True)
    expected, expected_moments = two_steps(beforehand=False)
    assert all(map(torch.equal, weights, expected))
    assert [m.keys() for m in moments] == [m.keys() for m in expected_moments]
    for found, wanted in zip(moments, expected_moments, strict=True):
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)


def test_moments_are_made_for_adamw_alone():
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    allocate_moments(optimizer)
    assert not optimizer.state


def test_each_group_is_clipped_by_its_own_norm():
    large, small = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    large.grad, small.grad = torch.full((4,), 10.0), torch.full((4,), 0.5)
    norms = clip_gradients({"large": [large], "small": [small]}, 2.0)
    assert {name: norm.item() for name, norm in norms.items()} == {"large": 20.0, "small": 1.0}
    torch.testing.assert_close(large.grad, torch.full((4,), 1.0))
    assert torch.equal(small.grad, torch.full((4,), 0.5))
