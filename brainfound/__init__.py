"""BrainFound: 2-D vision transformers adapted to 3-D brain MRI, slice by slice.

The public face. Names are loaded on first use, so that ``import brainfound`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Cohort": "brainfound.data.cohort",
    "Preprocessing": "brainfound.data.preprocessing",
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
    "evaluate_model": "brainfound.predict.evaluation",
    "predict": "brainfound.predict.predictor",
    "load": "brainfound.predict.predictor",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    pass


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'brainfound' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
