"""BrainFound: 2-D vision transformers adapted to 3-D brain MRI, slice by slice.

Public names are loaded on first use, so that ``import brainfound`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from brainfound import metrics
    from brainfound.data.cohort import Cohort
    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.data.preprocessing.stack import Stack
    from brainfound.data.splits.split_file import Split
    from brainfound.data.store import Store
    from brainfound.data.store.prepare import prepare
    from brainfound.finetuning.finetune import finetune
    from brainfound.inference.cohort import predict
    from brainfound.inference.evaluation import evaluate
    from brainfound.inference.loading import load
    from brainfound.models import (
        BrainFoundConfig,
        BrainFoundForClassification,
        BrainFoundForRegression,
        BrainFoundForSegmentation,
        BrainFoundModel,
    )
    from brainfound.pretraining.pretrain import pretrain

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
    "metrics",
    "predict",
    "prepare",
    "pretrain",
]

_MODULES = {
    "Cohort": "brainfound.data.cohort",
    "Preprocessing": "brainfound.data.preprocessing.settings",
    "Split": "brainfound.data.splits.split_file",
    "Stack": "brainfound.data.preprocessing.stack",
    "Store": "brainfound.data.store",
    "prepare": "brainfound.data.store.prepare",
    "BrainFoundConfig": "brainfound.models",
    "BrainFoundForClassification": "brainfound.models",
    "BrainFoundForRegression": "brainfound.models",
    "BrainFoundForSegmentation": "brainfound.models",
    "BrainFoundModel": "brainfound.models",
    "pretrain": "brainfound.pretraining.pretrain",
    "finetune": "brainfound.finetuning.finetune",
    "evaluate": "brainfound.inference.evaluation",
    "load": "brainfound.inference.loading",
    "predict": "brainfound.inference.cohort",
}


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return importlib.import_module("brainfound.metrics")
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'brainfound' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
