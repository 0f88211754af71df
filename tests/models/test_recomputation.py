"""Recomputation that repeats no product: what it keeps, and what it refuses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from brainfound.models.block_runner import checkpoint_except_matmuls


class Seen(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return [torch.randn(4, 4, requires_grad=True) for _ in range(3)]


def branch(x, first, second):
    return torch.exp((x.softmax(-1) @ first).tanh() @ second)


def test_products_are_kept_and_the_rest_is_done_again(tensors):
    expected = torch.autograd.grad(branch(*tensors).sum(), tensors)
    with Seen() as plain:
        torch.autograd.grad(branch(*tensors).sum(), tensors)
    with Seen() as again:
        found = torch.autograd.grad(checkpoint_except_matmuls(branch, *tensors).sum(), tensors)
    assert all(map(torch.equal, found, expected))
    assert again.names.count("aten::mm") == plain.names.count("aten::mm") == 2 + 4
    # The last operation is not done again: its result is what the function gave.
    assert again.names.count("aten::tanh") == 2 * plain.names.count("aten::tanh") == 2


def test_what_is_no_product_may_happen_more_often_in_one_of_the_passes(tensors):
    """As the gathering of weights does, which one pass finds done and another not."""
    calls = []

    def with_something_else(x, first, second):
        calls.append(0)
        with torch.no_grad():
            for _ in calls:
                torch.zeros(3).cos_()
        return branch(x, first, second)

    expected = torch.autograd.grad(branch(*tensors).sum(), tensors)
    found = torch.autograd.grad(checkpoint_except_matmuls(with_something_else, *tensors).sum(), tensors)
    assert len(calls) == 2
    assert all(map(torch.equal, found, expected))


def test_attention_of_other_libraries_is_kept_and_what_moves_weights_is_not(tensors):
    library = torch.library.Library("brainfound_test", "FRAGMENT")
    calls = {"flash_forward": 0, "all_gather": 0}
    for name in calls:
        library.define(f"{name}(Tensor x) -> Tensor")

        def doubled(x, name=name):
            calls[name] += 1
            return x * 2

        library.impl(name, doubled, "CPU")
    operations = torch.ops.brainfound_test

    def function(x, first, second):
        with torch.no_grad():
            operations.flash_forward(x)
            operations.all_gather(x)
        return branch(x, first, second)

    checkpoint_except_matmuls(function, *tensors).sum().backward()
    assert calls == {"flash_forward": 1, "all_gather": 2}


def test_a_product_whose_result_was_changed_is_not_used_again(tensors):
    def in_place(x, first, second):
        return (x @ first).mul_(2).cos() @ second

    with pytest.raises(RuntimeError, match="aten::mm was changed in place"):
        checkpoint_except_matmuls(in_place, *tensors).sum().backward()


def test_other_products_than_at_first_are_an_error(tensors):
    calls = []

    def changing(x, first, second):
        calls.append(0)
        extra = x @ first if len(calls) == 1 else torch.addmm(x, x, first)
        return (extra.cos() @ second).cos()

    with pytest.raises(RuntimeError, match="aten::addmm came where aten::mm had been"):
        checkpoint_except_matmuls(changing, *tensors).sum().backward()


def test_more_products_than_at_first_are_an_error(tensors):
    calls = []

    def growing(x, first, second):
        calls.append(0)
        if len(calls) > 1:
            with torch.no_grad():
                x @ first @ first
        return (x @ first).cos()

    with pytest.raises(RuntimeError, match="once more than at first"):
        checkpoint_except_matmuls(growing, *tensors).sum().backward()
