"""Probes: what frozen features are good for, measured while they are being trained.

Axis legend: ``N`` samples (sessions, or slices), ``S`` slices of a session, ``D`` width.

A session's embedding is the mean CLS over a few evenly spaced slices. What is predicted is chosen from
what the store knows: diagnosis, else age, else the position of a slice in the head, which needs no
label at all. No subject, and no image under two names, is ever on both sides of a split.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import balanced_accuracy_score, r2_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainfound.data.batches import as_tensor
from brainfound.data.split_file import require_no_shared_content, subjects_to_divide
from brainfound.data.splits import k_folds
from brainfound.data.store import Store
from brainfound.errors import TrainingError
from brainfound.models.encoder import SliceEncoder
from brainfound.recipes import Recipe
from brainfound.train.randomness import PROBE, numpy_generator

Target = Literal["diagnosis", "age_years", "slice_position"]
SMALLEST_CLASS = 5
FEWEST_AGES = 10
NUM_BOOTSTRAPS = 200


class ProbeRecipe(Recipe):
    """What is probed, how often, on how much."""

    every: int = Field(default=500, ge=0)
    """Steps between two probes of the teacher; 0 turns them off."""
    target: Literal["auto", "diagnosis", "age_years", "slice_position"] = "auto"
    """What is predicted; "auto" takes the first of the three that the store can support."""
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


@dataclass(frozen=True)
class ProbeScores:
    """Scores of one probe; higher is better."""

    linear: float
    knn: float
    standard_error: float
    """Of the guarding method's score, by bootstrap over subjects."""
    metric: str
    target: str


def choose_target(store: Store) -> Target:
    """The first of diagnosis, age and slice position that a store has enough of."""
    sessions = store.sessions
    if "diagnosis" in sessions:
        counts = sessions["diagnosis"].dropna().astype(str).value_counts()
        if (counts >= SMALLEST_CLASS).sum() >= 2:
            return "diagnosis"
    if "age_years" in sessions:
        ages = sessions["age_years"].dropna().astype(float)
        if len(ages) >= FEWEST_AGES and ages.std() > 0:
            return "age_years"
    return "slice_position"


class Probe:
    """A fixed test of an encoder on a fixed subset of a store.

    Args:
        store: the pretraining store; probing it is not a test of generalisation to other data, but it
            shows features getting better or worse.
        recipe: the settings.
        seed: picks the subset and the folds.

    Raises:
        TrainingError: if the store cannot support the target.
    """

    def __init__(self, store: Store, recipe: ProbeRecipe, seed: int) -> None:
        self.store, self.recipe, self.seed = store, recipe, seed
        self.target: str = choose_target(store) if recipe.target == "auto" else recipe.target
        self.classifies = self.target == "diagnosis"
        self.metric = "balanced_accuracy" if self.classifies else "r2"
        sessions = self._choose_sessions()
        self.rows = np.stack([self._rows_of(session) for session in sessions])
        self.present = store.present[sessions]
        subjects = subjects_to_divide(store)[0][sessions].astype(str)
        if self.target == "slice_position":
            labels = store.slice_positions_mm[self.rows].ravel()
            subjects = np.repeat(subjects, self.rows.shape[1])
        else:
            labels = store.sessions[self.target].to_numpy()[sessions]
        self.labels = labels.astype(str) if self.classifies else labels.astype(float)
        self.subjects = subjects
        num_subjects = len(set(subjects))
        if num_subjects < 2:
            raise TrainingError(
                "a probe needs sessions of at least two subjects",
                where="probe",
                got=num_subjects,
                remedy="Set probe.every=0 to train without a probe",
            )
        strata = None if self.target == "slice_position" else self.labels.tolist()
        self.folds = k_folds(subjects.tolist(), min(recipe.folds, num_subjects), seed, strata)
        per_session = len(self.labels) // len(sessions)
        for fold in self.folds:
            require_no_shared_content(store, {part: sessions[index // per_session] for part, index in fold.items()})

    def _choose_sessions(self) -> np.ndarray:
        table = self.store.sessions
        usable = np.arange(len(table))
        if self.target != "slice_position":
            if self.target not in table:
                raise TrainingError("the store has no such column", where="probe.target", got=self.target)
            usable = np.flatnonzero(table[self.target].notna().to_numpy())
        if self.classifies:
            labels = table["diagnosis"].astype(str)
            frequent = labels[usable].map(labels.iloc[usable].value_counts()).to_numpy() >= SMALLEST_CLASS
            usable = usable[frequent]
        if len(usable) < 2:
            raise TrainingError("too few sessions have this column", where="probe.target", got=self.target)
        order = numpy_generator(PROBE, self.seed).permutation(usable)
        return np.sort(order[: self.recipe.max_sessions])

    def _rows_of(self, session: int) -> np.ndarray:
        rows = self.store.session_rows(session)
        # The middles of equal parts of the stack: the ends hold little brain.
        parts = (np.arange(self.recipe.slices_per_session) + 0.5) / self.recipe.slices_per_session
        return rows[np.floor(parts * len(rows)).astype(int)]

    def run(self, encoder: SliceEncoder, device: torch.device) -> ProbeScores:
        """Embed the subset and score it; the encoder's mode is left as it was."""
        return self.score(self.embed(encoder, device))

    @torch.no_grad()
    def embed(self, encoder: SliceEncoder, device: torch.device) -> Float[np.ndarray, "N S D"]:
        """CLS tokens of the subset's slices, session by session."""
        was_training = encoder.training
        encoder.eval()
        embeddings = []
        for rows, present in zip(self.rows, self.present, strict=True):
            pixels = as_tensor(self.store.read_slices(rows)).to(device)
            mask = torch.from_numpy(present).to(device).expand(len(rows), -1)
            embeddings.append(encoder(pixels, mask).cls.float().cpu().numpy())
        encoder.train(was_training)
        return np.stack(embeddings)

    def score(self, embeddings: Float[np.ndarray, "N S D"]) -> ProbeScores:
        """Out-of-fold scores of a linear and a k-NN model; NaN where the features are not finite."""
        if self.target == "slice_position":
            features = embeddings.reshape(-1, embeddings.shape[-1])
        else:
            features = embeddings.mean(axis=1)
        if not np.isfinite(features).all():
            # Told as a score, not raised: only rank 0 is here, and the guard stops all ranks together.
            return ProbeScores(np.nan, np.nan, 0.0, self.metric, self.target)
        predicted = {name: self._out_of_fold(features, make) for name, make in self._models().items()}
        return ProbeScores(
            linear=self._measure(self.labels, predicted["linear"]),
            knn=self._measure(self.labels, predicted["knn"]),
            standard_error=self._standard_error(predicted[self.recipe.method]),
            metric=self.metric,
            target=self.target,
        )

    def _models(self) -> dict[str, Callable[[int], Any]]:
        """Makers of models; they are given the number of training samples."""
        k = self.recipe.neighbours
        if self.classifies:
            return {
                "linear": lambda n: LogisticRegression(C=1.0, class_weight="balanced", max_iter=500),
                "knn": lambda n: KNeighborsClassifier(min(k, n), metric="cosine"),
            }
        return {
            "linear": lambda n: RidgeCV(alphas=np.logspace(-1, 5, 7)),
            "knn": lambda n: KNeighborsRegressor(min(k, n), metric="cosine"),
        }

    def _out_of_fold(self, features: Float[np.ndarray, "N D"], make: Callable[[int], Any]) -> np.ndarray:
        predicted = np.empty_like(self.labels)
        for fold in self.folds:
            train, test = fold["train"], fold["test"]
            if len(set(self.labels[train])) == 1:
                predicted[test] = self.labels[train][0]
                continue
            model = make_pipeline(StandardScaler(), make(len(train)))
            with warnings.catch_warnings():
                # A probe compares features; a solver that stops at 500 iterations compares them as well.
                warnings.simplefilter("ignore", ConvergenceWarning)
                predicted[test] = model.fit(features[train], self.labels[train]).predict(features[test])
        return predicted

    def _measure(self, labels: np.ndarray, predicted: np.ndarray) -> float:
        with warnings.catch_warnings():
            # A bootstrap sample may lack a class; its predictions then count for nothing.
            warnings.simplefilter("ignore", UserWarning)
            measure = balanced_accuracy_score if self.classifies else r2_score
            return float(measure(labels, predicted))

    def _standard_error(self, predicted: np.ndarray) -> float:
        rng = numpy_generator(PROBE, self.seed, 1)
        members = [np.flatnonzero(self.subjects == subject) for subject in sorted(set(self.subjects))]
        scores = []
        for _ in range(NUM_BOOTSTRAPS):
            drawn = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
            if self.classifies or np.ptp(self.labels[drawn]) > 0:
                scores.append(self._measure(self.labels[drawn], predicted[drawn]))
        return float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
