"""What the untouched backbone reaches with a linear model: the baseline that adaptation has to beat.

The backbone is the one that the run starts from, before anything is trained. Of a classification or regression a
volume is the mean of its slices' CLS embeddings, of the slices that evaluation reads; a ridge or logistic regression on
it learns from the training part, its strength chosen by cross-validation within that part. A segmentation has a linear
classifier of patches (`brainfound.train.frozen_patches`). The test part is answered once, and scored as the run is.

Axis legend: n sessions, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from brainfound.data.batches import even_slices
from brainfound.data.store import Store
from brainfound.errors import TrainingError
from brainfound.models.inference import Answer
from brainfound.train.embedding_cache import EmbeddingCache, slice_embeddings
from brainfound.train.frozen_patches import PatchClassifier
from brainfound.train.linear_fits import fit_logistic, fit_ridge, subject_numbers
from brainfound.train.session_scores import SessionScores, score_answers
from brainfound.train.targets import Target


def frozen_baseline(
    model: Any,
    store: Store,
    parts: Mapping[str, np.ndarray],
    target: Target,
    num_slices: int,
    *,
    cache: EmbeddingCache | None = None,
    folder: Path | None = None,
    seed: int = 0,
) -> SessionScores:
    """Fit a linear model to an untouched backbone, and score it on the test part.

    Args:
        model: a BrainFound model with a head that has not been trained and no adapter; it stays as it is.
        store, parts: the data, and its sessions for training and testing.
        target: what is learnt; its class weights are those of the model's configuration.
        num_slices: slices read per session; of a segmentation per training session.
        cache: embeddings that the run keeps anyway.
        folder: without a cache, where embeddings are kept for other runs on the same backbone; None: nowhere.
        seed: of the patches that a segmentation learns from.

    Raises:
        TrainingError: the embeddings are not finite, or cannot be kept.
    """
    train, test = parts["train"].tolist(), parts["test"].tolist()
    if target.task == "segmentation":
        patches = PatchClassifier.fit(model, store, train, target, num_slices, seed)
        return score_answers(patches.answer, store, test, target)
    if cache is None and folder is not None:
        cache = EmbeddingCache(model.brainfound, store, folder, num_slices)
    means = _means(model, store, [*train, *test], num_slices, cache)
    labels = target.values(store, train)
    people = subject_numbers(store.sessions["subject"].tolist(), np.array(train))
    of_test = _linear_answers(means[: len(train)], means[len(train) :], labels, people, target, model.config)
    answers = dict(zip(test, of_test, strict=True))
    return score_answers(lambda session, _: answers[session], store, test, target)


def _means(
    model: Any, store: Store, sessions: list[int], num_slices: int, cache: EmbeddingCache | None
) -> Float[np.ndarray, "n D"]:
    """Of each session the mean over its slices' embeddings."""
    if cache is not None:
        cache.require(sessions)
        means = cache.means(sessions)
    else:
        stacks = (store[session] for session in sessions)
        of_each = (slice_embeddings(model.brainfound, s, even_slices(len(s.pixels), num_slices)) for s in stacks)
        means = np.stack([embeddings.mean(axis=0) for embeddings in of_each])
    if not np.isfinite(means).all():
        raise TrainingError(
            "the backbone that the run starts from gives embeddings that are not finite",
            remedy="Start from another model",
        )
    return means.astype(np.float64)


def _linear_answers(
    train: Float[np.ndarray, "n D"],
    test: Float[np.ndarray, "m D"],
    labels: np.ndarray,
    people: np.ndarray,
    target: Target,
    config: Any,
) -> list[Answer]:
    """The answers of a linear model about the test part, in the form of a model's."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    std = np.where(std > 1e-8, std, 1.0)
    train, test = (train - mean) / std, (test - mean) / std
    if target.task == "regression":
        weight, bias, _ = fit_ridge(train, (labels - target.mean) / target.std, people)
        return [Answer(value=float(value)) for value in (test @ weight + bias) * target.std + target.mean]
    weights = config.class_weights
    if target.multi_label:
        columns = [
            fit_logistic(
                train, labels[:, k].astype(int), people, None if weights is None else {0: 1.0, 1: weights[k]}
            ).predict_proba(test)[:, 1]
            for k in range(labels.shape[1])
        ]
        return [Answer(probabilities=row) for row in np.stack(columns, axis=1)]
    fitted = fit_logistic(train, labels, people, None if weights is None else dict(enumerate(weights)))
    return [Answer(probabilities=row) for row in fitted.predict_proba(test)]
