"""The moving average, with the operations of a CPU and with those of a GPU."""

import pytest
import torch

from brainfound.pretraining.objectives import ema as averaging
from brainfound.pretraining.objectives.ema import ema_update


def tensors(seed, count=70):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=generator) for _ in range(count)]


class SaysItIsOnAGpu(list):
    """A list whose first tensor claims another device; the operations are the same ones."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return Claim(item) if index == 0 else item


class Claim:
    def __init__(self, tensor):
        self.device = torch.device("cuda")


@pytest.fixture(params=["one by one", "many at once"])
def route(request, monkeypatch):
    if request.param == "many at once":
        monkeypatch.setattr(averaging, "to_local_tensors", lambda values: SaysItIsOnAGpu(values))


@pytest.mark.usefixtures("route")
def test_it_is_the_formula():
    old, new = tensors(0), tensors(1)
    before = [value.clone() for value in old]
    ema_update(old, new, torch.tensor(0.3))
    for average, start, value in zip(old, before, new, strict=True):
        torch.testing.assert_close(average, 0.7 * start + 0.3 * value)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("seed", "weight"), [(0, 0.3), (1, 0.0)], ids=["equal", "no weight"])
def test_nothing_moves_by_a_bit(seed, weight):
    old, new = tensors(0), tensors(seed)
    ema_update(old, new, torch.tensor(weight))
    assert all(torch.equal(average, start) for average, start in zip(old, tensors(0), strict=True))
