"""The state of the optimiser and clipping; `tests/pretraining/test_exactness_learning.py` has the parameter groups."""

from __future__ import annotations

import pytest
import torch

from brainfound.pretraining.objectives.networks import DistillationModel
from brainfound.training.optim import OptimRecipe, allocate_moments, clip_gradients, make_optimizer, parameter_groups


@pytest.fixture
def student(model, recipe):
    objective = recipe().objective
    return DistillationModel(model.encoder, objective.head, objective.shared_head, objective.drop_path, seed=0)


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
