"""Linear candidates: fits, their loss per subject, and their weighted sum.

Axis legend: n volumes, R head outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.special import expit, logsumexp, softmax

from brainfound.finetuning.auto.features import Blocks, LinearModel, choose_blocks
from brainfound.finetuning.auto.recipe import LinearCandidate
from brainfound.finetuning.linear_models import LabelledFeatures, fit_pls, standardise
from brainfound.finetuning.tasks import Classification, Regression, Task, VolumeTask
from brainfound.finetuning.tasks.classification import MultiLabelClassification
from brainfound.models.stack_prediction import StackPrediction


def fit_candidate(
    candidate: LinearCandidate, features: Blocks, values: np.ndarray, groups: np.ndarray, task: VolumeTask
) -> LinearModel:
    """Fit a candidate; its penalty is chosen by cross-validation over the groups, which are subjects.

    Features are standardised and divided by the root of the number of blocks, so that a penalty means the same for
    every number of features. An L2 penalty depends on the features only through their scalar products, so the fit runs
    in the space that the volumes span (Hastie, Tibshirani, Friedman, "The Elements of Statistical Learning", §18.3.5).

    Raises:
        TrainingError: the features are not finite.
    """
    chosen = choose_blocks(candidate, features.shape[2])
    used = features[:, chosen]
    num_blocks, width = used.shape[1:]
    flat, mean, std = standardise([used.reshape(len(used), -1)], "the model that the run starts from gives embeddings")
    std = std * np.sqrt(num_blocks)
    flat /= np.sqrt(num_blocks)
    basis = None
    if flat.shape[1] > len(flat):
        basis = row_space(flat)
        flat = flat @ basis.T
    data = LabelledFeatures(flat, values, groups)
    if candidate.method == "pls":
        assert isinstance(task, Regression)
        own, own_bias = fit_pls(flat, (values - task.mean) / task.std, groups)
        rows, bias = own[None], np.array([own_bias])
    else:
        rows, bias = task.fit_head(data, _head_config(task, values))
    if basis is not None:
        rows = rows @ basis
    rows = rows / std
    weight = np.zeros((len(rows), *features.shape[1:]))
    weight[:, chosen] = rows.reshape(len(rows), num_blocks, width)
    return LinearModel(weight, bias - rows @ mean)


def row_space(features: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "r D"]:
    """Orthonormal rows that span those of wide features."""
    squares, vectors = np.linalg.eigh(features @ features.T)
    kept = squares > 1e-10 * squares[-1]
    if not kept.any():
        return np.eye(1, features.shape[1])
    return (vectors[:, kept].T @ features) / np.sqrt(squares[kept])[:, None]


def _head_config(task: VolumeTask, values: np.ndarray) -> Any:
    fields = task.config_fields(values)
    return SimpleNamespace(class_weights=fields.get("class_weights"), regression_head="point")


def trivial_scores(task: VolumeTask, values: np.ndarray) -> Float[np.ndarray, "R"]:
    """Head outputs of the answer that is the same for everybody: the mean, or the shares of the classes."""
    if isinstance(task, Regression):
        return np.array([(values.mean() - task.mean) / task.std])
    assert isinstance(task, Classification)
    if isinstance(task, MultiLabelClassification):
        shares = np.clip(values.mean(axis=0), 1e-3, 1 - 1e-3)
        return np.log(shares / (1 - shares))
    return np.log(np.maximum(np.bincount(values, minlength=len(task.names)) / len(values), 1e-3))


def losses(task: Task, values: np.ndarray, scores: Float[np.ndarray, "n R"]) -> Float[np.ndarray, "n"]:
    """The loss of each volume whose mean is the task's `selection_metric` (absolute error, log loss), or 1 − Dice."""
    if task.per_voxel:
        return scores[:, 0]
    if isinstance(task, Regression):
        return np.abs(scores[:, 0] * task.std + task.mean - values)
    if isinstance(task, MultiLabelClassification):
        return (np.logaddexp(0, scores) - values * scores).mean(axis=1)
    return logsumexp(scores, axis=1) - scores[np.arange(len(values)), values]


def as_answer(task: VolumeTask, scores: Float[np.ndarray, "R"]) -> StackPrediction:
    """Head outputs of one volume in the form of a model's answer."""
    if isinstance(task, Regression):
        return StackPrediction(value=float(scores[0]) * task.std + task.mean)
    return StackPrediction(probabilities=(expit if isinstance(task, MultiLabelClassification) else softmax)(scores))


def mean_by_subject(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The mean over the sessions of each subject, in the order of the groups' numbers."""
    _, index = np.unique(groups, return_inverse=True)
    return np.bincount(index, values) / np.bincount(index)


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The mean and its standard error."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else float("nan")
    return float(array.mean()), error
