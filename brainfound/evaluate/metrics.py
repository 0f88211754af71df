"""Metrics of segmentation, classification and regression.

Masks are binary arrays of any number of dimensions, in any order of axes, as long as `spacing_mm` names
the axes in the same order. Every function takes whatever `numpy.asarray` takes, torch tensors included.

What cannot be scored is refused in one line (`UsageError`): non-finite values, shapes that differ, masks
that are not binary. What has no defined score is ``nan``, never a made-up number: AUROC of one class,
R² of a constant target, Pearson's r of a constant. A mean over cases should then say how many it left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from scipy import ndimage, stats
from sklearn import metrics as sklearn_metrics

from brainfound.errors import UsageError, did_you_mean

Empty = Literal["one", "nan", "zero"]
_EMPTY_SCORE = {"one": 1.0, "nan": float("nan"), "zero": 0.0}

# Spacings in NIfTI headers are float32: 1.0 mm may be read as 1.0000001 mm, and a distance that is the
# tolerance to six digits must count as within it.
_DISTANCE_SLACK_MM = 1e-5


def dice(prediction: Any, reference: Any, empty: Empty = "one") -> float:
    """Dice overlap of two binary masks, 2|A ∩ B| / (|A| + |B|).

    Args:
        prediction: binary mask.
        reference: binary mask of the same shape.
        empty: the score when both masks are empty: ``"one"`` (fomo-metrics), ``"nan"`` (nnU-Net, SSL3D) or
            ``"zero"``. When exactly one of them is empty the score is 0 by any convention.

    Raises:
        UsageError: if the shapes differ, or a mask is not binary or not finite.

    Source: L. R. Dice, "Measures of the amount of ecologic association between species", Ecology 1945.
    """
    predicted, expected = _mask_pair(prediction, reference)
    empty_score = _empty_score(empty)
    total = int(predicted.sum()) + int(expected.sum())
    if total == 0:
        return empty_score
    return 2.0 * int((predicted & expected).sum()) / total


def surface_dice(
    prediction: Any,
    reference: Any,
    spacing_mm: Sequence[float],
    tolerance_mm: float = 1.0,
    empty: Empty = "one",
) -> float:
    """Normalised surface distance: the share of both surfaces within `tolerance_mm` of the other surface.

    The surface of a mask is its boundary voxels: the voxels of the mask with a face neighbour outside it,
    where everything outside the array is outside the mask. So an object one voxel thin is all surface, and
    an object cut by the border has a surface there. Distances are Euclidean, in mm, between voxel centres,
    and every boundary voxel counts the same. A distance equal to the tolerance is within it.

    This is the discrete form that most toolkits and challenges compute. The original (Nikolov et al.)
    weights surface elements by their area, so the two differ by a few hundredths on anisotropic or very
    small objects; they agree at 0 and at 1.

    Args:
        prediction: binary mask.
        reference: binary mask of the same shape.
        spacing_mm: distance between voxel centres along each axis of the masks.
        tolerance_mm: the distance that is accepted, 0 or more.
        empty: the score when both masks are empty, as in `dice` (fomo-metrics uses ``"zero"`` here); exactly
            one empty mask scores 0.

    Raises:
        UsageError: if the shapes differ, a mask is not binary, or spacing or tolerance cannot be used.

    Source: S. Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for radiotherapy",
    J Med Internet Res 2021 (arXiv:1809.04430), surface DSC at a tolerance.
    """
    predicted, expected = _mask_pair(prediction, reference)
    spacing = _spacing(spacing_mm, predicted.ndim)
    if not (np.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise UsageError("the tolerance cannot be used", where="tolerance_mm", got=tolerance_mm, expected="0 or more")
    empty_score = _empty_score(empty)
    if not predicted.any() and not expected.any():
        return empty_score
    if not predicted.any() or not expected.any():
        return 0.0

    window = _bounding_box(predicted | expected)
    surface_p, surface_r = _boundary(predicted[window]), _boundary(expected[window])
    reach_mm = tolerance_mm + _DISTANCE_SLACK_MM
    # The distance transform measures from each voxel to the nearest zero, hence the inversion.
    within_p = ndimage.distance_transform_edt(~surface_r, sampling=spacing)[surface_p] <= reach_mm
    within_r = ndimage.distance_transform_edt(~surface_p, sampling=spacing)[surface_r] <= reach_mm
    return float((within_p.sum() + within_r.sum()) / (within_p.size + within_r.size))


def auroc(labels: Any, scores: Any) -> float:
    """Area under the ROC curve; the chance that a positive scores above a negative, a tie counting one half.

    Args:
        labels: (N,) 0 or 1; with K > 2 classes, 0 … K−1.
        scores: (N,) scores of class 1, larger is more positive; or (N, K), one column per class. With K = 2
            columns the second is used; with more, the mean over classes of one against the rest is returned.

    Returns:
        A value in 0–1. ``nan`` when only one class is present, since no pair can be compared; with K > 2,
        classes that are absent (or are the only one present) are left out of the mean.

    Raises:
        UsageError: if the lengths differ, or labels or scores are not as described.

    Source: J. A. Hanley and B. J. McNeil, Radiology 1982.
    """
    scores = _finite(scores, "scores")
    if scores.ndim not in (1, 2):
        raise UsageError("scores have too many axes", where="scores", got=scores.shape, expected="(N,) or (N, K)")
    labels = _finite(labels, "labels")
    num_classes = 2 if scores.ndim == 1 else scores.shape[1]
    if labels.ndim != 1 or len(labels) != len(scores) or len(labels) == 0:
        raise UsageError(
            "labels and scores do not fit", got=f"{labels.shape} and {scores.shape}", expected="(N,) and (N,)"
        )
    if not np.isin(labels, np.arange(num_classes)).all():
        known = f"whole numbers 0 to {num_classes - 1}"
        raise UsageError("unknown class label", where="labels", got=np.unique(labels)[:8].tolist(), expected=known)
    if scores.ndim == 1:
        return _binary_auroc(labels == 1, scores)
    if num_classes == 2:
        return _binary_auroc(labels == 1, scores[:, 1])
    of_classes = np.array([_binary_auroc(labels == k, scores[:, k]) for k in range(num_classes)])
    return float(np.nanmean(of_classes)) if np.isfinite(of_classes).any() else float("nan")


def balanced_accuracy(labels: Any, predictions: Any) -> float:
    """Mean over the classes that occur in `labels` of the share of that class predicted right.

    A class that is predicted but never occurs lowers the recall of the others and has no recall of its own.

    Args:
        labels: (N,) class labels, numbers or text.
        predictions: (N,) class labels, not scores.

    Raises:
        UsageError: if the lengths differ, or there is nothing to score.
    """
    expected, predicted = _plain(labels, "labels"), _plain(predictions, "predictions")
    if expected.ndim != 1 or expected.shape != predicted.shape or expected.size == 0:
        raise UsageError(
            "labels and predictions do not fit", got=f"{expected.shape} and {predicted.shape}", expected="(N,) and (N,)"
        )
    for values, where in ((expected, "labels"), (predicted, "predictions")):
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise UsageError("a value is not finite", where=where, remedy="Leave out the cases without a label")
    classes = np.unique(expected)
    return float(sklearn_metrics.recall_score(expected, predicted, labels=classes, average="macro"))


def mae(target: Any, prediction: Any) -> float:
    """Mean absolute error, in the unit of the target (years for age).

    Raises:
        UsageError: if the shapes differ, a value is not finite, or there is nothing to score.
    """
    expected, predicted = _value_pair(target, prediction)
    return float(sklearn_metrics.mean_absolute_error(expected, predicted))


def r2(target: Any, prediction: Any) -> float:
    """Coefficient of determination, 1 − Σ(t − p)² / Σ(t − mean t)²; negative when worse than the mean.

    ``nan`` when the targets do not vary (fewer than two, or all the same).

    Raises:
        UsageError: if the shapes differ, a value is not finite, or there is nothing to score.
    """
    expected, predicted = _value_pair(target, prediction)
    if _is_constant(expected):
        return float("nan")
    return float(sklearn_metrics.r2_score(expected, predicted))


def pearson(target: Any, prediction: Any) -> float:
    """Pearson's correlation coefficient; ``nan`` when either side does not vary.

    Raises:
        UsageError: if the shapes differ, a value is not finite, or there is nothing to score.
    """
    expected, predicted = _value_pair(target, prediction)
    if _is_constant(expected) or _is_constant(predicted):
        return float("nan")
    return float(stats.pearsonr(expected, predicted).statistic)


def _binary_auroc(positive: np.ndarray, scores: np.ndarray) -> float:
    if positive.all() or not positive.any():
        return float("nan")
    # The rank form of the Mann-Whitney statistic: mid-ranks give a tie one half. It is exact and far faster
    # than building the curve, which matters in a bootstrap.
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    rank_sum = stats.rankdata(scores)[positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def _plain(values: Any, where: str) -> np.ndarray:
    """As a numpy array; a tensor is first taken off its graph and its device, which numpy refuses to do."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"not an array: {error}", where=where) from error
    if array.dtype == object:
        raise UsageError("not an array of numbers or of text", where=where, got=type(values).__name__)
    return array


def _finite(values: Any, where: str) -> np.ndarray:
    array = _plain(values, where)
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise UsageError("not numbers", where=where, got=array.dtype)
    array = array.astype(np.float64, copy=False)
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise UsageError(
            f"{bad} of {array.size} values are not finite", where=where, remedy="Find out where they arise"
        )
    return array


def _value_pair(target: Any, prediction: Any) -> tuple[np.ndarray, np.ndarray]:
    expected, predicted = _finite(target, "target"), _finite(prediction, "prediction")
    if expected.shape != predicted.shape:
        # Said before flattening: (N,) against (N, 1) is most often a forgotten squeeze.
        raise UsageError("target and prediction differ in shape", got=f"{expected.shape} and {predicted.shape}")
    if expected.size == 0:
        raise UsageError("there is nothing to score", got="no values", expected="one value per case")
    return expected.ravel(), predicted.ravel()


def _is_constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def _mask_pair(prediction: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    predicted, expected = _mask(prediction, "prediction"), _mask(reference, "reference")
    if predicted.shape != expected.shape:
        raise UsageError("prediction and reference differ in shape", got=f"{predicted.shape} and {expected.shape}")
    return predicted, expected


def _mask(values: Any, where: str) -> np.ndarray:
    array = _plain(values, where)
    if array.dtype == bool:
        return array
    if not np.issubdtype(array.dtype, np.number):
        raise UsageError("not a mask", where=where, got=array.dtype, expected="0 and 1")
    ones = array == 1
    if not (ones | (array == 0)).all():
        others = np.unique(array[~(ones | (array == 0))])[:4].tolist()
        remedy = "Compare one label at a time (mask == label), or apply a threshold"
        raise UsageError("not a binary mask", where=where, got=others, expected="0 and 1", remedy=remedy)
    return ones


def _empty_score(empty: str) -> float:
    if empty not in _EMPTY_SCORE:
        raise UsageError(
            f"unknown convention {empty!r}", where="empty", remedy=did_you_mean(str(empty), get_args(Empty))
        )
    return _EMPTY_SCORE[empty]


def _spacing(spacing_mm: Sequence[float], num_axes: int) -> np.ndarray:
    spacing = _finite(spacing_mm, "spacing_mm")
    if spacing.shape != (num_axes,):
        raise UsageError(
            "spacing does not fit the masks", where="spacing_mm", got=spacing.tolist(), expected=f"{num_axes} values"
        )
    if not (spacing > 0).all():
        raise UsageError("spacing must be positive", where="spacing_mm", got=spacing.tolist())
    return spacing


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest window that holds the mask; both surfaces lie in it, so no distance changes."""
    return ndimage.find_objects(mask.astype(np.uint8))[0]


def _boundary(mask: np.ndarray) -> np.ndarray:
    # Erosion takes the outside of the array as outside the mask (border_value 0), so a window that touches
    # the object keeps its boundary there.
    return mask & ~ndimage.binary_erosion(mask)
