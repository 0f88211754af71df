"""Validation of the input of metrics: anything that `numpy.asarray` takes, torch tensors included, as numpy arrays.

Each function raises `UsageError` for input that it does not accept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from brainfound.errors import UsageError, did_you_mean


def plain_array(values: Any, where: str) -> np.ndarray:
    """An array of numbers or of text; a tensor is detached and copied to the CPU first."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"not an array: {error}", where=where) from error
    if array.dtype == object:
        raise UsageError("not an array of numbers or of text", where=where, got=type(values).__name__)
    return array


def finite_array(values: Any, where: str) -> np.ndarray:
    """An array of finite numbers, as float64."""
    array = plain_array(values, where)
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise UsageError("not numbers", where=where, got=array.dtype)
    array = array.astype(np.float64, copy=False)
    if bad := int((~np.isfinite(array)).sum()):
        what = f"{bad} of {array.size} values are not finite"
        raise UsageError(what, where=where, remedy="Find out where they arise")
    return array


def value_pair(target: Any, prediction: Any) -> tuple[np.ndarray, np.ndarray]:
    """Target and prediction of a regression, ``(N,)`` each, finite and of equal shape."""
    expected, predicted = finite_array(target, "target"), finite_array(prediction, "prediction")
    if expected.shape != predicted.shape:
        # Checked before flattening: (N,) against (N, 1) usually means a forgotten squeeze.
        raise UsageError("target and prediction differ in shape", got=f"{expected.shape} and {predicted.shape}")
    if expected.size == 0:
        raise UsageError("there is nothing to score", got="no values", expected="one value per case")
    return expected.ravel(), predicted.ravel()


def label_pair(labels: Any, predictions: Any) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted class of each case, ``(N,)`` each, numbers or text."""
    expected, predicted = plain_array(labels, "labels"), plain_array(predictions, "predictions")
    if expected.ndim != 1 or expected.shape != predicted.shape or expected.size == 0:
        got = f"{expected.shape} and {predicted.shape}"
        raise UsageError("labels and predictions do not fit", got=got, expected="(N,) and (N,)")
    for values, where in ((expected, "labels"), (predicted, "predictions")):
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise UsageError("a value is not finite", where=where, remedy="Leave out the cases without a label")
    if (expected.dtype.kind in "US") != (predicted.dtype.kind in "US"):
        raise UsageError("labels and predictions do not fit", got="text on one side, numbers on the other")
    return expected, predicted


def mask_pair(prediction: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two binary masks of equal shape, as bool."""
    predicted, expected = _mask(prediction, "prediction"), _mask(reference, "reference")
    if predicted.shape != expected.shape:
        raise UsageError("prediction and reference differ in shape", got=f"{predicted.shape} and {expected.shape}")
    return predicted, expected


def _mask(values: Any, where: str) -> np.ndarray:
    array = plain_array(values, where)
    if array.dtype == bool:
        return array
    if not np.issubdtype(array.dtype, np.number):
        raise UsageError("not a mask", where=where, got=array.dtype, expected="0 and 1")
    ones = array == 1
    if (others := array[~ones & (array != 0)]).size:
        got = np.unique(others)[:4].tolist()
        remedy = "Compare one label at a time (mask == label), or apply a threshold"
        raise UsageError("not a binary mask", where=where, got=got, expected="0 and 1", remedy=remedy)
    return ones


def validate_spacing(spacing_mm: Sequence[float], num_axes: int) -> np.ndarray:
    """The distance between voxel centres along each axis, in mm; positive."""
    spacing = finite_array(spacing_mm, "spacing_mm")
    if spacing.shape != (num_axes,):
        what, expected = "spacing does not fit the masks", f"{num_axes} values"
        raise UsageError(what, where="spacing_mm", got=spacing.tolist(), expected=expected)
    if not (spacing > 0).all():
        raise UsageError("spacing must be positive", where="spacing_mm", got=spacing.tolist())
    return spacing


def get_convention_score(name: str, choices: Mapping[str, float], where: str) -> float:
    """The score of a named convention."""
    if name not in choices:
        raise UsageError(f"unknown convention {name!r}", where=where, remedy=did_you_mean(str(name), choices))
    return choices[name]


def is_constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())
