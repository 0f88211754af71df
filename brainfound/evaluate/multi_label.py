"""Scores of several yes-or-no labels per case: each label's own, and their mean.

Axes: n cases, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from brainfound.errors import UsageError
from brainfound.evaluate.checked_values import finite_array
from brainfound.evaluate.scores import classification_scores


def multi_label_scores(labels: Any, probabilities: Any, names: Sequence[str]) -> dict[str, float]:
    """The scores of a classification, as the mean over labels and of each label: ``auroc``, ``auroc(edema)``, ….

    Args:
        labels: ``(n, L)`` 0 or 1.
        probabilities: ``(n, L)`` of each label being 1; an answer is yes above 0.5.
        names: ``(L,)``.

    Returns:
        A label whose score is undefined (only one class among the cases) has ``nan`` and is left out of the mean.

    Raises:
        UsageError: if the shapes do not fit.
    """
    truth, shares = finite_array(labels, "labels"), finite_array(probabilities, "probabilities")
    if truth.ndim != 2 or truth.shape != shares.shape or truth.shape[1] != len(names) or not truth.size:
        got = f"{truth.shape}, {shares.shape} and {len(names)} names"
        raise UsageError("labels and probabilities do not fit", got=got, expected="(n, L), (n, L) and L")
    if not np.isin(truth, (0, 1)).all():
        raise UsageError("labels must be 0 or 1", where="labels", got=np.unique(truth)[:8].tolist())
    of_label = {
        name: classification_scores(truth[:, k].astype(int).tolist(), np.stack([1 - shares[:, k], shares[:, k]], 1))
        for k, name in enumerate(names)
    }
    scores: dict[str, float] = {}
    for metric in of_label[names[0]]:
        values = np.array([of_label[name][metric] for name in names])
        scores[metric] = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    for name, own in of_label.items():
        scores |= {f"{metric}({name})": value for metric, value in own.items()}
    return scores


def trivial_multi_label_scores(shares: Any, test: Any, names: Sequence[str]) -> dict[str, float]:
    """The scores of a baseline that gives every case ``(n, L)`` each label's share in the training part ``(L,)``."""
    return multi_label_scores(test, np.tile(np.asarray(shares, dtype=float), (len(test), 1)), names)
