"""Linear models on the untouched backbone: the baseline that adaptation has to beat.

For classification and regression: a logistic or ridge regression on the mean slice embedding of each volume. For
segmentation: one logistic regression on patch tokens per class or overlapping label, whose target is the fraction of a
patch's pixels with that label; patches of the structure are oversampled, and weights restore the frequencies. The
bundle keeps the linear model, and the backbone unless all of it was trained.

Axis legend: n sessions or sampled patches, S slices, H W pixels, P patches of a slice, D width, K foreground classes
(or labels).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from scipy.special import expit
from torch import Tensor

from brainfound.adapters.bundle_reader import Bundle, tensors_hash
from brainfound.data.batches import collate, evenly_spaced_slices, remove_contrasts
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.store import Store
from brainfound.errors import ModelError, UsageError
from brainfound.finetuning.embedding_cache import EmbeddingCache, slice_embeddings
from brainfound.finetuning.linear_models import LabelledFeatures, fit_patch_label, standardise, subject_group_indices
from brainfound.finetuning.scoring import SessionScores, score_predictions
from brainfound.finetuning.tasks import ScoringRecipe, Segmentation, Task, VolumeTask
from brainfound.models import BrainFoundModel
from brainfound.models.loading import load_initial_model
from brainfound.models.stack_prediction import SEGMENTATION_CHUNK, StackPrediction
from brainfound.training.randomness import PROBE, numpy_generator

MAX_PATCHES, MAX_SESSIONS = 6000, 500
"""Largest training set of a segmentation baseline."""
_STREAM = 3  # not used by the probes


@dataclass(frozen=True)
class _LinearModel:
    """A linear model of standardised features of a backbone: ``weight (rows, D)`` and ``bias (rows,)``."""

    tensor_names: ClassVar[tuple[str, ...]] = ("mean", "std", "weight", "bias")

    model: Any
    """A BrainFound model with the task's head; only its backbone is used."""
    task: Any
    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a bundle stores."""
        return {name: torch.from_numpy(np.asarray(getattr(self, name))) for name in self.tensor_names}


@dataclass(frozen=True)
class VolumeLinearProbe(_LinearModel):
    """A linear model of a volume's mean slice embedding: one row for a number or two classes, else one per class."""

    task: VolumeTask
    num_slices: int | None = None
    """Slices read per session; None for all."""
    cache: EmbeddingCache | None = None
    """Embeddings to read; None: compute them."""

    def answer(self, session: int, stack: Stack, without: Sequence[str] = ()) -> StackPrediction:
        """Predict a stack (``session`` is its index in the cache's store) with the contrasts ``without`` withheld."""
        if self.cache is not None and not without:
            self.cache.ensure_embedded([session])
            embedding = self.cache.mean_embeddings([session])[0]
        else:
            stack = remove_contrasts(stack, without) if without else stack
            embedding = _mean_embedding(self.model, stack, self.num_slices)
        standardised = (embedding.astype(np.float64) - self.mean) / self.std
        return self.task.linear_answer(self.weight @ standardised + self.bias)


def _mean_embedding(model: Any, stack: Stack, num_slices: int | None) -> Float[np.ndarray, "D"]:
    return slice_embeddings(model.brainfound, stack, evenly_spaced_slices(len(stack.pixels), num_slices)).mean(axis=0)


@dataclass(frozen=True)
class PatchClassifier(_LinearModel):
    """A linear classifier of a backbone's patch tokens, one row per class; a pixel has the class of its patch."""

    tensor_names: ClassVar[tuple[str, ...]] = (*_LinearModel.tensor_names, "thresholds")

    task: Segmentation
    thresholds: np.ndarray
    """(K,) the probability above which a class is marked, chosen for the best Dice on the training patches."""

    @classmethod
    def fit(
        cls, model: Any, store: Store, sessions: Sequence[int], task: Segmentation, num_slices: int, seed: int
    ) -> PatchClassifier:
        """Fit to ``num_slices`` slices per session, half of them through the structure if there are enough."""
        rng = numpy_generator(PROBE, seed, _STREAM)
        sessions = [sessions[i] for i in evenly_spaced_slices(len(sessions), MAX_SESSIONS)]
        per_session = max(8, MAX_PATCHES // len(sessions))
        tokens, label_fractions, weights, owners = [], [], [], []
        for session in sessions:
            stack = store[int(session)]
            mask = np.asarray(stack.mask)
            marked = task.marked(task.encode_mask(mask)).any(axis=(1, 2))
            slices, slice_weight = _choose_slices(np.asarray(marked), num_slices)
            slice_fractions = patch_label_fractions(task.binary_labels(mask[slices]), model.encoder.patch_size)
            chosen, weight = _choose_patches(slice_fractions, slice_weight, per_session, rng)
            flat = _tokens(model, stack, slices).reshape(-1, model.encoder.embed_dim)
            tokens.append(flat[chosen])
            label_fractions.append(slice_fractions.reshape(-1, slice_fractions.shape[-1])[chosen])
            weights.append(weight)
            owners += [int(session)] * len(chosen)
        features, mean, std = standardise(tokens, "the backbone that the run starts from gives patch tokens")
        subject_groups = subject_group_indices(store.sessions["subject"].tolist(), np.array(owners))
        patch_weights, fractions = np.concatenate(weights), np.concatenate(label_fractions)
        patch_weights = patch_weights / patch_weights.mean()
        fits = [fit_patch_label(features, fraction, patch_weights, subject_groups) for fraction in fractions.T]
        rows, biases, thresholds = zip(*fits, strict=True)
        return cls(model, task, mean, std, np.stack(rows), np.array(biases), np.array(thresholds))

    def answer(self, session: int, stack: Stack, without: Sequence[str] = ()) -> StackPrediction:
        """Predict every pixel of a stack with the contrasts ``without`` withheld."""
        stack = remove_contrasts(stack, without) if without else stack
        num_slices, height, width = stack.grid
        (rows, columns), side = self.model.encoder.grid(height, width), self.model.encoder.patch_size
        answers = []
        chunk = num_slices if self.model.config.stem == "slices" else SEGMENTATION_CHUNK
        for first in range(0, num_slices, chunk):
            index = np.arange(first, min(first + chunk, num_slices))
            tokens = (_tokens(self.model, stack, index) - self.mean) / self.std
            probabilities = expit(tokens @ self.weight.T + self.bias)  # (S, P, K)
            above = np.where(probabilities > self.thresholds, probabilities, 0.0)
            per_patch = np.moveaxis(above, -1, 1).reshape(len(index), -1, rows, columns)
            answers.append(self.task.patch_answer(per_patch).repeat(side, -2).repeat(side, -1))
        return self.task.as_prediction(np.concatenate(answers))


def patch_label_fractions(labels: UInt8[np.ndarray, "S K H W"], patch_size: int) -> Float[np.ndarray, "S P K"]:
    """The fraction of each patch's pixels with each label; patches run row by row."""
    num_slices, num_labels, height, width = labels.shape
    rows, columns = height // patch_size, width // patch_size
    tiles = labels.reshape(num_slices, num_labels, rows, patch_size, columns, patch_size)
    return np.moveaxis(tiles.mean(axis=(3, 5)).reshape(num_slices, num_labels, -1), 1, -1)


@torch.inference_mode()
def _tokens(model: Any, stack: Stack, slices: Int[np.ndarray, "S"]) -> Float[np.ndarray, "S P D"]:
    """The backbone's patch tokens of the given slices."""
    model.eval()
    device = next(model.parameters()).device
    # The stem "slices" reads the neighbours too.
    whole = model.config.stem == "slices"
    batch = collate([stack], [np.arange(len(stack.pixels)) if whole else slices]).to(device)
    patches = model.brainfound(**batch.inputs(), output_patch_embeddings=True).patch_embeddings[0]
    return (patches[slices] if whole else patches).float().cpu().numpy()


def _choose_slices(has_structure: np.ndarray, wanted: int) -> tuple[Int[np.ndarray, "S"], Float[np.ndarray, "S"]]:
    """Evenly spaced slices, half of them through the structure if possible, and how many slices each stands for."""
    marked, others = np.flatnonzero(has_structure), np.flatnonzero(~has_structure)
    num_marked = min(len(marked), max(wanted - len(others), -(-wanted // 2)))
    chosen, weights = [], []
    for group, number in ((marked, num_marked), (others, min(len(others), wanted - num_marked))):
        if number > 0:
            chosen.append(group[evenly_spaced_slices(len(group), number)])
            weights.append(np.full(number, len(group) / number))
    order = np.argsort(np.concatenate(chosen))
    return np.concatenate(chosen)[order], np.concatenate(weights)[order]


def _choose_patches(
    label_fractions: Float[np.ndarray, "S P K"],
    slice_weight: Float[np.ndarray, "S"],
    wanted: int,
    rng: np.random.Generator,
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Patches of a session, equally many per class if possible, and how many patches each stands for."""
    flat = label_fractions.reshape(-1, label_fractions.shape[-1])
    strata = np.where(flat.any(axis=1), flat.argmax(axis=1) + 1, 0)
    present = np.unique(strata)
    chosen, weights = [], []
    for stratum in present:
        members = np.flatnonzero(strata == stratum)
        drawn = rng.permutation(members)[: max(1, wanted // len(present))]
        chosen.append(drawn)
        weights.append(np.full(len(drawn), len(members) / len(drawn)) * slice_weight[drawn // label_fractions.shape[1]])
    return np.concatenate(chosen), np.concatenate(weights)


class NoFrozenBaselineError(ModelError):
    """A bundle has no frozen baseline, or lacks the backbone for it; it is not damaged."""


FrozenBaseline = VolumeLinearProbe | PatchClassifier
"""A linear model on an untouched backbone."""


def fit_frozen_baseline(
    model: Any,
    store: Store,
    sessions: Sequence[int],
    task: Task,
    num_slices: int,
    *,
    cache: EmbeddingCache | None = None,
    folder: Path | None = None,
    seed: int = 0,
) -> FrozenBaseline:
    """Fit a linear model on an untouched backbone to training sessions; ``seed`` governs the choice of patches.

    The model must not have an adapter; it is left unchanged. Without a cache, embeddings are cached in ``folder``, if
    given, for other runs on the same backbone.

    Raises:
        TrainingError: the embeddings are not finite, or cannot be written.
    """
    if isinstance(task, Segmentation):
        return PatchClassifier.fit(model, store, sessions, task, num_slices, seed)
    assert isinstance(task, VolumeTask)
    if cache is None and folder is not None:
        cache = EmbeddingCache(model.brainfound, store, folder, num_slices)
    if cache is not None:
        cache.ensure_embedded(sessions)
        embedded = cache.mean_embeddings(sessions)
    else:
        embedded = np.stack([_mean_embedding(model, store[session], num_slices) for session in sessions])
    features, mean, std = standardise([embedded], "the backbone that the run starts from gives embeddings")
    subject_groups = subject_group_indices(store.sessions["subject"].tolist(), np.array(sessions))
    data = LabelledFeatures(features, task.values(store, list(sessions)), subject_groups)
    weight, bias = task.fit_linear(data, model.config.class_weights)
    return VolumeLinearProbe(model, task, mean, std, weight, bias, num_slices, cache)


def score_frozen_baseline(
    baseline: FrozenBaseline,
    store: Store,
    sessions: Sequence[int],
    without: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    scoring: ScoringRecipe = ScoringRecipe(),
) -> SessionScores:
    """Score a baseline in the same way as a model (`score_sessions`)."""
    answer = partial(baseline.answer, without=without)
    return score_predictions(answer, store, sessions, baseline.task, without, progress, scoring)


def load_frozen_baseline(
    bundle: Bundle, task: Task, device: torch.device, base: str | Path | None = None
) -> FrozenBaseline:
    """Load the baseline of a bundle, on the backbone that its run started from.

    ``base`` is the model that the run started from, needed only for a bundle from full fine-tuning.

    Raises:
        NoFrozenBaselineError: the bundle has no baseline or no backbone.
        ModelError: its baseline is damaged, or ``base`` is another model.
    """
    if not bundle.baseline:
        remedy = "Fine-tune with frozen_baseline=true"
        raise NoFrozenBaselineError("the bundle has no frozen baseline", where=bundle.folder, remedy=remedy)
    pretrained = bundle.load_pretrained()
    if pretrained is not None and base is not None:
        what = "the bundle holds the backbone that its run started from"
        raise UsageError(what, where="--base", got=base, remedy="Leave it out")
    model = pretrained or _load_starting_model(bundle, task, base)
    tensors = {name: tensor.numpy() for name, tensor in bundle.baseline.items()}
    kind: Any = PatchClassifier if task.per_voxel else VolumeLinearProbe
    if tensors.keys() != set(kind.tensor_names):
        raise ModelError(
            "the frozen baseline of the bundle is of another kind",
            where=bundle.folder,
            got=", ".join(sorted(tensors)),
            expected=", ".join(sorted(kind.tensor_names)),
            remedy="Copy the bundle again, or export it again",
        )
    own = {} if task.per_voxel else {"num_slices": bundle.metadata.get("num_slices")}
    return kind(model.to(device), task, **tensors, **own)


def _load_starting_model(bundle: Bundle, task: Task, base: str | Path | None) -> Any:
    remedy = "Give the model that the run started from as --base"
    if base is None:
        what = "the bundle has no frozen baseline: all weights were trained, and those before are not in it"
        raise NoFrozenBaselineError(what, where=bundle.folder, remedy=remedy)
    own = bundle.model.config
    # Without the head that the starting model may have.
    fields = {name: getattr(own, name) for name in ("stem", "slice_features", "feature_layers")}
    model = load_initial_model(BrainFoundModel, base, own.contrasts, **fields)
    digest, expected = tensors_hash(model.encoder.state_dict()), bundle.metadata.get("frozen_encoder")
    if digest != expected:
        what, got = "this is not the model that the run started from", f"hash {digest[:12]}"
        raise ModelError(what, where=base, got=got, expected=str(expected)[:12], remedy=remedy)
    head = task.model_class(copy.deepcopy(own))
    head.brainfound.encoder = model.encoder
    return head.eval().requires_grad_(False)


def scoring_from_bundle(bundle: Bundle) -> ScoringRecipe:
    """The scoring settings of a bundle's run; the defaults for a bundle that no run made."""
    return ScoringRecipe.model_validate(bundle.metadata.get("scoring", {}))
