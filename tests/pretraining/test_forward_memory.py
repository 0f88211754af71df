"""Memory of a forward pass, against sizes that are known."""

from __future__ import annotations

import gc

import torch

from brainfound.pretraining.dry_run.costs import ForwardMemory, LiveTensors


def test_live_tensors_are_counted_while_they_live():
    before = torch.zeros(1000)
    with LiveTensors() as live:
        view = before[:10]
        before.add_(1)
        assert live.num_bytes == 0
        first = before + 1
        second = first * 2
        del first
        gc.collect()
        third = second.exp()
    assert live.num_bytes == 2 * 4000
    assert live.peak_bytes == 2 * 4000
    assert len(view) == 10
    assert len(third) == 1000


def test_what_the_forward_pass_keeps_for_the_backward_pass_is_counted():
    weight = torch.zeros(50, 50, requires_grad=True)

    def loss(values):
        return (values @ weight).exp().sum()

    forward = ForwardMemory(loss, torch.device("cpu"))
    answer = forward(torch.zeros(10, 50))
    # The product is needed no more once its exponential is there, but it was there.
    assert forward.peak_bytes >= 2 * 10 * 50 * 4
    measured = forward.peak_bytes
    answer.backward()
    forward(torch.zeros(1000, 50))
    assert forward.peak_bytes == measured


def test_a_part_of_the_batch_is_measured_for_itself_and_leaves_no_gradient():
    model = torch.nn.Linear(50, 50, bias=False)

    def loss(model, values):
        model(values).sum().backward()
        return model(values).exp().sum()

    forward = ForwardMemory(loss, torch.device("cpu"), part=lambda values: values[:10])
    forward(model, torch.ones(40, 50))
    assert forward.part_peak_bytes is not None
    assert forward.part_peak_bytes - 2 * 50 * 50 * 4 <= 4 * 10 * 50 * 4
    assert forward.peak_bytes - forward.part_peak_bytes >= 30 * 50 * 4
    # Of the whole batch, once.
    assert torch.equal(model.weight.grad, torch.full((50, 50), 40.0))
