"""What the untouched backbone reaches with a linear model: the baseline that adaptation has to beat.

The backbone is the one that the run starts from, before anything is trained. For a classification or regression a
volume is the mean of its slice embeddings, of the slices that evaluation reads; a ridge or logistic regression learns
from the training part. For a segmentation there is one logistic regression of patches per class, or per overlapping
label, whose target is the share of a patch's pixels that have it. It learns from some patches, with more of those that
show the structure than there are, and weights that restore the frequencies. The test part is scored as the run is.

The linear model goes into the bundle, so that it can score other sessions later, and with contrasts withheld; the
untouched backbone is there too, unless all weights were trained.

Axis legend: n sessions or chosen patches, S slices, H W pixels, P patches of a slice, D width, K classes but the
background (or labels).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from brainfound.errors import ModelError
from brainfound.finetuning.embedding_cache import EmbeddingCache, slice_embeddings
from brainfound.finetuning.linear_models import fit_patch_label, standardise, subject_group_indices
from brainfound.finetuning.scoring import SessionScores, score_predictions
from brainfound.finetuning.tasks import ScoringRecipe, Segmentation, Task, VolumeTask
from brainfound.finetuning.tasks.base import LabelledFeatures
from brainfound.models import BrainFoundModel
from brainfound.models.infer import SEGMENTATION_CHUNK, StackPrediction
from brainfound.models.loading import load_initial_model
from brainfound.training.randomness import PROBE, numpy_generator

MAX_PATCHES, MAX_SESSIONS = 6000, 500
"""Most patches that a segmentation learns from, and most training sessions that they are taken of."""
_STREAM = 3  # apart from the probes' own streams


@dataclass(frozen=True)
class _LinearModel:
    """A linear model of standardised features of a backbone.

    Attributes:
        model: a BrainFound model with the task's head; its backbone is used, its head is not.
        mean, std: (D,) of the features.
        weight, bias: (rows, D) and (rows,) on standardised features.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("mean", "std", "weight", "bias")

    model: Any
    task: Any
    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def tensors(self) -> dict[str, Tensor]:
        """What a bundle has to keep."""
        return {name: torch.from_numpy(np.asarray(getattr(self, name))) for name in self.tensor_names}


@dataclass(frozen=True)
class VolumeLinearProbe(_LinearModel):
    """A linear model of a volume's mean slice embedding.

    Attributes:
        weight, bias: one row for a number or two classes, else one per class.
        num_slices: slices read per session; None for all.
        cache: of embeddings; None: they are computed.
    """

    task: VolumeTask
    num_slices: int | None = None
    cache: EmbeddingCache | None = None

    @classmethod
    def fit(
        cls,
        model: Any,
        store: Store,
        sessions: Sequence[int],
        task: VolumeTask,
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
        labels = task.values(store, list(sessions))
        features, mean, std = standardise([embedded], "the backbone that the run starts from gives embeddings")
        subject_groups = subject_group_indices(store.sessions["subject"].tolist(), np.array(sessions))
        weight, bias = task.fit_linear(LabelledFeatures(features, labels, subject_groups), model.config.class_weights)
        return cls(model, task, mean, std, weight, bias, num_slices, cache)

    def answer(self, session: int, stack: Stack, without: Sequence[str] = ()) -> StackPrediction:
        """The answer about a stack, as a model gives it.

        Args:
            session: its row in the store of the cache.
            without: contrasts to withhold.
        """
        if self.cache is not None and not without:
            self.cache.ensure_embedded([session])
            embedding = self.cache.mean_embeddings([session])[0]
        else:
            stack = remove_contrasts(stack, without) if without else stack
            embedding = _mean_embedding(self.model, stack, self.num_slices)
        return self.task.linear_answer(
            self.weight @ ((embedding.astype(np.float64) - self.mean) / self.std) + self.bias
        )


def _mean_embedding(model: Any, stack: Stack, num_slices: int | None) -> Float[np.ndarray, "D"]:
    return slice_embeddings(model.brainfound, stack, evenly_spaced_slices(len(stack.pixels), num_slices)).mean(axis=0)


@dataclass(frozen=True)
class PatchClassifier(_LinearModel):
    """A linear classifier of a backbone's patch tokens, one row per class; a pixel has the class of its patch.

    Attributes:
        thresholds: (K,) the probability above which a class is marked: the one with the best Dice on the patches that
            were learnt from.
    """

    tensor_names: ClassVar[tuple[str, ...]] = (*_LinearModel.tensor_names, "thresholds")

    task: Segmentation
    thresholds: np.ndarray

    @classmethod
    def fit(
        cls, model: Any, store: Store, sessions: Sequence[int], task: Segmentation, num_slices: int, seed: int
    ) -> PatchClassifier:
        """Learn from sessions with masks.

        Args:
            model: a `BrainFoundForSegmentation`; it stays as it is.
            num_slices: slices of each session to learn from, half of them through the structure if it has so many.
            seed: of the choice of patches.

        Raises:
            TrainingError: the tokens are not finite.
        """
        rng = numpy_generator(PROBE, seed, _STREAM)
        sessions = [sessions[i] for i in evenly_spaced_slices(len(sessions), MAX_SESSIONS)]
        per_session = max(8, MAX_PATCHES // len(sessions))
        tokens, label_fractions, weights, owners = [], [], [], []
        for session in sessions:
            stack = store[int(session)]
            labels = task.binary_labels(np.asarray(stack.mask))
            slices, slice_weight = _choose_slices(np.asarray(labels.any(axis=(1, 2, 3))), num_slices)
            in_patches = patch_label_fractions(labels[slices], model.encoder.patch_size)  # (S, P, K)
            chosen, weight = _choose_patches(in_patches, slice_weight, per_session, rng)
            flat = _tokens(model, stack, slices).reshape(-1, model.encoder.embed_dim)
            tokens.append(flat[chosen])
            label_fractions.append(in_patches.reshape(-1, in_patches.shape[-1])[chosen])
            weights.append(weight)
            owners += [int(session)] * len(chosen)
        features, mean, std = standardise(tokens, "the backbone that the run starts from gives patch tokens")
        subject_groups = subject_group_indices(store.sessions["subject"].tolist(), np.array(owners))
        of_patch, every_share = np.concatenate(weights), np.concatenate(label_fractions)
        of_patch = of_patch / of_patch.mean()
        fits = [fit_patch_label(features, share, of_patch, subject_groups) for share in every_share.T]
        rows, biases, thresholds = zip(*fits, strict=True)
        return cls(model, task, mean, std, np.stack(rows), np.array(biases), np.array(thresholds))

    def answer(self, session: int, stack: Stack, without: Sequence[str] = ()) -> StackPrediction:
        """The answer about every pixel of a stack, as a model gives it; ``without`` are contrasts to withhold."""
        stack = remove_contrasts(stack, without) if without else stack
        num_slices, height, width = stack.grid
        rows, columns = self.model.encoder.grid(height, width)
        answers = []
        chunk = num_slices if self.model.config.stem == "slices" else SEGMENTATION_CHUNK
        for first in range(0, num_slices, chunk):
            index = np.arange(first, min(first + chunk, num_slices))
            tokens = (_tokens(self.model, stack, index) - self.mean) / self.std
            probabilities = expit(tokens @ self.weight.T + self.bias)  # (S, P, K)
            above = np.where(probabilities > self.thresholds, probabilities, 0.0)
            per_patch = np.moveaxis(above, -1, 1).reshape(len(index), -1, rows, columns)
            per_pixel = per_patch.repeat(self.model.encoder.patch_size, 2).repeat(self.model.encoder.patch_size, 3)
            answers.append(self.task.patch_answer(per_pixel))
        return self.task.as_prediction(np.concatenate(answers))


def patch_label_fractions(labels: UInt8[np.ndarray, "S K H W"], patch_size: int) -> Float[np.ndarray, "S P K"]:
    """The share of each patch's pixels that have each label, patches row by row."""
    num_slices, num_labels, height, width = labels.shape
    rows, columns = height // patch_size, width // patch_size
    tiles = labels.reshape(num_slices, num_labels, rows, patch_size, columns, patch_size)
    return np.moveaxis(tiles.mean(axis=(3, 5)).reshape(num_slices, num_labels, -1), 1, -1)


@torch.inference_mode()
def _tokens(model: Any, stack: Stack, slices: Int[np.ndarray, "S"]) -> Float[np.ndarray, "S P D"]:
    """The backbone's patch tokens of some slices."""
    model.eval()
    device = next(model.parameters()).device
    # The stem "slices" reads the neighbours too.
    whole = model.config.stem == "slices"
    batch = collate([stack], [np.arange(len(stack.pixels)) if whole else slices]).to(device)
    patches = model.brainfound(**batch.inputs(), output_patch_embeddings=True).patch_embeddings[0]
    return (patches[slices] if whole else patches).float().cpu().numpy()


def _choose_slices(shows: np.ndarray, wanted: int) -> tuple[Int[np.ndarray, "S"], Float[np.ndarray, "S"]]:
    """Evenly spaced slices, up to half of them of those that show the structure; and how many each stands for."""
    marked, others = np.flatnonzero(shows), np.flatnonzero(~shows)
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
    """Patches of a session, as many of each class as there are; and how many each stands for."""
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
    """Fit a linear model to an untouched backbone.

    Args:
        model: a BrainFound model with an untrained head and no adapter; it stays as it is.
        store, sessions: the data, and its sessions for training.
        task: the labels; class weights are those of the model's configuration.
        num_slices: slices read per session, of a segmentation per training session.
        cache: the embeddings of the run, if it caches them.
        folder: without a cache, a folder to cache embeddings in for other runs on the same backbone.
        seed: of the patches that a segmentation learns from.

    Raises:
        TrainingError: the embeddings are not finite, or cannot be written.
    """
    if isinstance(task, Segmentation):
        return PatchClassifier.fit(model, store, sessions, task, num_slices, seed)
    assert isinstance(task, VolumeTask)
    if cache is None and folder is not None:
        cache = EmbeddingCache(model.brainfound, store, folder, num_slices)
    return VolumeLinearProbe.fit(model, store, sessions, task, num_slices, cache)


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

    return score_predictions(predict_fn, store, sessions, baseline.task, without, progress, scoring)


def load_frozen_baseline(
    bundle: Bundle, task: Task, device: torch.device, base: str | Path | None = None
) -> FrozenBaseline:
    """The baseline that a bundle holds, on the backbone that its run started from.

    Args:
        base: the model that the run started from; only a bundle that holds nothing but trained weights needs it.

    Raises:
        ModelError: the bundle holds no baseline, or not the backbone, or ``base`` is another one.
    """
    if not bundle.baseline:
        raise ModelError(
            "the bundle has no frozen baseline",
            where=bundle.folder,
            remedy="Fine-tune with frozen_baseline=true",
        )
    model = bundle.load_pretrained()
    if model is None:
        model = _load_starting_model(bundle, task, base)
    found = {name: tensor.numpy() for name, tensor in bundle.baseline.items()}
    kind: Any = PatchClassifier if task.per_voxel else VolumeLinearProbe
    names = kind.tensor_names
    if found.keys() != set(names):
        raise ModelError(
            "the frozen baseline of the bundle is of another kind",
            where=bundle.folder,
            got=", ".join(sorted(found)),
            expected=", ".join(sorted(names)),
            remedy="Copy the bundle again, or export it again",
        )
    own = {} if task.per_voxel else {"num_slices": bundle.metadata.get("num_slices")}
    return kind(model.to(device), task, **found, **own)


def _load_starting_model(bundle: Bundle, task: Task, base: str | Path | None) -> Any:
    """The model that a run with full fine-tuning started from, if it is the one that is given."""
    if base is None:
        raise ModelError(
            "the bundle has no frozen baseline: all weights were trained, and those before are not in it",
            where=bundle.folder,
            remedy="Give the model that the run started from as --base",
        )
    own = bundle.model.config
    # A head that the start has is not loaded.
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
    head = task.model_class(copy.deepcopy(own))
    head.brainfound.encoder = model.encoder
    return head.eval().requires_grad_(False)


def scoring_from_bundle(bundle: Bundle) -> ScoringRecipe:
    """How a bundle's run scored; older bundles hold nothing and scored by the defaults."""
    return ScoringRecipe.model_validate(bundle.metadata.get("scoring", {}))
