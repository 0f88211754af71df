"""BrainFound: 2-D vision transformers adapted to 3-D brain MRI, slice by slice.

The public face. Names are loaded on first use, so that ``import brainfound`` does not import torch.
`evaluate` and `predict` are rooms that can be called, see `brainfound.callable_room`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from brainfound import evaluate, predict
    from brainfound.data.cohort import Cohort
    from brainfound.data.prepare import prepare
    from brainfound.data.preprocessing import Preprocessing
    from brainfound.data.split_file import Split
    from brainfound.data.stack import Stack
    from brainfound.data.store import Store
    from brainfound.models import (
        BrainFoundConfig,
        BrainFoundForClassification,
        BrainFoundForRegression,
        BrainFoundForSegmentation,
        BrainFoundModel,
    )
    from brainfound.predict.loading import load
    from brainfound.train.finetune import finetune
    from brainfound.train.pretrain import pretrain

__all__ = [
    "BrainFoundConfig",
    "BrainFoundForClassification",
    "BrainFoundForRegression",
    "BrainFoundForSegmentation",
    "BrainFoundModel",
    "Cohort",
    "Preprocessing",
    "Split",
    "Stack",
    "Store",
    "__version__",
    "evaluate",
    "finetune",
    "load",
    "predict",
    "prepare",
    "pretrain",
]

_MODULES = {
    "Cohort": "brainfound.data.cohort",
    "Preprocessing": "brainfound.data.preprocessing",
    "Split": "brainfound.data.split_file",
    "Stack": "brainfound.data.stack",
    "Store": "brainfound.data.store",
    "prepare": "brainfound.data.prepare",
    "BrainFoundConfig": "brainfound.models",
    "BrainFoundModel": "brainfound.models",
    "BrainFoundForClassification": "brainfound.models",
    "BrainFoundForRegression": "brainfound.models",
    "BrainFoundForSegmentation": "brainfound.models",
    "pretrain": "brainfound.train.pretrain",
    "finetune": "brainfound.train.finetune",
    "load": "brainfound.predict.loading",
}
_ROOMS = ("evaluate", "predict")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"brainfound.{name}")
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'brainfound' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
