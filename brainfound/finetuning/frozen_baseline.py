"""What the untouched backbone reaches with a linear model: the baseline that adaptation has to beat.

The backbone is the one that the run starts from, before anything is trained. Of a classification or regression a
volume is the mean of its slices' CLS embeddings, of the slices that evaluation reads; a ridge or logistic regression on
it learns from the training part, its strength chosen by cross-validation within that part. A segmentation has a linear
classifier of patches (`frozen_patches`). The test part is answered once, and scored as the run is.

The linear model goes into the bundle, so that it can be asked about other sessions later, and with contrasts withheld;
the untouched backbone is there too, unless all weights were trained.

Axis legend: n sessions, D width, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import expit, softmax
from torch import Tensor

from brainfound.adapters.bundle_reader import MODEL_CLASSES, Bundle, tensors_hash
from brainfound.data.batches import evenly_spaced_slices, remove_contrasts
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.store import Store
from brainfound.errors import ModelError, TrainingError
from brainfound.finetuning.embedding_cache import EmbeddingCache, slice_embeddings
from brainfound.finetuning.frozen_patches import PatchClassifier
from brainfound.finetuning.linear_start import fit_logistic, fit_ridge, subject_group_indices
from brainfound.finetuning.scoring import ScoringRecipe, SessionScores, score_predictions
from brainfound.finetuning.targets import Target
from brainfound.models import BrainFoundModel
from brainfound.models.infer import StackPrediction
from brainfound.models.loading import load_initial_model


@dataclass(frozen=True)
class VolumeLinearProbe:
    """A linear model of a volume's mean slice embedding.

    Attributes:
        model: a BrainFound model with a head, whose backbone is asked; its head is not.
        target: what is answered.
        num_slices: slices read per session; None for all.
        mean, std: (D,) of the embeddings.
        weight, bias: (1, D) and (1,) on standardised embeddings for a value or two classes, else (K, D) and (K,).
        cache: embeddings that are kept; None: none are.
    """

    model: Any
    target: Target
    num_slices: int | None
    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    cache: EmbeddingCache | None = None

    @classmethod
    def fit(
        cls,
        model: Any,
        store: Store,
        sessions: Sequence[int],
        target: Target,
        num_slices: int | None,
        cache: EmbeddingCache | None = None,
    ) -> VolumeLinearProbe:
        """Learn from labelled sessions.

        Raises:
            TrainingError: the embeddings are not finite.
        """
        if cache is not None:
            cache.ensure_embedded(sessions)
            embedded = cache.mean_embeddings(sessions)
        else:
            embedded = np.stack([_mean_embedding(model, store[session], num_slices) for session in sessions])
        features, labels = embedded.astype(np.float64), target.values(store, list(sessions))
        if not np.isfinite(features).all():
            raise TrainingError(
                "the backbone that the run starts from gives embeddings that are not finite",
                remedy="Start from another model",
            )
        mean, std = features.mean(axis=0), features.std(axis=0)
        std = np.where(std > 1e-8, std, 1.0)
        subject_groups = subject_group_indices(store.sessions["subject"].tolist(), np.array(sessions))
        weight, bias = _fit((features - mean) / std, labels, subject_groups, target, model.config.class_weights)
        return cls(model, target, num_slices, mean, std, weight, bias, cache)

    def answer(self, session: int, stack: Stack, without: Sequence[str] = ()) -> StackPrediction:
        """Of a stack, in the form of a model's answer.

        Args:
            session: its row in the store that the cache is of.
            without: contrasts that are not to be seen.
        """
        if self.cache is not None and not without:
            self.cache.ensure_embedded([session])
            embedding = self.cache.mean_embeddings([session])[0]
        else:
            stack = remove_contrasts(stack, without) if without else stack
            embedding = _mean_embedding(self.model, stack, self.num_slices)
        found = self.weight @ ((embedding.astype(np.float64) - self.mean) / self.std) + self.bias
        if self.target.task == "regression":
            return StackPrediction(value=float(found[0]) * self.target.std + self.target.mean)
        if self.target.multi_label:
            return StackPrediction(probabilities=expit(found))
        if len(found) == 1:
            return StackPrediction(probabilities=np.array([expit(-found[0]), expit(found[0])]))
        return StackPrediction(probabilities=softmax(found))

    def tensors(self) -> dict[str, Tensor]:
        """What has to be kept to ask it again."""
        return {name: torch.from_numpy(np.asarray(getattr(self, name))) for name in ("mean", "std", "weight", "bias")}


FrozenBaseline = VolumeLinearProbe | PatchClassifier
"""A linear model on an untouched backbone, for the tasks that it can answer."""


def fit_frozen_baseline(
    model: Any,
    store: Store,
    sessions: Sequence[int],
    target: Target,
    num_slices: int,
    *,
    cache: EmbeddingCache | None = None,
    folder: Path | None = None,
    seed: int = 0,
) -> FrozenBaseline:
    """Fit a linear model to an untouched backbone.

    Args:
        model: a BrainFound model with a head that has not been trained and no adapter; it stays as it is.
        store, sessions: the data, and its sessions for training.
        target: what is learnt; its class weights are those of the model's configuration.
        num_slices: slices read per session; of a segmentation per training session.
        cache: embeddings that the run keeps anyway.
        folder: without a cache, where embeddings are kept for other runs on the same backbone; None: nowhere.
        seed: of the patches that a segmentation learns from.

    Raises:
        TrainingError: the embeddings are not finite, or cannot be kept.
    """
    if target.task == "segmentation":
        return PatchClassifier.fit(model, store, sessions, target, num_slices, seed)
    if cache is None and folder is not None:
        cache = EmbeddingCache(model.brainfound, store, folder, num_slices)
    return VolumeLinearProbe.fit(model, store, sessions, target, num_slices, cache)


def score_frozen_baseline(
    baseline: FrozenBaseline,
    store: Store,
    sessions: Sequence[int],
    without: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    scoring: ScoringRecipe = ScoringRecipe(),
) -> SessionScores:
    """Score a baseline as a model is scored (`score_sessions`)."""

    def predict_fn(session: int, stack: Stack) -> StackPrediction:
        return baseline.answer(session, stack, without)

    return score_predictions(predict_fn, store, sessions, baseline.target, without, progress, scoring)


def load_frozen_baseline(
    bundle: Bundle, target: Target, device: torch.device, base: str | Path | None = None
) -> FrozenBaseline:
    """The baseline that a bundle remembers, on the backbone that its run started from.

    Args:
        base: the model that the run started from, for a bundle that holds trained weights only; others do not read it.

    Raises:
        ModelError: it remembers none, or not the backbone, or ``base`` is another one.
    """
    if not bundle.baseline:
        raise ModelError(
            "the bundle has no frozen baseline",
            where=bundle.folder,
            remedy="Fine-tune with frozen_baseline=true; bundles of earlier versions kept none",
        )
    model = bundle.load_pretrained()
    if model is None:
        model = _load_starting_model(bundle, base)
    found = {name: tensor.numpy() for name, tensor in bundle.baseline.items()}
    segmenting = target.task == "segmentation"
    names = ("mean", "std", "weight", "bias", *(("thresholds",) if segmenting else ()))
    if found.keys() != set(names):
        raise ModelError(
            "the frozen baseline of the bundle is of another kind",
            where=bundle.folder,
            got=", ".join(sorted(found)),
            expected=", ".join(sorted(names)),
            remedy="Copy the bundle again, or export it again",
        )
    mean, std, weight, bias = (found[name] for name in names[:4])
    if segmenting:
        return PatchClassifier(model.to(device), target, mean, std, weight, bias, found["thresholds"])
    return VolumeLinearProbe(model.to(device), target, bundle.metadata.get("num_slices"), mean, std, weight, bias)


def _load_starting_model(bundle: Bundle, base: str | Path | None) -> Any:
    """The model that a run with full fine-tuning started from, if it is the one that is given."""
    if base is None:
        raise ModelError(
            "the bundle has no frozen baseline: all weights were trained, and those before are not in it",
            where=bundle.folder,
            remedy="Give the model that the run started from as --base",
        )
    own = bundle.model.config
    # A head of the start's own, if any, gives way.
    model = load_initial_model(BrainFoundModel, base, own.contrasts, stem=own.stem, slice_features=own.slice_features)
    found, expected = tensors_hash(model.encoder.state_dict()), bundle.metadata.get("frozen_encoder")
    if found != expected:
        raise ModelError(
            "this is not the model that the run started from",
            where=base,
            got=f"hash {found[:12]}",
            expected=str(expected)[:12],
            remedy="Give the model that the run started from as --base",
        )
    head = MODEL_CLASSES[bundle.task](copy.deepcopy(own))
    head.brainfound.encoder = model.encoder
    return head.eval().requires_grad_(False)


def scoring_from_bundle(bundle: Bundle) -> ScoringRecipe:
    """How a bundle's run scored; bundles of earlier versions scored as the recipe does by default."""
    return ScoringRecipe.model_validate(bundle.metadata.get("scoring", {}))


def _mean_embedding(model: Any, stack: Stack, num_slices: int | None) -> Float[np.ndarray, "D"]:
    return slice_embeddings(model.brainfound, stack, evenly_spaced_slices(len(stack.pixels), num_slices)).mean(axis=0)


def _fit(
    features: Float[np.ndarray, "n D"],
    labels: np.ndarray,
    subject_groups: np.ndarray,
    target: Target,
    class_weights: Sequence[float] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases, one row per thing that is scored."""
    if target.task == "regression":
        weight, bias, _ = fit_ridge(features, (labels - target.mean) / target.std, subject_groups)
        return weight[None], np.array([bias])
    if target.multi_label:
        of_labels = [{0: 1.0, 1: w} for w in class_weights] if class_weights is not None else [None] * labels.shape[1]
        fits = [
            fit_logistic(features, column.astype(int), subject_groups, weights)
            for column, weights in zip(labels.T, of_labels, strict=True)
        ]
        return np.concatenate([fit.coef_ for fit in fits]), np.concatenate([fit.intercept_ for fit in fits])
    weights = None if class_weights is None else dict(enumerate(class_weights))
    fit = fit_logistic(features, labels, subject_groups, weights)
    return fit.coef_, fit.intercept_
