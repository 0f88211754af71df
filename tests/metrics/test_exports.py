"""Every metric under one name."""

from __future__ import annotations

import inspect
import subprocess
import sys

from brainfound import metrics
from brainfound.metrics import classification, regression, segmentation


def test_every_metric_of_every_kind_is_exported():
    for module in (classification, regression, segmentation):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ != module.__name__ or name.startswith("_") or name == "one_vs_rest":
                continue
            assert getattr(metrics, name) is function, name
            assert name in metrics.__all__, name


def test_scores_can_be_computed_without_torch():
    program = "import sys, brainfound; brainfound.metrics.dice([1], [1]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
