"""Probes: what frozen features are good for, measured while they are being trained.

Axis legend: ``V`` views (a session with all its contrasts, or with one), ``S`` slices of a view, ``N``
samples (views, or slices), ``D`` width.

A view's embedding is the mean CLS over a few evenly spaced slices. What is predicted is chosen from what
the store knows (see `brainfound.train.probe_targets`). No subject, and no image under two names, is ever on
both sides of a split.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from brainfound.data.batches import as_tensor
from brainfound.data.split_file import require_no_shared_content, subjects_to_divide
from brainfound.data.splits import k_folds
from brainfound.data.store import Store
from brainfound.errors import TrainingError
from brainfound.evaluate.embedding_probes import linear_classifier, linear_regressor, out_of_fold
from brainfound.models.encoder import SliceEncoder
from brainfound.recipes import Recipe
from brainfound.train.patch_probe import PatchProbe
from brainfound.train.probe_targets import (
    CLASSES,
    OF_SLICES,
    Target,
    choose_target,
    frequent_contrasts,
    labelled_sessions,
    require_target,
)
from brainfound.train.randomness import PROBE, numpy_generator

NUM_BOOTSTRAPS = 200


class ProbeRecipe(Recipe):
    """What is probed, how often, on how much."""

    every: int = Field(default=500, ge=0)
    """Steps between two probes of the teacher; 0 turns them off."""
    target: Literal["auto"] | Target = "auto"
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

    def line(self, method: Literal["linear", "knn"]) -> dict[str, Any]:
        """The entries of the log; ``probe`` is the score that guards."""
        scores = {"probe": getattr(self, method), "probe/linear": self.linear, "probe/knn": self.knn}
        if self.patch is not None:
            scores["probe/patch"] = self.patch
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

    Raises:
        RecipeError: if the store knows too little of the target.
        TrainingError: if there are fewer than two subjects, or one class in what is probed.
    """

    def __init__(self, store: Store, recipe: ProbeRecipe, seed: int) -> None:
        self.store, self.recipe, self.seed = store, recipe, seed
        self.target: Target = choose_target(store) if recipe.target == "auto" else recipe.target
        require_target(store, self.target)
        self.classifies = self.target in CLASSES
        self.metric = "balanced_accuracy" if self.classifies else "r2"
        sessions = self._choose_sessions()
        self.views, self.present, labels = self._make_views(sessions)
        self.rows = np.stack([self._rows_of(session) for session in self.views])
        samples = self.views
        if self.target in OF_SLICES:
            labels = store.slice_positions_mm[self.rows].ravel()
            samples = np.repeat(self.views, self.rows.shape[1])
        self.labels = labels.astype(str) if self.classifies else labels.astype(float)
        self.classes = np.unique(self.labels) if self.classifies else self.labels[:0]
        if len(self.classes) == 1:
            raise TrainingError("a probe needs two classes", where="probe.target", got=self.target)
        self.chance = 1 / len(self.classes) if self.classifies else 0.0
        self.subjects = subjects_to_divide(store)[0][samples].astype(str)
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
            require_no_shared_content(store, {part: samples[index] for part, index in fold.items()})
        self.patches = self._patch_probe(sessions) if recipe.patch else None

    def _choose_sessions(self) -> np.ndarray:
        usable = labelled_sessions(self.store, self.target)
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
        subjects = subjects_to_divide(self.store)[0].astype(str)
        if len(set(subjects[masked])) < 2:
            warnings.warn("probe.patch is left out: the store has no masks of two subjects", stacklevel=2)
            return None
        rows = [self._rows_of(session) for session in masked]
        return PatchProbe(self.store, masked, rows, subjects, self.recipe.folds, self.seed)

    def _rows_of(self, session: int) -> np.ndarray:
        rows = self.store.session_rows(session)
        # The middles of equal parts of the stack: the ends hold little brain.
        parts = (np.arange(self.recipe.slices_per_session) + 0.5) / self.recipe.slices_per_session
        return rows[np.floor(parts * len(rows)).astype(int)]

    def run(self, encoder: SliceEncoder, device: torch.device) -> ProbeScores:
        """Embed the subset and score it; the encoder's mode is left as it was."""
        scores = self.score(self.embed(encoder, device))
        return scores if self.patches is None else replace(scores, patch=self.patches.run(encoder, device))

    @torch.no_grad()
    def embed(self, encoder: SliceEncoder, device: torch.device) -> Float[np.ndarray, "V S D"]:
        """CLS tokens of the slices, view by view."""
        was_training = encoder.training
        encoder.eval()
        embeddings = []
        for rows, present in zip(self.rows, self.present, strict=True):
            pixels = as_tensor(self.store.read_slices(rows)).to(device)
            mask = torch.from_numpy(present).to(device).expand(len(rows), -1)
            embeddings.append(encoder(pixels, mask).cls.float().cpu().numpy())
        encoder.train(was_training)
        return np.stack(embeddings)

    def score(self, embeddings: Float[np.ndarray, "V S D"]) -> ProbeScores:
        """Out-of-fold scores of a linear and a k-NN model; NaN where the features are not finite."""
        of_slices = self.target in OF_SLICES
        features = embeddings.reshape(-1, embeddings.shape[-1]) if of_slices else embeddings.mean(axis=1)
        features = features.astype(np.float64)  # a float32 near its end overflows when it is squared
        if not np.isfinite(features).all():
            # Told as a score, not raised: only rank 0 is here, and the guard stops all ranks together.
            return ProbeScores(np.nan, np.nan, 0.0, self.metric, self.target, self.chance)
        predicted = {
            name: out_of_fold(features, self.labels, self.folds, make) for name, make in self._models().items()
        }
        return ProbeScores(
            linear=self._measure(self.labels, predicted["linear"]),
            knn=self._measure(self.labels, predicted["knn"]),
            standard_error=self._standard_error(predicted[self.recipe.method]),
            chance=self.chance,
            metric=self.metric,
            target=self.target,
        )

    def _models(self) -> dict[str, Callable[[int], Any]]:
        """Makers of models; they are given the number of training samples."""
        k = self.recipe.neighbours
        if self.classifies:
            return {
                "linear": linear_classifier,
                "knn": lambda n: KNeighborsClassifier(min(k, n), metric="cosine"),
            }
        return {
            "linear": linear_regressor,
            "knn": lambda n: KNeighborsRegressor(min(k, n), metric="cosine"),
        }

    def _measure(self, labels: np.ndarray, predicted: np.ndarray) -> float:
        """Balanced accuracy over the classes among `labels`, or R²."""
        if self.classifies:
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
            if self.classifies or np.ptp(self.labels[drawn]) > 0:
                scores.append(self._measure(self.labels[drawn], predicted[drawn]))
        return float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
