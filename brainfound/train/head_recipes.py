"""What a head learns by, as recipes, and the fields of a model's configuration that they become."""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from brainfound.recipes import Recipe
from brainfound.train.targets import Target

_MARGIN = 0.1
"""By how much of the training part's range the bins reach beyond it on each side."""


class ClassificationHeadRecipe(Recipe):
    """The loss of a classification."""

    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a session weighs by the inverse frequency of its class in the training part. For rare classes; the
    probabilities are then those of a cohort in which all classes are equally frequent."""
    focal_gamma: float = Field(0.0, ge=0)
    """Focal loss: above 0, sessions that are answered well count less (2 is usual); 0: cross-entropy."""


class RegressionHeadRecipe(Recipe):
    """The head and the loss of a regression."""

    head: Literal["point", "gaussian", "bins"] = "point"
    """point: one number. gaussian: also its standard deviation, by the likelihood. bins: a distribution over bins of
    the training part's range, whose expectation is the answer."""
    loss: Literal["smooth_l1", "l1", "huber"] = "smooth_l1"
    """Of the point head, on the target in standard deviations of the training part."""
    huber_delta: float = Field(1.0, gt=0)
    """Where the Huber loss turns from squares to absolute errors, in the same unit."""
    bins: int = Field(40, ge=2)
    """Bins of the head `bins`. They reach a tenth of the range beyond the training part on each side."""
    label_width: float = Field(1.0, gt=0)
    """Standard deviation of the soft label around a target, in widths of a bin."""
    interval_confidence: float = Field(0.9, gt=0, lt=1)
    """Share of new sessions that the prediction interval, fitted on the validation part, should hold."""

    @model_validator(mode="after")
    def _loss_is_of_the_point(self) -> Self:
        if self.head != "point" and self.loss != "smooth_l1":
            raise ValueError(f"the head {self.head} has a loss of its own; loss: {self.loss} needs head: point")
        return self


def classification_fields(recipe: ClassificationHeadRecipe, target: Target, labels: np.ndarray) -> dict[str, Any]:
    """Fields of `BrainFoundConfig`.

    Args:
        labels: of the training part: class indices ``(n,)``, or 0 and 1 ``(n, K)`` for several labels.
    """
    weights = class_weights(labels, len(target.names)) if recipe.class_weights == "balanced" else None
    problem = "multi_label_classification" if target.multi_label else None
    return {"class_weights": weights, "classification_focal_gamma": recipe.focal_gamma, "problem_type": problem}


def class_weights(labels: np.ndarray, num_classes: int) -> list[float]:
    """Inverse frequencies: n / (K · n_k) of each class, mean 1 over sessions; negatives / positives of each label.

    Args:
        labels: class indices ``(n,)``, or 0 and 1 ``(n, K)`` for several labels; each class occurs.
    """
    if labels.ndim == 2:
        positives = labels.sum(axis=0)
        return ((len(labels) - positives) / positives).tolist()
    counts = np.bincount(labels, minlength=num_classes)
    return (len(labels) / (num_classes * counts)).tolist()


def regression_fields(recipe: RegressionHeadRecipe, target: Target, values: np.ndarray) -> dict[str, Any]:
    """Fields of `BrainFoundConfig`.

    Args:
        values: ``(n,)`` of the training part, in the unit of the target.
    """
    margin = _MARGIN * float(np.ptp(values))
    ends = [float(values.min()) - margin, float(values.max()) + margin]
    return {
        "target_mean": target.mean,
        "target_std": target.std,
        "regression_head": recipe.head,
        "regression_loss": recipe.loss,
        "huber_delta": recipe.huber_delta,
        "regression_bins": recipe.bins,
        "regression_range": ends if recipe.head == "bins" else None,
        "regression_label_width": recipe.label_width,
    }


def loss_name(task: str, config: Any) -> str:
    """The loss of a model, in words, for its card.

    Args:
        task: classification, regression or segmentation.
        config: its `BrainFoundConfig`.
    """
    if task == "segmentation":
        return {
            "dice_cross_entropy": "cross-entropy + soft Dice",
            "dice_focal": "focal cross-entropy + soft Dice",
            "tversky": "Tversky",
            "focal_tversky": "focal Tversky",
        }[config.segmentation_loss]
    if task == "regression":
        if config.regression_head == "gaussian":
            return "Gaussian likelihood"
        if config.regression_head == "bins":
            return f"soft labels over {config.regression_bins} bins"
        return {"smooth_l1": "smooth L1", "l1": "L1", "huber": f"Huber, delta {config.huber_delta:g}"}[
            config.regression_loss
        ]
    name = "binary cross-entropy" if config.problem_type == "multi_label_classification" else "cross-entropy"
    if config.classification_focal_gamma:
        name = f"focal loss (gamma {config.classification_focal_gamma:g}) on {name}"
    return name if config.class_weights is None else f"{name}, weighted by inverse frequency"
