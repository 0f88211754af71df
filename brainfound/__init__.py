"""BrainFound: 2-D vision transformers adapted to 3-D brain MRI, slice by slice.

Public names are loaded on first use, so that ``import brainfound`` does not import torch. The Auto classes of
transformers know the models after ``import brainfound``, whichever of the two is imported first.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
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
    from brainfound.finetuning.auto.run import finetune_auto
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
    "finetune_auto",
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
    "finetune_auto": "brainfound.finetuning.auto.run",
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


_AUTO_MODULE = "transformers.models.auto.configuration_auto"


class _LazyConfig:
    """Stands for `BrainFoundConfig` in the Auto classes, without torch; the package of models puts itself there."""

    model_type = "brainfound"

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        return importlib.import_module("brainfound.models").BrainFoundConfig(*args, **fields)

    @classmethod
    def from_dict(cls, *args: Any, **options: Any) -> Any:
        return importlib.import_module("brainfound.models").BrainFoundConfig.from_dict(*args, **options)


def _register(auto: Any) -> None:
    auto.AutoConfig.register(_LazyConfig.model_type, _LazyConfig, exist_ok=True)


class _AutoClasses(importlib.abc.MetaPathFinder):
    """Registers the models when transformers imports its Auto classes, which have no plug-ins; then it is gone."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if hasattr(sys.modules.get(_AUTO_MODULE), "AutoConfig"):
    _register(sys.modules[_AUTO_MODULE])
else:
    sys.meta_path.insert(0, _AutoClasses())
