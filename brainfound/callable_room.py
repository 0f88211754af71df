"""Rooms that can be called: ``brainfound.evaluate(…)`` beside ``brainfound.evaluate.metrics``.

Two verbs of the Python API, `evaluate` and `predict`, have the name of a room. Were the function put
into the package under that name, it would hide the room, and which of the two a reader got would depend
on what had been imported before. So the room itself answers calls: Python looks up ``__call__`` on an
object's class, and the class of a module may be replaced by a subclass of `types.ModuleType`
(Python data model, "Customizing module attribute access").
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class CallableRoom(ModuleType):
    """A package that forwards a call to one function, imported at the first call.

    The import is late for two reasons: the function may live on a higher floor than the room (the room
    must not import it), and it may need torch, which importing the room must not.
    """

    _function_module: str
    _function_name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = getattr(importlib.import_module(self._function_module), self._function_name)
        return function(*args, **kwargs)


def make_callable(room: str, function: str) -> None:
    """Make the imported package `room` forward calls to `function` (``"package.module:name"``).

    >>> import brainfound.evaluate
    >>> callable(brainfound.evaluate), callable(brainfound.evaluate.metrics)
    (True, False)
    """
    module = sys.modules[room]
    module.__class__ = CallableRoom
    assert isinstance(module, CallableRoom)
    module._function_module, _, module._function_name = function.partition(":")
