"""What is watched beside the probe's target: whether features still tell what no label has to say.

A probe sees only what it asks for. Bad settings can make the place of a slice easier to tell and ruin what
tissue a patch shows, so several questions are asked of the same embeddings:

- ``other_method``: the probe's target by its other model, k-NN where the linear one guards the run;
- ``labels``: diagnosis, age, sex and site of a session, as far as the store knows them;
- ``slice_position``: where in its stack a slice lies, from its CLS token;
- ``slice_intensity``: mean and standard deviation of each contrast in a slice, from its CLS token;
- ``identity``: whether the mean CLS token of half of a session's slices is nearest to that of its other half;
- ``patch_intensity``, ``patch_texture``: mean and standard deviation of each contrast in a patch, from its token;
- ``patch_position``: row and column of a patch, from its token;
- ``kept``: the main directions of the starting checkpoint's own features, from the present ones: of slices
  (``kept_slices``) and of patches (``kept_patches``). What the start told linearly, known or not, is told
  still where its features can be made again from the present ones.

All but ``identity`` are linear models, tested on subjects that they did not learn from. Of each answer the share
that a subject adds to the error is kept, so that two encoders are compared subject by subject: the difference
of two scores on the same subjects is known far better than either of them.

Axis legend: ``V`` views (a session with the contrasts that it shows), ``S`` slices, ``C`` contrasts, ``H W``
pixels, ``P`` chosen patches of a slice, ``N`` samples, ``T`` things told of each, ``D`` width, ``U`` subjects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainfound.metrics.embedding_probes import cross_val_predict, linear_classifier, linear_regressor
from brainfound.training.randomness import PROBE, numpy_generator

RetentionProbeName = Literal[
    "other_method",
    "labels",
    "slice_position",
    "slice_intensity",
    "identity",
    "patch_intensity",
    "patch_texture",
    "patch_position",
    "kept",
]
RETENTION_PROBES: tuple[RetentionProbeName, ...] = get_args(RetentionProbeName)
PATCH_TOKEN_PROBES = ("patch_intensity", "patch_texture", "patch_position", "kept")
RETENTION_PATCHES_PER_SLICE = 8
RIDGE_PENALTY_PER_SAMPLE = 0.01
"""Ridge penalty per sample, of standardised features."""
MAX_COMPONENTS = 16
"""Principal directions of the start's features that are asked for."""
_PATCH_STREAM = 3
"""Key of the generator that chooses patches."""

SubjectErrors = Float[np.ndarray, "U"]
"""What each subject adds to 1 − score."""


@dataclass(frozen=True)
class SessionLabel:
    """A label of sessions: one value per view, of which those that are `known` count."""

    values: np.ndarray
    known: Bool[np.ndarray, "V"]
    is_classification: bool


@dataclass(frozen=True)
class PatchTargets:
    """The fixed patches that are asked about, and what is to be told of slices and patches."""

    chosen: Int[np.ndarray, "V S P"]
    mean: Float[np.ndarray, "V S P C"]
    texture: Float[np.ndarray, "V S P C"]
    place: Float[np.ndarray, "V S P 2"]
    slice_values: Float[np.ndarray, "V S C 2"]

    @classmethod
    def of(cls, slices: Sequence[UInt8[np.ndarray, "S C H W"]], patch_size: int, seed: int) -> PatchTargets:
        """Choose patches that show something, as far as there are enough of them; the same for the same seed."""
        columns = [_view_targets(pixels, patch_size, numpy_generator(PROBE, seed, _PATCH_STREAM, number))
                   for number, pixels in enumerate(slices)]  # fmt: skip
        return cls(*(np.stack(column) for column in zip(*columns, strict=True)))


def _view_targets(
    pixels: UInt8[np.ndarray, "S C H W"], patch_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    num_slices, num_contrasts, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    tiles = pixels[:, :, : rows * patch_size, : columns * patch_size].astype(np.float32) / 255
    tiles = tiles.reshape(num_slices, num_contrasts, rows, patch_size, columns, patch_size)
    tiles = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(num_slices, rows * columns, num_contrasts, patch_size**2)
    mean, texture = tiles.mean(axis=-1), tiles.std(axis=-1)
    # Patches without background first, in random order; then others.
    background = (tiles == 0).all(axis=2).mean(axis=-1) > 0.5
    order = np.lexsort((rng.random(background.shape), background))
    chosen = np.sort(order[:, : min(RETENTION_PATCHES_PER_SLICE, rows * columns)], axis=1)
    at = chosen[:, :, None]
    place = np.stack([chosen // columns / rows, chosen % columns / columns], axis=-1)
    of_slice = np.stack([mean.mean(axis=1), pixels.std(axis=(2, 3)) / 255], axis=-1)
    return chosen, np.take_along_axis(mean, at, 1), np.take_along_axis(texture, at, 1), place, of_slice


@dataclass
class RetentionProbes:
    """The questions of a probe, and how each subject of the starting checkpoint answered them.

    Args:
        questions: which are asked.
        shown: the contrasts that each view shows.
        owners: number of each view's subject.
        folds: number of the fold that each view is tested in.
        positions: slice positions.
        labels: what is known of the sessions, by name; empty where views are not whole sessions.
    """

    probe_names: tuple[RetentionProbeName, ...]
    shown: Bool[np.ndarray, "V C"]
    subject_index: Int[np.ndarray, "V"]
    folds: Int[np.ndarray, "V"]
    positions: Float[np.ndarray, "V S"]
    labels: Mapping[str, SessionLabel] = field(default_factory=dict)
    start: dict[str, np.ndarray] = field(default_factory=dict)
    """The start's shares by question, and the main directions of its features; empty as long as it is unknown."""

    @property
    def uses_patch_tokens(self) -> bool:
        """Whether patch tokens are asked for."""
        return any(question in PATCH_TOKEN_PROBES for question in self.probe_names)

    def subject_errors(
        self, cls: Float[np.ndarray, "V S D"], patches: Float[np.ndarray, "V S P D"] | None, told: PatchTargets
    ) -> dict[str, SubjectErrors]:
        """The subjects' shares of 1 − score of every question that can be asked here."""
        num_slices = cls.shape[1]
        slices = cls.reshape(-1, cls.shape[-1]).astype(np.float64)
        found: dict[str, SubjectErrors] = {}
        if "labels" in self.probe_names:
            sessions = cls.mean(axis=1, dtype=np.float64)
            found |= {name: self._label_error(sessions, label) for name, label in self.labels.items()}
        if "slice_position" in self.probe_names and np.ptp(self.positions) > 0:
            found["slice_position"] = self._linear_error(slices, self.positions.reshape(-1, 1), num_slices)
        if "slice_intensity" in self.probe_names:
            found |= self._mean_over_contrasts("slice_intensity", slices, told.slice_values.reshape(len(slices), -1, 2))
        if "identity" in self.probe_names and num_slices > 1:
            found["identity"] = self._identity_error(cls)
        if patches is not None:
            tokens = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
            for question, values in (("patch_intensity", told.mean), ("patch_texture", told.texture)):
                if question in self.probe_names:
                    found |= self._mean_over_contrasts(question, tokens, values.reshape(len(tokens), -1, 1))
            if "patch_position" in self.probe_names and np.ptp(told.place) > 0:
                found["patch_position"] = self._linear_error(tokens, told.place.reshape(-1, 2), len(tokens) // len(cls))
        return found

    def kept(
        self, cls: Float[np.ndarray, "V S D"], patches: Float[np.ndarray, "V S P D"] | None
    ) -> dict[str, SubjectErrors]:
        """Likewise of the start's features; nothing where they are not known."""
        found = {}
        for name, features in (("slices", cls), ("patches", patches)):
            if features is not None and f"directions/{name}" in self.start:
                rows = features.reshape(-1, features.shape[-1]).astype(np.float64)
                wanted = self.start[f"directions/{name}"].astype(np.float64)
                if np.ptp(wanted) > 0:
                    found[f"kept_{name}"] = self._linear_error(rows, wanted, len(rows) // len(features), pooled=True)
        return found

    def set_reference(self, cls: np.ndarray, patches: np.ndarray | None) -> None:
        """Take these features for those of the starting checkpoint."""
        self.start = {}
        if "kept" in self.probe_names:
            of = {"slices": cls} if patches is None else {"slices": cls, "patches": patches}
            self.start = {f"directions/{name}": principal_component_scores(values.reshape(-1, values.shape[-1]))
                          for name, values in of.items()}  # fmt: skip

    def compare(self, subject_errors: Mapping[str, SubjectErrors]) -> dict[str, tuple[float, float]]:
        """Score and standard error of each question.

        The error is that of the difference to the starting checkpoint, over subjects; that of the score itself
        where the start's answer is not known.
        """
        found = {}
        for name, of_subjects in subject_errors.items():
            before = self.start.get(f"shares/{name}", np.zeros_like(of_subjects))
            change = of_subjects - before
            found[name] = (1 - float(of_subjects.sum()), float(np.sqrt(len(change)) * change.std(ddof=1)))
        return found

    def save_start(self, file: Path) -> None:
        """Keep the start's answers for a run that goes on later."""
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.writing")
        try:
            save_file(self.start, temporary)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)

    def load_start(self, file: Path) -> None:
        """Take over what `save_start` wrote; raises OSError or SafetensorError."""
        self.start = load_file(file)

    def _mean_over_contrasts(
        self, name: str, features: Float[np.ndarray, "N D"], values: Float[np.ndarray, "N C T"]
    ) -> dict[str, SubjectErrors]:
        """Each contrast is told in the views that show it; the answer is the mean over contrasts."""
        per_view = len(features) // len(self.shown)
        subject_errors = []
        for contrast in range(values.shape[1]):
            shown = self.shown[:, contrast]
            if len(set(self.folds[shown])) >= 2 and np.ptp(values[np.repeat(shown, per_view), contrast]) > 0:
                subject_errors.append(self._linear_error(features, values[:, contrast], per_view, views=shown))
        return {name: np.mean(subject_errors, axis=0)} if subject_errors else {}

    def _linear_error(
        self,
        features: Float[np.ndarray, "N D"],
        values: Float[np.ndarray, "N T"],
        per_view: int,
        *,
        views: Bool[np.ndarray, "V"] | None = None,
        pooled: bool = False,
    ) -> SubjectErrors:
        """The shares of 1 − R², of the mean over what is told, or pooled: of all of it together."""
        counts = np.repeat(np.ones(len(self.subject_index), bool) if views is None else views, per_view)
        subject_index, folds = np.repeat(self.subject_index, per_view)[counts], np.repeat(self.folds, per_view)[counts]
        features, values = features[counts], values[counts]
        # Made again, the start's features may well lie outside of what a few other subjects show.
        squares = np.square(values - ridge_out_of_fold(features, values, folds, range_margin=float(pooled)))
        total = np.square(values - values.mean(axis=0)).sum(axis=0)
        varies = total > 0
        share = squares.sum(axis=1) / total.sum() if pooled else (squares[:, varies] / total[varies]).mean(axis=1)
        return np.bincount(subject_index, weights=share, minlength=self.subject_index.max() + 1)

    def _label_error(self, sessions: Float[np.ndarray, "V D"], label: SessionLabel) -> SubjectErrors:
        known, num = label.known, self.subject_index.max() + 1
        values, subject_index = label.values[known], self.subject_index[known]
        make = linear_classifier if label.is_classification else linear_regressor
        told = cross_val_predict(sessions[known], values, _cv_splits(self.folds[known]), make)
        if label.is_classification:
            classes, place = np.unique(values, return_inverse=True)
            share = (told != values) / np.bincount(place)[place] / len(classes)
        else:
            share = np.square(told - values) / np.square(values - values.mean()).sum()
        return np.bincount(subject_index, weights=share, minlength=num)

    def _identity_error(self, cls: Float[np.ndarray, "V S D"]) -> SubjectErrors:
        halves = []
        for first in (0, 1):
            half = cls[:, first::2].mean(axis=1, dtype=np.float64)
            half = half - half.mean(axis=0)  # what all of one half share is where its slices lie
            halves.append(half / np.maximum(np.linalg.norm(half, axis=1, keepdims=True), 1e-12))
        nearest = (halves[0] @ halves[1].T).argmax(axis=1)
        missed = self.subject_index[nearest] != self.subject_index
        return np.bincount(self.subject_index, weights=missed / len(missed), minlength=self.subject_index.max() + 1)


def ridge_out_of_fold(
    features: Float[np.ndarray, "N D"],
    values: Float[np.ndarray, "N T"],
    folds: Int[np.ndarray, "N"],
    range_margin: float = 0.0,
) -> Float[np.ndarray, "N T"]:
    """What ridge regression says of each sample, learnt from the other folds.

    Args:
        beyond: answers stay within the range that was learnt from, and so many widths of it on either side.
    """
    told = np.empty(values.shape)
    for part in _cv_splits(folds):
        train, test = part["train"], part["test"]
        model = make_pipeline(StandardScaler(), Ridge(alpha=RIDGE_PENALTY_PER_SAMPLE * len(train)))
        answer = model.fit(features[train], values[train]).predict(features[test]).reshape(len(test), -1)
        lowest, highest = values[train].min(axis=0), values[train].max(axis=0)
        more = range_margin * (highest - lowest)
        told[test] = answer.clip(lowest - more, highest + more)
    return told


def principal_component_scores(features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N T"]:
    """Coordinates along the principal directions of standardised features."""
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    _, vectors = np.linalg.eigh(scaled.T @ scaled)
    return (scaled @ vectors[:, ::-1][:, :MAX_COMPONENTS]).astype(np.float32)


def _cv_splits(folds: Int[np.ndarray, "N"]) -> list[dict[str, np.ndarray]]:
    present = np.unique(folds)
    return [{"train": np.flatnonzero(folds != one), "test": np.flatnonzero(folds == one)} for one in present]
