"""Every metric under one name."""

from __future__ import annotations

import inspect
import subprocess
import sys

import brainfound.evaluate

from brainfound import metrics
from brainfound.metrics import (
    classification as classification_metrics,
)
from brainfound.metrics import (
    regression as regression_metrics,
)
from brainfound.metrics import (
    segmentation as segmentation_metrics,
)


def test_every_metric_of_every_kind_is_there():
    for module in (classification_metrics, regression_metrics, segmentation_metrics):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ != module.__name__ or name.startswith("_") or name == "one_against_the_rest":
                continue
            assert getattr(metrics, name) is function, name
            assert name in metrics.__all__, name
            assert getattr(brainfound.evaluate, name) is function, name


def test_scores_can_be_computed_without_torch():
    program = "import sys, brainfound; brainfound.metrics.dice([1], [1]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
