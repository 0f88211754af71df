"""`brainfound.evaluate` is a room and a verb at once."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import brainfound.evaluate
from brainfound.callable_room import make_callable


def test_the_room_is_a_module_and_can_be_called():
    assert isinstance(brainfound.evaluate, ModuleType)
    assert callable(brainfound.evaluate)
    assert brainfound.evaluate.metrics.dice([1], [1]) == 1.0
    assert brainfound.evaluate.dice is brainfound.evaluate.metrics.dice


def test_a_call_reaches_the_function_with_its_arguments(monkeypatch):
    room, target = ModuleType("room_under_test"), ModuleType("target_under_test")
    target.verb = lambda *args, **kwargs: (args, kwargs)
    monkeypatch.setitem(sys.modules, "room_under_test", room)
    monkeypatch.setitem(sys.modules, "target_under_test", target)
    make_callable("room_under_test", "target_under_test:verb")
    assert room(1, data="store") == ((1,), {"data": "store"})
    with pytest.raises(AttributeError):
        _ = room.not_there


def test_scores_can_be_computed_without_torch():
    program = (
        "import sys, brainfound.evaluate, brainfound.predict; "
        "assert callable(brainfound.predict); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
