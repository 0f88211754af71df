"""Retention: whether features still hold information that the probe's target does not cover.

All but ``identity`` are linear models of CLS or patch tokens, tested on subjects outside their training folds. Two
encoders are compared subject by subject: the difference of two scores on the same subjects has a much smaller error
than either of them. The score of ``kept`` does not fall when features rotate, rescale or gain information.

Axis legend: ``V`` views (a session with the contrasts that it shows), ``S`` slices, ``C`` contrasts, ``H W`` pixels,
``P`` chosen patches of a slice, ``N`` samples, ``T`` target columns, ``D`` width, ``U`` subjects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainfound.files import writing
from brainfound.metrics.embedding_probes import cross_val_predict, linear_classifier, linear_regressor
from brainfound.training.randomness import PROBE, numpy_generator

RetentionProbeName = Literal[
    "other_method",  # the probe's target with its other model
    "labels",  # diagnosis, age, sex and site of a session, as far as the store has them
    "slice_position",
    "slice_intensity",  # mean and standard deviation of each contrast in a slice
    "identity",  # the mean CLS token of half of a session's slices is nearest to that of its other half
    "patch_intensity",  # mean of each contrast in a patch
    "patch_texture",  # standard deviation of each contrast in a patch
    "patch_position",  # row and column
    "kept",  # principal components of the starting checkpoint's features, of slices and of patches
]
RETENTION_PROBES: tuple[RetentionProbeName, ...] = get_args(RetentionProbeName)
PATCH_TOKEN_PROBES = ("patch_intensity", "patch_texture", "patch_position", "kept")
RETENTION_PATCHES_PER_SLICE = 8
RIDGE_PENALTY_PER_SAMPLE = 0.01
MAX_COMPONENTS = 16
"""Principal components of the start's features that are reconstructed."""

SubjectErrors = Float[np.ndarray, "U"]
"""Each subject's contribution to 1 − score."""


@dataclass(frozen=True)
class SessionLabel:
    """A label of sessions: one value per view; only `known` ones count."""

    values: np.ndarray
    known: Bool[np.ndarray, "V"]
    is_classification: bool


@dataclass(frozen=True)
class PatchTargets:
    """The fixed patches, and the regression targets of slices and patches."""

    chosen: Int[np.ndarray, "V S P"]
    mean: Float[np.ndarray, "V S P C"]
    texture: Float[np.ndarray, "V S P C"]
    position: Float[np.ndarray, "V S P 2"]
    slice_values: Float[np.ndarray, "V S C 2"]

    @classmethod
    def from_slices(cls, slices: Sequence[UInt8[np.ndarray, "S C H W"]], patch_size: int, seed: int) -> PatchTargets:
        """Choose patches, background only if there are too few others; reproducible by seed."""
        views = enumerate(slices)
        columns = [_view_targets(pixels, patch_size, numpy_generator(PROBE, seed, 3, view)) for view, pixels in views]
        return cls(*(np.stack(column) for column in zip(*columns, strict=True)))


def _view_targets(
    pixels: UInt8[np.ndarray, "S C H W"], patch_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """The fields of `PatchTargets` for one view."""
    rows, columns = (side // patch_size for side in pixels.shape[2:])
    tiles = pixels[:, :, : rows * patch_size, : columns * patch_size].astype(np.float32) / 255
    tiles = rearrange(tiles, "s c (row i) (col j) -> s (row col) c (i j)", i=patch_size, j=patch_size)
    mean, texture = tiles.mean(axis=-1), tiles.std(axis=-1)
    # Patches that are mostly background come last; the order is random otherwise.
    background = (tiles == 0).all(axis=2).mean(axis=-1) > 0.5
    order = np.lexsort((rng.random(background.shape), background))
    chosen = np.sort(order[:, : min(RETENTION_PATCHES_PER_SLICE, rows * columns)], axis=1)
    at = chosen[:, :, None]
    position = np.stack([chosen // columns / rows, chosen % columns / columns], axis=-1)
    slice_values = np.stack([mean.mean(axis=1), pixels.std(axis=(2, 3)) / 255], axis=-1)
    return chosen, np.take_along_axis(mean, at, 1), np.take_along_axis(texture, at, 1), position, slice_values


@dataclass
class RetentionProbes:
    """The retention probes of a run, and the starting checkpoint's results.

    Args:
        shown: the contrasts that each view shows.
        folds: test fold of each view.
        labels: labels of the sessions, by name; empty if views are not whole sessions.
        start: the start's subject errors (``shares/…``) and principal components (``directions/…``), empty until known.
    """

    probe_names: tuple[RetentionProbeName, ...]
    shown: Bool[np.ndarray, "V C"]
    subject_index: Int[np.ndarray, "V"]
    folds: Int[np.ndarray, "V"]
    positions: Float[np.ndarray, "V S"]
    labels: Mapping[str, SessionLabel] = field(default_factory=dict)
    start: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def uses_patch_tokens(self) -> bool:
        return any(name in PATCH_TOKEN_PROBES for name in self.probe_names)

    def subject_errors(
        self, cls: Float[np.ndarray, "V S D"], patches: Float[np.ndarray, "V S P D"] | None, targets: PatchTargets
    ) -> dict[str, SubjectErrors]:
        """The subjects' contributions to 1 − score, for each probe that is possible here (without ``kept``)."""
        num_slices = cls.shape[1]
        slices = cls.reshape(-1, cls.shape[-1]).astype(np.float64)
        errors: dict[str, SubjectErrors] = {}
        if "labels" in self.probe_names:
            sessions = cls.mean(axis=1, dtype=np.float64)
            errors |= {name: self._label_error(sessions, label) for name, label in self.labels.items()}
        if "slice_position" in self.probe_names and np.ptp(self.positions) > 0:
            errors["slice_position"] = self._linear_error(slices, self.positions.reshape(-1, 1), num_slices)
        if "slice_intensity" in self.probe_names:
            values = targets.slice_values.reshape(len(slices), -1, 2)
            errors |= self._mean_over_contrasts("slice_intensity", slices, values)
        if "identity" in self.probe_names and num_slices > 1:
            errors["identity"] = self._identity_error(cls)
        if patches is not None:
            tokens = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
            for name, values in (("patch_intensity", targets.mean), ("patch_texture", targets.texture)):
                if name in self.probe_names:
                    errors |= self._mean_over_contrasts(name, tokens, values.reshape(len(tokens), -1, 1))
            if "patch_position" in self.probe_names and np.ptp(targets.position) > 0:
                positions = targets.position.reshape(-1, 2)
                errors["patch_position"] = self._linear_error(tokens, positions, len(tokens) // len(cls))
        return errors

    def start_retention(
        self, cls: Float[np.ndarray, "V S D"], patches: Float[np.ndarray, "V S P D"] | None
    ) -> dict[str, SubjectErrors]:
        """`subject_errors` for ``kept``, the reconstruction of the start's features; empty if they are unknown."""
        errors = {}
        for name, features in (("slices", cls), ("patches", patches)):
            if features is not None and f"directions/{name}" in self.start:
                rows = features.reshape(-1, features.shape[-1]).astype(np.float64)
                components = self.start[f"directions/{name}"].astype(np.float64)
                if np.ptp(components) > 0:
                    errors[f"kept_{name}"] = self._linear_error(rows, components, len(rows) // len(cls), pooled=True)
        return errors

    def set_reference(self, cls: np.ndarray, patches: np.ndarray | None) -> None:
        """Store these features as those of the starting checkpoint."""
        self.start = {}
        for name, features in (("slices", cls), ("patches", patches)):
            if "kept" in self.probe_names and features is not None:
                rows = features.reshape(-1, features.shape[-1])
                self.start[f"directions/{name}"] = principal_component_scores(rows)

    def compare(self, subject_errors: Mapping[str, SubjectErrors]) -> dict[str, tuple[float, float]]:
        """Score of each probe, and standard error (over subjects) of its difference to the starting checkpoint."""
        scores = {}
        for name, errors in subject_errors.items():
            change = errors - self.start.get(f"shares/{name}", np.zeros_like(errors))
            scores[name] = (1 - float(errors.sum()), float(np.sqrt(len(change)) * change.std(ddof=1)))
        return scores

    def save_start(self, file: Path) -> None:
        """Write the start's results, for resumed runs."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file) as temporary:
            save_file(self.start, temporary)

    def load_start(self, file: Path) -> None:
        self.start = load_file(file)

    def _mean_over_contrasts(
        self, name: str, features: Float[np.ndarray, "N D"], values: Float[np.ndarray, "N C T"]
    ) -> dict[str, SubjectErrors]:
        """The mean error over contrasts, each in the views that show it; empty if no contrast can be tested."""
        per_view = len(features) // len(self.shown)
        errors = []
        for contrast in range(values.shape[1]):
            shown = self.shown[:, contrast]
            if len(set(self.folds[shown])) >= 2 and np.ptp(values[np.repeat(shown, per_view), contrast]) > 0:
                errors.append(self._linear_error(features, values[:, contrast], per_view, views=shown))
        return {name: np.mean(errors, axis=0)} if errors else {}

    def _linear_error(
        self,
        features: Float[np.ndarray, "N D"],
        values: Float[np.ndarray, "N T"],
        per_view: int,
        *,
        views: Bool[np.ndarray, "V"] | None = None,
        pooled: bool = False,
    ) -> SubjectErrors:
        """Contributions to 1 − R²: of the mean R² over columns, or `pooled` over all columns together."""
        counts = np.repeat(np.ones(len(self.subject_index), bool) if views is None else views, per_view)
        subject_index, folds = np.repeat(self.subject_index, per_view)[counts], np.repeat(self.folds, per_view)[counts]
        features, values = features[counts], values[counts]
        # Reconstructed components may well lie outside the range of a few training subjects.
        squares = np.square(values - ridge_out_of_fold(features, values, folds, range_margin=float(pooled)))
        total = np.square(values - values.mean(axis=0)).sum(axis=0)
        varies = total > 0
        errors = squares.sum(axis=1) / total.sum() if pooled else (squares[:, varies] / total[varies]).mean(axis=1)
        return self._sum_by_subject(subject_index, errors)

    def _label_error(self, sessions: Float[np.ndarray, "V D"], label: SessionLabel) -> SubjectErrors:
        values = label.values[label.known]
        make = linear_classifier if label.is_classification else linear_regressor
        predicted = cross_val_predict(sessions[label.known], values, _cv_splits(self.folds[label.known]), make)
        errors = prediction_errors(values, predicted, label.is_classification)
        return self._sum_by_subject(self.subject_index[label.known], errors)

    def _identity_error(self, cls: Float[np.ndarray, "V S D"]) -> SubjectErrors:
        halves = []
        for first in (0, 1):
            half = cls[:, first::2].mean(axis=1, dtype=np.float64)
            half = half - half.mean(axis=0)  # the common part depends on the positions of the slices
            halves.append(half / np.maximum(np.linalg.norm(half, axis=1, keepdims=True), 1e-12))
        nearest = (halves[0] @ halves[1].T).argmax(axis=1)
        missed = self.subject_index[nearest] != self.subject_index
        return self._sum_by_subject(self.subject_index, missed / len(missed))

    def _sum_by_subject(self, subject_index: Int[np.ndarray, "N"], errors: Float[np.ndarray, "N"]) -> SubjectErrors:
        return np.bincount(subject_index, weights=errors, minlength=self.subject_index.max() + 1)


def prediction_errors(labels: np.ndarray, predicted: np.ndarray, is_classification: bool) -> Float[np.ndarray, "N"]:
    """Each sample's contribution to 1 − balanced accuracy, or to 1 − R²."""
    if is_classification:
        classes, index = np.unique(labels, return_inverse=True)
        return (predicted != labels) / np.bincount(index)[index] / len(classes)
    return np.square(predicted - labels) / np.square(labels - labels.mean()).sum()


def ridge_out_of_fold(
    features: Float[np.ndarray, "N D"],
    values: Float[np.ndarray, "N T"],
    folds: Int[np.ndarray, "N"],
    range_margin: float = 0.0,
) -> Float[np.ndarray, "N T"]:
    """Predictions of ridge regression for each sample, trained on the other folds.

    They are clipped to the range of the training values, widened on either side by `range_margin` of its width.
    """
    predicted = np.empty(values.shape)
    for fold in _cv_splits(folds):
        train, test = fold["train"], fold["test"]
        model = make_pipeline(StandardScaler(), Ridge(alpha=RIDGE_PENALTY_PER_SAMPLE * len(train)))
        prediction = model.fit(features[train], values[train]).predict(features[test]).reshape(len(test), -1)
        lowest, highest = values[train].min(axis=0), values[train].max(axis=0)
        margin = range_margin * (highest - lowest)
        predicted[test] = prediction.clip(lowest - margin, highest + margin)
    return predicted


def principal_component_scores(features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N T"]:
    """Coordinates along the principal components of standardised features."""
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    _, vectors = np.linalg.eigh(scaled.T @ scaled)
    return (scaled @ vectors[:, ::-1][:, :MAX_COMPONENTS]).astype(np.float32)


def _cv_splits(folds: Int[np.ndarray, "N"]) -> list[dict[str, np.ndarray]]:
    present = np.unique(folds)
    return [{"train": np.flatnonzero(folds != one), "test": np.flatnonzero(folds == one)} for one in present]
