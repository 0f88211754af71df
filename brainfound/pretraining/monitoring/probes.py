"""Probes: how well frozen features predict labels, measured during training.

A view is a session with all its contrasts, or with one; its embedding is the mean CLS token over a few evenly spaced
slices. The retention probes run on the same embeddings (`retention`). No subject, and no image, is ever on both
sides of a split, even if the image is stored twice.

Axis legend: ``V`` views, ``S`` slices of a view, ``H W`` pixels, ``P`` patches of a slice, ``N`` samples, ``D`` width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field
from safetensors import SafetensorError
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from brainfound.data.batches import as_tensor
from brainfound.data.splits.dividing import k_folds
from brainfound.data.splits.split_file import get_split_groups, require_no_shared_images
from brainfound.data.store import Store
from brainfound.errors import TrainingError
from brainfound.metrics.classification import balanced_accuracy
from brainfound.metrics.embedding_probes import cross_val_predict, linear_classifier, linear_regressor
from brainfound.metrics.registry import METRICS
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.monitoring.probe_targets import (
    CLASS_TARGETS,
    SLICE_TARGETS,
    ProbeTarget,
    choose_probe_target,
    frequent_contrasts,
    require_probe_target,
    sessions_with_target,
    supported_targets,
)
from brainfound.pretraining.monitoring.retention import (
    RETENTION_PROBES,
    PatchTargets,
    RetentionProbeName,
    RetentionProbes,
    SessionLabel,
    prediction_errors,
)
from brainfound.recipes import Recipe
from brainfound.training.checkpoint import wrap_write_errors
from brainfound.training.randomness import PROBE, numpy_generator

PATCHES_PER_SLICE = 32


class ProbeRecipe(Recipe):
    """Target, interval and sample of the probe."""

    every: int = Field(default=500, ge=0)
    """Steps between two probes of the teacher; 0 turns them off."""
    target: Literal["auto"] | ProbeTarget = "auto"
    """The label to predict; "auto" takes the first of diagnosis, age, sex, site, contrast and slice position that the
    store supports. A high score for site is no merit, but a fall shows damage."""
    method: Literal["linear", "knn"] = "linear"
    """The model whose score guards the run; both are logged."""
    max_sessions: int = Field(default=200, ge=2)
    """Sessions in the fixed subset."""
    slices_per_session: int = Field(default=8, ge=1)
    """Evenly spaced slices per session."""
    folds: int = Field(default=5, ge=2)
    """Folds of the cross-validation by subject; fewer if there are fewer subjects."""
    neighbours: int = Field(default=5, ge=1)
    """k of the k-NN probe."""
    patch: bool = False
    """Whether to log how well a linear model predicts the tissue of patches, if the store has masks; no guard."""
    retention: tuple[RetentionProbeName, ...] = RETENTION_PROBES
    """Retention probes on the same embeddings; [] leaves the guard with the target alone."""


@dataclass(frozen=True)
class ProbeScores:
    """Scores of one probe; higher is better."""

    linear: float
    knn: float
    standard_error: float
    """Standard error of the guarding score, by bootstrap over subjects."""
    metric: str
    target: str
    chance: float = 0.0
    patch: float | None = None
    """Balanced accuracy of a linear model of patch tokens."""
    retention: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Retention probes: score, and standard error of its difference to the start."""

    def line(self, method: Literal["linear", "knn"]) -> dict[str, Any]:
        """The entries of the log line; ``probe`` is the guarding score."""
        scores = {"probe": getattr(self, method), "probe/linear": self.linear, "probe/knn": self.knn}
        if self.patch is not None:
            scores["probe/patch"] = self.patch
        for name, (score, error) in self.retention.items():
            scores |= {f"retention/{name}": score, f"retention_error/{name}": error}
        return scores | {
            "probe_standard_error": self.standard_error,
            "probe_chance": self.chance,
            "probe_metric": self.metric,
            "probe_target": self.target,
        }


class Probe:
    """A fixed test of an encoder on a fixed subset of the pretraining store; it does not test generalisation.

    `seed` picks the subset and the folds; a resumed run needs the `start_file` of `save_start`.

    Raises:
        RecipeError, TrainingError: too few labels of the target in the store, or subjects or classes in the subset.
    """

    def __init__(self, store: Store, recipe: ProbeRecipe, seed: int, start_file: Path | None = None) -> None:
        self.store, self.recipe, self.seed, self.start_file = store, recipe, seed, start_file
        self.target: ProbeTarget = choose_probe_target(store) if recipe.target == "auto" else recipe.target
        require_probe_target(store, self.target)
        self.is_classification = self.target in CLASS_TARGETS
        self.metric = "balanced_accuracy" if self.is_classification else "r2"
        shuffled = numpy_generator(PROBE, seed).permutation(sessions_with_target(store, self.target))
        sessions = np.sort(shuffled[: recipe.max_sessions])
        self.views, self.present, labels = self._make_views(sessions)
        self.rows = np.stack([self._slice_rows(session) for session in self.views])
        samples = self.views
        if self.target in SLICE_TARGETS:
            labels = store.slice_positions_mm[self.rows].ravel()
            samples = np.repeat(self.views, self.rows.shape[1])
        self.labels = labels.astype(str) if self.is_classification else labels.astype(float)
        num_classes = len(np.unique(self.labels))
        if self.is_classification and num_classes == 1:
            raise TrainingError("a probe needs two classes", where="probe.target", got=self.target)
        self.chance = 1 / num_classes if self.is_classification else 0.0
        self.subjects = get_split_groups(store)[0][samples].astype(str)
        num_subjects = len(set(self.subjects))
        if num_subjects < 2:
            what = "a probe needs sessions of at least two subjects"
            remedy = "Set probe.every=0 to train without a probe"
            raise TrainingError(what, where="probe", got=num_subjects, remedy=remedy)
        # Each subject has slices everywhere, and views of several contrasts, so folds need no stratification.
        strata = None if self.target in ("slice_position", "contrast") else self.labels.tolist()
        self.folds = k_folds(self.subjects.tolist(), min(recipe.folds, num_subjects), seed, strata)
        for fold in self.folds:
            require_no_shared_images(store, {part: samples[index] for part, index in fold.items()})
        self.patches = self._patch_probe(sessions) if recipe.patch else None
        self.retention = self._make_retention_probes() if recipe.retention else None
        self._patch_targets: PatchTargets | None = None

    def _make_views(self, sessions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each view: its session, the contrasts that it shows (bool), and its label."""
        present = self.store.present[sessions]
        if self.target != "contrast":
            table = self.store.sessions
            labels = table[self.target].to_numpy()[sessions] if self.target in table else np.zeros(len(sessions))
            return sessions, present, labels
        contrasts = frequent_contrasts(self.store)
        which, column = np.nonzero(present[:, contrasts])
        # As many embeddings as for any other target, from whole sessions.
        num_sessions = max(2, self.recipe.max_sessions // len(contrasts))
        which, column = which[which < num_sessions], column[which < num_sessions]
        shown = np.zeros((len(which), present.shape[1]), dtype=bool)
        shown[np.arange(len(which)), contrasts[column]] = True
        return sessions[which], shown, np.array(self.store.contrasts)[contrasts[column]]

    def _patch_probe(self, sessions: np.ndarray) -> PatchProbe | None:
        """The patch probe; None if fewer than two subjects have a mask."""
        table = self.store.sessions
        masked = sessions[table["mask_dtype"].to_numpy()[sessions] != ""] if "mask_dtype" in table else sessions[:0]
        subjects = get_split_groups(self.store)[0].astype(str)
        if len(set(subjects[masked])) < 2:
            warnings.warn("probe.patch is left out: the store has no masks of two subjects", stacklevel=2)
            return None
        rows = [self._slice_rows(session) for session in masked]
        return PatchProbe(self.store, masked, rows, subjects, self.recipe.folds, self.seed)

    def _make_retention_probes(self) -> RetentionProbes:
        names, subject_index = np.unique(self.subjects, return_inverse=True)
        subject_folds = np.empty(len(names), dtype=int)
        for number, fold in enumerate(self.folds):
            subject_folds[subject_index[fold["test"]]] = number
        if self.target in SLICE_TARGETS:
            subject_index = subject_index[:: self.rows.shape[1]]
        folds = subject_folds[subject_index]
        probe_names = tuple(name for name in self.recipe.retention if name != self.target)
        labels = self._labels(folds) if "labels" in probe_names and self.target != "contrast" else {}
        positions = self.store.slice_positions_mm[self.rows]
        return RetentionProbes(probe_names, self.present, subject_index, folds, positions, labels)

    def _labels(self, folds: np.ndarray) -> dict[str, SessionLabel]:
        """Labels other than the target that views of several folds have."""
        labels: dict[str, SessionLabel] = {}
        for name in supported_targets(self.store):
            known = np.isin(self.views, sessions_with_target(self.store, name))
            values = self.store.sessions[name].to_numpy()[self.views]
            values = values.astype(str) if name in CLASS_TARGETS else np.where(known, values, np.nan).astype(float)
            if name != self.target and len(set(folds[known])) > 1 and len(set(values[known])) > 1:
                labels[name] = SessionLabel(values, known, name in CLASS_TARGETS)
        return labels

    def _slice_rows(self, session: int) -> np.ndarray:
        rows = self.store.session_rows(session)
        # The middles of equal parts of the stack, because its ends hold little brain.
        parts = (np.arange(self.recipe.slices_per_session) + 0.5) / self.recipe.slices_per_session
        return rows[np.floor(parts * len(rows)).astype(int)]

    def run(self, encoder: SliceEncoder, device: torch.device, is_starting_checkpoint: bool = False) -> ProbeScores:
        """Embed the subset and score it; later retention scores are compared with those of the starting checkpoint."""
        cls, patches = self._encode(encoder, device)
        predictions = self.predict(cls)
        scores = self.score(predictions)
        if self.retention is not None and predictions is not None:
            retention = self._retention_scores(cls, patches, predictions, is_starting_checkpoint)
            scores = replace(scores, retention=retention)
        return scores if self.patches is None else replace(scores, patch=self.patches.run(encoder, device))

    @torch.no_grad()
    def _encode(
        self, encoder: SliceEncoder, device: torch.device
    ) -> tuple[Float[np.ndarray, "V S D"], Float[np.ndarray, "V S P D"] | None]:
        """CLS tokens of the slices of each view, and the patch tokens of the retention probes."""
        was_training = encoder.training
        encoder.eval()
        if self.retention is not None and self._patch_targets is None:
            slices = [self.store.read_slices(rows) for rows in self.rows]
            self._patch_targets = PatchTargets.from_slices(slices, encoder.patch_size, self.seed)
        embeddings, tokens = [], []
        for view, (rows, present) in enumerate(zip(self.rows, self.present, strict=True)):
            pixels = as_tensor(self.store.read_slices(rows)).to(device)
            mask = torch.from_numpy(present).to(device).expand(len(rows), -1)
            encoding = encoder(pixels, mask)
            embeddings.append(encoding.cls.float().cpu().numpy())
            if self._patch_targets is not None and self.retention is not None and self.retention.uses_patch_tokens:
                chosen = torch.from_numpy(self._patch_targets.chosen[view]).to(device)[:, :, None]
                tokens.append(torch.take_along_dim(encoding.patches, chosen, dim=1).float().cpu().numpy())
        encoder.train(was_training)
        return np.stack(embeddings), np.stack(tokens) if tokens else None

    def predict(self, embeddings: Float[np.ndarray, "V S D"]) -> dict[str, np.ndarray] | None:
        """Out-of-fold predictions of a linear and a k-NN model; None if the features are not finite."""
        per_slice = self.target in SLICE_TARGETS
        features = embeddings.reshape(-1, embeddings.shape[-1]) if per_slice else embeddings.mean(axis=1)
        features = features.astype(np.float64)  # squares of large float32 values overflow
        if not np.isfinite(features).all():
            return None
        linear = linear_classifier if self.is_classification else linear_regressor
        neighbours = KNeighborsClassifier if self.is_classification else KNeighborsRegressor

        def knn(num_samples: int) -> Any:
            return neighbours(min(self.recipe.neighbours, num_samples), metric="cosine")

        models = {"linear": linear, "knn": knn}
        return {name: cross_val_predict(features, self.labels, self.folds, make) for name, make in models.items()}

    def score(self, predicted: dict[str, np.ndarray] | None) -> ProbeScores:
        """Balanced accuracy or R² of the predictions of each model; NaN if there are none."""
        if predicted is None:
            # A score, not an error: only rank 0 gets here, and the guard stops all ranks together.
            return ProbeScores(np.nan, np.nan, 0.0, self.metric, self.target, self.chance)
        linear, knn = (METRICS[self.metric].function(self.labels, predicted[name]) for name in ("linear", "knn"))
        error = self._standard_error(predicted[self.recipe.method])
        return ProbeScores(linear, knn, error, self.metric, self.target, self.chance)

    def _retention_scores(
        self, cls: np.ndarray, patches: np.ndarray | None, predictions: dict[str, np.ndarray], is_start: bool
    ) -> dict[str, tuple[float, float]]:
        """Score and standard error of each retention probe; those of patch tokens only if these are finite."""
        probes = self.retention
        assert probes is not None
        assert self._patch_targets is not None
        if patches is not None and not np.isfinite(patches).all():
            patches = None
        if is_start:
            probes.set_reference(cls, patches)
        elif not probes.start and self.start_file is not None:
            try:
                probes.load_start(self.start_file)
            except (OSError, SafetensorError) as error:
                text = f"{self.start_file} cannot be read ({error}); retention is not compared with the start"
                warnings.warn(text, stacklevel=2)
                self.start_file = None  # warn once
        subject_errors = probes.subject_errors(cls, patches, self._patch_targets)
        subject_errors |= probes.start_retention(cls, patches)
        if "other_method" in probes.probe_names:
            other = "knn" if self.recipe.method == "linear" else "linear"
            errors = prediction_errors(self.labels, predictions[other], self.is_classification)
            subject_index = np.unique(self.subjects, return_inverse=True)[1]
            subject_errors[f"{self.target}_{other}"] = np.bincount(subject_index, weights=errors)
        if is_start:
            probes.start |= {f"shares/{name}": errors for name, errors in subject_errors.items()}
        return probes.compare(subject_errors)

    def save_start(self) -> None:
        """Write the starting checkpoint's retention results into the start file, for resumed runs."""
        if self.retention is not None and self.retention.start and self.start_file is not None:
            with wrap_write_errors("the retention reference of the start", self.start_file):
                self.retention.save_start(self.start_file)

    def _standard_error(self, predicted: np.ndarray) -> float:
        rng = numpy_generator(PROBE, self.seed, 1)
        members = [np.flatnonzero(self.subjects == subject) for subject in sorted(set(self.subjects))]
        scores = []
        for _ in range(200):
            drawn = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
            if self.is_classification or np.ptp(self.labels[drawn]) > 0:
                scores.append(METRICS[self.metric].function(self.labels[drawn], predicted[drawn]))
        return float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0


def majority_labels(masks: Int[np.ndarray, "S H W"], patch_size: int) -> Int[np.ndarray, "S P"]:
    """The most frequent label of each patch, patches row by row; the lowest label in a tie."""
    tiles = rearrange(masks, "s (row i) (col j) -> s (row col) (i j)", i=patch_size, j=patch_size)
    labels = np.unique(masks)
    counts = np.stack([(tiles == label).sum(axis=-1) for label in labels], axis=-1)
    return labels[counts.argmax(axis=-1)]


def choose_patches(labels: Int[np.ndarray, "P"], num: int, rng: np.random.Generator) -> Int[np.ndarray, "N"]:
    """At most `num` patches of a slice, the same number of each label as far as there are enough."""
    present = np.unique(labels)
    num_per_label = max(1, num // len(present))
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:num_per_label] for label in present]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class PatchProbe:
    """A linear probe of the tissue label of patch tokens, on fixed slices with masks.

    A patch has the most frequent label of its pixels. The sample of each slice is balanced over labels, so that
    background does not dominate. `rows` are the slices of each of `sessions`; `subjects` are those of the store.
    """

    store: Store
    sessions: np.ndarray
    rows: Sequence[np.ndarray]
    subjects: np.ndarray
    num_folds: int
    seed: int

    @torch.no_grad()
    def run(self, encoder: SliceEncoder, device: torch.device) -> float:
        """Balanced accuracy over folds by subject; NaN if features are not finite, or all labels equal."""
        was_training = encoder.training
        encoder.eval()
        features, labels, subjects = [], [], []
        rng = numpy_generator(PROBE, self.seed, 2)
        for session, rows in zip(self.sessions, self.rows, strict=True):
            masks = self.store.read_masks(int(session), rows - self.store.session_rows(int(session))[0])
            assert masks is not None
            present = torch.from_numpy(self.store.present[session]).to(device).expand(len(rows), -1)
            tokens = encoder(as_tensor(self.store.read_slices(rows)).to(device), present).patches
            for slice_labels, slice_tokens in zip(majority_labels(masks, encoder.patch_size), tokens, strict=True):
                chosen = choose_patches(slice_labels, PATCHES_PER_SLICE, rng)
                features.append(slice_tokens[torch.from_numpy(chosen).to(device)].float().cpu().numpy())
                labels.append(slice_labels[chosen])
                subjects.extend([self.subjects[session]] * len(chosen))
        encoder.train(was_training)
        return self._score(np.concatenate(features), np.concatenate(labels), subjects)

    def _score(self, features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"], subjects: list[str]) -> float:
        if not np.isfinite(features).all() or len(np.unique(labels)) < 2:
            return float("nan")
        folds = k_folds(subjects, min(self.num_folds, len(set(subjects))), self.seed)
        predicted = cross_val_predict(features, labels, folds, lambda _: RidgeClassifier(class_weight="balanced"))
        return balanced_accuracy(labels, predicted)
