"""Every metric under one name."""

from __future__ import annotations

import inspect

import brainfound.evaluate
from brainfound.evaluate import classification_metrics, metrics, regression_metrics, segmentation_metrics


def test_every_metric_of_every_kind_is_there():
    for module in (classification_metrics, regression_metrics, segmentation_metrics):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ != module.__name__ or name.startswith("_") or name == "one_against_the_rest":
                continue
            assert getattr(metrics, name) is function, name
            assert name in metrics.__all__, name
            assert getattr(brainfound.evaluate, name) is function, name
