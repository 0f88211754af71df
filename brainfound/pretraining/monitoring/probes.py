"""Probes: what frozen features are good for, measured while they are being trained.

Axis legend: ``V`` views (a session with all its contrasts, or with one), ``S`` slices of a view, ``N``
samples (views, or slices), ``D`` width.

A view's embedding is the mean CLS over a few evenly spaced slices. What is predicted is chosen from what
the store knows (see `probe_targets`); what else is watched in the same pass, and why, is in
`retention`. No subject, and no image under two names, is ever on
both sides of a split.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from brainfound.data.batches import as_tensor
from brainfound.data.splits.dividing import k_folds
from brainfound.data.splits.split_file import get_split_groups, require_no_shared_images
from brainfound.data.store import Store
from brainfound.errors import TrainingError
from brainfound.metrics.embedding_probes import cross_val_predict, linear_classifier, linear_regressor
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.monitoring.probe_targets import (
    CLASS_TARGETS,
    SLICE_TARGETS,
    PatchProbe,
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
    SubjectErrors,
)
from brainfound.recipes import Recipe
from brainfound.training.checkpoint import wrap_write_errors
from brainfound.training.randomness import PROBE, numpy_generator

NUM_BOOTSTRAPS = 200


class ProbeRecipe(Recipe):
    """What is probed, how often, on how much."""

    every: int = Field(default=500, ge=0)
    """Steps between two probes of the teacher; 0 turns them off."""
    target: Literal["auto"] | ProbeTarget = "auto"
    """What is predicted; "auto" takes the first that the store supports of diagnosis, age, sex, site, contrast
    and slice position. A high score of site is no merit, but its fall is damage."""
    method: Literal["linear", "knn"] = "linear"
    """Whose score guards the run; both are logged."""
    max_sessions: int = Field(default=200, ge=2)
    """Sessions of the fixed subset that is probed."""
    slices_per_session: int = Field(default=8, ge=1)
    """Evenly spaced slices that a session is embedded from."""
    folds: int = Field(default=5, ge=2)
    """Folds of the cross-validation by subject; fewer if there are fewer subjects."""
    neighbours: int = Field(default=5, ge=1)
    """k of the k-NN probe."""
    patch: bool = False
    """Whether to log also how well a linear model tells the tissue of patches, where the store has masks. It does
    not guard the run."""
    watch: tuple[RetentionProbeName, ...] = RETENTION_PROBES
    """What is watched beside the target, from the same embeddings and without labels: see
    `retention`. [] leaves the guard with the target alone. `guard.watch_drop` says what a drop is."""


@dataclass(frozen=True)
class ProbeScores:
    """Scores of one probe; higher is better."""

    linear: float
    knn: float
    standard_error: float
    """Of the guarding method's score, by bootstrap over subjects."""
    metric: str
    target: str
    chance: float = 0.0
    """What features without information score."""
    patch: float | None = None
    """Balanced accuracy of a linear model of patch tokens; None without one."""
    retention: dict[str, tuple[float, float]] = field(default_factory=dict)
    """What is watched beside the target: score and standard error, of the difference to the start."""

    def line(self, method: Literal["linear", "knn"]) -> dict[str, Any]:
        """The entries of the log; ``probe`` is the score that guards."""
        scores = {"probe": getattr(self, method), "probe/linear": self.linear, "probe/knn": self.knn}
        if self.patch is not None:
            scores["probe/patch"] = self.patch
        for name, (score, error) in self.retention.items():
            scores |= {f"watch/{name}": score, f"watch_error/{name}": error}
        return scores | {
            "probe_standard_error": self.standard_error,
            "probe_chance": self.chance,
            "probe_metric": self.metric,
            "probe_target": self.target,
        }


class Probe:
    """A fixed test of an encoder on a fixed subset of a store.

    Args:
        store: the pretraining store; probing it is not a test of generalisation to other data, but it
            shows features getting better or worse.
        recipe: the settings.
        seed: picks the subset and the folds.
        start_file: where a resumed run finds what `save_start` wrote.

    Raises:
        RecipeError: if the store knows too little of the target.
        TrainingError: if there are fewer than two subjects, or one class in what is probed.
    """

    def __init__(self, store: Store, recipe: ProbeRecipe, seed: int, start_file: Path | None = None) -> None:
        self.store, self.recipe, self.seed, self.start_file = store, recipe, seed, start_file
        self.target: ProbeTarget = choose_probe_target(store) if recipe.target == "auto" else recipe.target
        require_probe_target(store, self.target)
        self.is_classification = self.target in CLASS_TARGETS
        self.metric = "balanced_accuracy" if self.is_classification else "r2"
        sessions = self._choose_sessions()
        self.views, self.present, labels = self._make_views(sessions)
        self.rows = np.stack([self._slice_rows(session) for session in self.views])
        samples = self.views
        if self.target in SLICE_TARGETS:
            labels = store.slice_positions_mm[self.rows].ravel()
            samples = np.repeat(self.views, self.rows.shape[1])
        self.labels = labels.astype(str) if self.is_classification else labels.astype(float)
        self.classes = np.unique(self.labels) if self.is_classification else self.labels[:0]
        if len(self.classes) == 1:
            raise TrainingError("a probe needs two classes", where="probe.target", got=self.target)
        self.chance = 1 / len(self.classes) if self.is_classification else 0.0
        self.subjects = get_split_groups(store)[0][samples].astype(str)
        num_subjects = len(set(self.subjects))
        if num_subjects < 2:
            raise TrainingError(
                "a probe needs sessions of at least two subjects",
                where="probe",
                got=num_subjects,
                remedy="Set probe.every=0 to train without a probe",
            )
        # A subject has slices everywhere, and views of several contrasts: nothing to balance over folds.
        strata = None if self.target in ("slice_position", "contrast") else self.labels.tolist()
        self.folds = k_folds(self.subjects.tolist(), min(recipe.folds, num_subjects), seed, strata)
        for fold in self.folds:
            require_no_shared_images(store, {part: samples[index] for part, index in fold.items()})
        self.patches = self._patch_probe(sessions) if recipe.patch else None
        self.watch = self._make_retention_probes() if recipe.watch else None
        self._patch_targets: PatchTargets | None = None

    def _choose_sessions(self) -> np.ndarray:
        usable = sessions_with_target(self.store, self.target)
        order = numpy_generator(PROBE, self.seed).permutation(usable)
        return np.sort(order[: self.recipe.max_sessions])

    def _make_views(self, sessions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each view: its session, the contrasts that it shows (bool), and its label."""
        present = self.store.present[sessions]
        if self.target != "contrast":
            table = self.store.sessions
            labels = table[self.target].to_numpy()[sessions] if self.target in table else np.zeros(len(sessions))
            return sessions, present, labels
        contrasts = frequent_contrasts(self.store)
        which, column = np.nonzero(present[:, contrasts])
        # As many embeddings as of any other target, of whole sessions.
        most = max(2, self.recipe.max_sessions // len(contrasts))
        which, column = which[which < most], column[which < most]
        shown = np.zeros((len(which), present.shape[1]), dtype=bool)
        shown[np.arange(len(which)), contrasts[column]] = True
        return sessions[which], shown, np.array(self.store.contrasts)[contrasts[column]]

    def _patch_probe(self, sessions: np.ndarray) -> PatchProbe | None:
        """None where fewer than two subjects have a mask."""
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
        fold_of = np.empty(len(names), dtype=int)
        for number, fold in enumerate(self.folds):
            fold_of[subject_index[fold["test"]]] = number
        if self.target in SLICE_TARGETS:
            subject_index = subject_index[:: self.rows.shape[1]]
        probe_names = tuple(question for question in self.recipe.watch if question != self.target)
        labels = self._labels(fold_of[subject_index]) if "labels" in probe_names and self.target != "contrast" else {}
        positions = self.store.slice_positions_mm[self.rows]
        return RetentionProbes(probe_names, self.present, subject_index, fold_of[subject_index], positions, labels)

    def _labels(self, folds: np.ndarray) -> dict[str, SessionLabel]:
        """Labels beside the target that views of several folds have."""
        found: dict[str, SessionLabel] = {}
        for name in supported_targets(self.store):
            known = np.isin(self.views, sessions_with_target(self.store, name))
            values = self.store.sessions[name].to_numpy()[self.views]
            values = values.astype(str) if name in CLASS_TARGETS else np.where(known, values, np.nan).astype(float)
            if name != self.target and len(set(folds[known])) > 1 and len(set(values[known])) > 1:
                found[name] = SessionLabel(values, known, name in CLASS_TARGETS)
        return found

    def _slice_rows(self, session: int) -> np.ndarray:
        rows = self.store.session_rows(session)
        # The middles of equal parts of the stack: the ends hold little brain.
        parts = (np.arange(self.recipe.slices_per_session) + 0.5) / self.recipe.slices_per_session
        return rows[np.floor(parts * len(rows)).astype(int)]

    def run(self, encoder: SliceEncoder, device: torch.device, is_starting_checkpoint: bool = False) -> ProbeScores:
        """Embed the subset and score it; the encoder's mode is left as it was.

        Args:
            is_start: this is the starting checkpoint, which later ones are compared with.
        """
        cls, patches = self._encode(encoder, device)
        predictions = self._predict(cls)
        scores = self._scores(predictions)
        if self.watch is not None and predictions is not None:
            scores = replace(
                scores, retention=self._retention_scores(self.watch, cls, patches, predictions, is_starting_checkpoint)
            )
        return scores if self.patches is None else replace(scores, patch=self.patches.run(encoder, device))

    @torch.no_grad()
    def _encode(
        self, encoder: SliceEncoder, device: torch.device
    ) -> tuple[Float[np.ndarray, "V S D"], Float[np.ndarray, "V S P D"] | None]:
        """CLS tokens of the slices, view by view, and the patch tokens that are watched."""
        was_training = encoder.training
        encoder.eval()
        if self.watch is not None and self._patch_targets is None:
            self._patch_targets = PatchTargets.of(
                [self.store.read_slices(rows) for rows in self.rows], encoder.patch_size, self.seed
            )
        embeddings, tokens = [], []
        for view, (rows, present) in enumerate(zip(self.rows, self.present, strict=True)):
            pixels = as_tensor(self.store.read_slices(rows)).to(device)
            mask = torch.from_numpy(present).to(device).expand(len(rows), -1)
            encoding = encoder(pixels, mask)
            embeddings.append(encoding.cls.float().cpu().numpy())
            if self._patch_targets is not None and self.watch is not None and self.watch.uses_patch_tokens:
                chosen = torch.from_numpy(self._patch_targets.chosen[view]).to(device)[:, :, None]
                tokens.append(torch.take_along_dim(encoding.patches, chosen, dim=1).float().cpu().numpy())
        encoder.train(was_training)
        return np.stack(embeddings), np.stack(tokens) if tokens else None

    def score(self, embeddings: Float[np.ndarray, "V S D"]) -> ProbeScores:
        """Out-of-fold scores of a linear and a k-NN model; NaN where the features are not finite."""
        return self._scores(self._predict(embeddings))

    def _predict(self, embeddings: Float[np.ndarray, "V S D"]) -> dict[str, np.ndarray] | None:
        """What each model says of each sample; None where the features are not finite."""
        of_slices = self.target in SLICE_TARGETS
        features = embeddings.reshape(-1, embeddings.shape[-1]) if of_slices else embeddings.mean(axis=1)
        features = features.astype(np.float64)  # a float32 near its end overflows when it is squared
        if not np.isfinite(features).all():
            return None
        return {
            name: cross_val_predict(features, self.labels, self.folds, make)
            for name, make in self._model_factories().items()
        }

    def _scores(self, predicted: dict[str, np.ndarray] | None) -> ProbeScores:
        if predicted is None:
            # Told as a score, not raised: only rank 0 is here, and the guard stops all ranks together.
            return ProbeScores(np.nan, np.nan, 0.0, self.metric, self.target, self.chance)
        return ProbeScores(
            linear=self._score_predictions(self.labels, predicted["linear"]),
            knn=self._score_predictions(self.labels, predicted["knn"]),
            standard_error=self._standard_error(predicted[self.recipe.method]),
            metric=self.metric,
            target=self.target,
            chance=self.chance,
        )

    def _retention_scores(
        self,
        watch: RetentionProbes,
        cls: np.ndarray,
        patches: np.ndarray | None,
        predictions: dict[str, np.ndarray],
        is_starting_checkpoint: bool,
    ) -> dict[str, tuple[float, float]]:
        """Score and standard error of what is watched; nothing where patch tokens are not finite."""
        assert self._patch_targets is not None
        if patches is not None and not np.isfinite(patches).all():
            patches = None
        if is_starting_checkpoint:
            watch.set_reference(cls, patches)
        elif not watch.start and self.start_file is not None:
            self._load_start(watch, self.start_file)
        subject_errors = watch.subject_errors(cls, patches, self._patch_targets) | watch.kept(cls, patches)
        if "other_method" in watch.probe_names:
            other = "knn" if self.recipe.method == "linear" else "linear"
            subject_errors[f"{self.target}_{other}"] = self._subject_errors(predictions[other])
        if is_starting_checkpoint:
            watch.start |= {f"shares/{name}": of_subjects for name, of_subjects in subject_errors.items()}
        return watch.compare(subject_errors)

    def _subject_errors(self, predicted: np.ndarray) -> SubjectErrors:
        """What each subject adds to 1 − score."""
        subject_index = np.unique(self.subjects, return_inverse=True)[1]
        if self.is_classification:
            place = np.unique(self.labels, return_inverse=True)[1]
            share = (predicted != self.labels) / np.bincount(place)[place] / len(self.classes)
        else:
            share = np.square(predicted - self.labels) / np.square(self.labels - self.labels.mean()).sum()
        return np.bincount(subject_index, weights=share)

    def save_start(self) -> None:
        """Write how the start answered into the start file, for a run that is resumed."""
        if self.watch is not None and self.watch.start and self.start_file is not None:
            with wrap_write_errors("what is watched of the start", self.start_file):
                self.watch.save_start(self.start_file)

    def _load_start(self, watch: RetentionProbes, file: Path) -> None:
        try:
            watch.load_start(file)
        except (OSError, SafetensorError) as error:
            self.start_file = None  # said once
            text = f"{file} cannot be read ({error}); what is watched is not compared with the start"
            warnings.warn(text, stacklevel=2)

    def _model_factories(self) -> dict[str, Callable[[int], Any]]:
        """Makers of models; they are given the number of training samples."""
        k = self.recipe.neighbours
        if self.is_classification:
            return {
                "linear": linear_classifier,
                "knn": lambda n: KNeighborsClassifier(min(k, n), metric="cosine"),
            }
        return {
            "linear": linear_regressor,
            "knn": lambda n: KNeighborsRegressor(min(k, n), metric="cosine"),
        }

    def _score_predictions(self, labels: np.ndarray, predicted: np.ndarray) -> float:
        """Balanced accuracy over the classes among `labels`, or R²."""
        if self.is_classification:
            # A bootstrap sample may lack a class; it then counts for nothing.
            right = predicted == labels
            return float(np.mean([right[labels == one].mean() for one in self.classes if (labels == one).any()]))
        return float(1 - np.square(labels - predicted).sum() / np.square(labels - labels.mean()).sum())

    def _standard_error(self, predicted: np.ndarray) -> float:
        rng = numpy_generator(PROBE, self.seed, 1)
        members = [np.flatnonzero(self.subjects == subject) for subject in sorted(set(self.subjects))]
        scores = []
        for _ in range(NUM_BOOTSTRAPS):
            drawn = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
            if self.is_classification or np.ptp(self.labels[drawn]) > 0:
                scores.append(self._score_predictions(self.labels[drawn], predicted[drawn]))
        return float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
