"""Frozen probes of an encoder on one store: age, diagnosis and the tissue of patches, subject by subject.

The encoder is not trained. Linear models are fitted to its features within the store, cross-validated by
subject; the folds and the sampled patches do not depend on the encoder, so that encoders can be compared
subject by subject.

Axes: N sessions (one per subject), S slices, D width, P patches.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from shifted_cohorts import HEALTHY
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV, RidgeClassifier, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainfound.data.batches import as_tensor
from brainfound.data.splits.dividing import k_folds
from brainfound.data.store import Store
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.monitoring.probes import PATCHES_PER_SLICE, choose_patches, majority_labels

SLICES = 12
PATCH_SLICES = 6
FOLDS = 5
REPEATS = 4
"""Cross-validations with other folds; a session's prediction is the mean of its out-of-fold predictions."""
_SEED = 20_106


@dataclass(frozen=True)
class Outcome:
    """The scores of each subject, in the order of the store."""

    age_error_years: np.ndarray
    """(N,) absolute error of the predicted age."""
    diagnosis_score: np.ndarray
    """(N,) predicted probability of being ill."""
    patch_accuracy: np.ndarray
    """(N,) share of the subject's patches whose tissue was predicted."""

    def save(self, file: object) -> None:
        np.savez(file, **vars(self))

    @classmethod
    def load(cls, file: object) -> Outcome:
        with np.load(file) as arrays:
            return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


class FrozenProbes:
    """The probes of a store, for any encoder with these patches.

    Args:
        store: has ages, diagnoses, and the tissue segmentation as its mask.
        patch_size: of the encoders, in pixels.
    """

    def __init__(self, store: Store, patch_size: int) -> None:
        self.store = store
        table = store.sessions
        subjects = table["subject"].astype(str).tolist()
        assert len(set(subjects)) == len(subjects), "one session per subject"
        self.ages = table["age_years"].to_numpy(float)
        self.ill = (table["diagnosis"] != HEALTHY).to_numpy().astype(int)
        folds = min(FOLDS, np.bincount(self.ill, minlength=2).min())
        strata = table["diagnosis"].ne(HEALTHY).astype(str).tolist()
        self.repeats = [k_folds(subjects, int(folds), _SEED + repeat, strata) for repeat in range(REPEATS)]
        self._choose_patches(patch_size)

    def _choose_patches(self, patch_size: int) -> None:
        """The same patches for every encoder: some of each tissue in each of some slices."""
        rng = np.random.default_rng(_SEED)
        self.patches, labels = [], []
        for session in range(len(self.store)):
            first = self.store.session_rows(session)[0]
            masks = self.store.read_masks(session, self._rows(session, PATCH_SLICES) - first)
            assert masks is not None
            of_slices = majority_labels(masks, patch_size)
            chosen = [choose_patches(of_slice, PATCHES_PER_SLICE, rng) for of_slice in of_slices]
            self.patches.append(chosen)
            labels.append(np.concatenate([of[which] for of, which in zip(of_slices, chosen, strict=True)]))
        self.patch_labels = np.concatenate(labels)
        self.patch_owner = np.repeat(np.arange(len(labels)), [len(of) for of in labels])

    def _rows(self, session: int, num: int) -> np.ndarray:
        """The middles of equal parts of the stack, without its ends, where there is little brain."""
        rows = self.store.session_rows(session)
        places = 0.15 + 0.7 * (np.arange(num) + 0.5) / num
        return rows[np.floor(places * len(rows)).astype(int)]

    @torch.no_grad()
    def run(self, encoder: SliceEncoder) -> Outcome:
        """Embed every session and cross-validate the three linear models."""
        encoder.eval()
        sessions, patches = [], []
        for session in range(len(self.store)):
            encoding = self._encode(encoder, session, SLICES)
            # The features of DINOv2's linear evaluation: the CLS token and the mean patch token.
            sessions.append(np.concatenate([encoding.cls.mean(0).numpy(), encoding.patches.mean((0, 1)).numpy()]))
            tokens = self._encode(encoder, session, PATCH_SLICES).patches.numpy()
            patches.extend(of[chosen] for of, chosen in zip(tokens, self.patches[session], strict=True))
        return self._outcome(np.stack(sessions).astype(float), np.concatenate(patches))

    def _encode(self, encoder: SliceEncoder, session: int, num_slices: int):
        rows = self._rows(session, num_slices)
        present = torch.from_numpy(self.store.present[session]).expand(len(rows), -1)
        return encoder(as_tensor(self.store.read_slices(rows)), present)

    def _outcome(self, sessions: np.ndarray, patches: np.ndarray) -> Outcome:
        num = len(sessions)
        ages, scores = np.zeros((REPEATS, num)), np.zeros((REPEATS, num))
        for repeat, folds in enumerate(self.repeats):
            for fold in folds:
                train, test = fold["train"], fold["test"]
                ages[repeat, test] = self._predict_age(sessions, train, test)
                scores[repeat, test] = self._predict_illness(sessions, train, test)
        right = np.zeros(len(self.patch_labels))
        for fold in self.repeats[0]:
            train, test = (np.isin(self.patch_owner, fold[part]) for part in ("train", "test"))
            model = make_pipeline(StandardScaler(), RidgeClassifier(class_weight="balanced"))
            predicted = model.fit(patches[train], self.patch_labels[train]).predict(patches[test])
            right[test] = predicted == self.patch_labels[test]
        accuracy = np.bincount(self.patch_owner, right) / np.bincount(self.patch_owner)
        return Outcome(np.abs(ages - self.ages).mean(0), scores.mean(0), accuracy)

    def _predict_age(self, features: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-1, 5, 13)))
        predicted = model.fit(features[train], self.ages[train]).predict(features[test])
        return predicted.clip(self.ages[train].min(), self.ages[train].max())

    def _predict_illness(self, features: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        inner = int(min(3, np.bincount(self.ill[train]).min()))
        model = make_pipeline(
            StandardScaler(),
            LogisticRegressionCV(
                Cs=np.logspace(-4, 1, 6), cv=inner, scoring="neg_log_loss", class_weight="balanced", max_iter=300
            ),
        )
        with warnings.catch_warnings():
            # A solver that stops early compares features as well; the library's own renamings are not our matter.
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.simplefilter("ignore", FutureWarning)
            return model.fit(features[train], self.ill[train]).predict_proba(features[test])[:, 1]

    def trivial(self) -> Outcome:
        """The answer without an image: the mean age, even odds of illness, the most frequent tissue."""
        num = len(self.ages)
        errors = np.zeros((REPEATS, num))
        for repeat, folds in enumerate(self.repeats):
            for fold in folds:
                errors[repeat, fold["test"]] = np.abs(self.ages[fold["test"]] - self.ages[fold["train"]].mean())
        most_frequent = np.bincount(self.patch_labels).argmax()
        right = self.patch_labels == most_frequent
        accuracy = np.bincount(self.patch_owner, right) / np.bincount(self.patch_owner)
        return Outcome(errors.mean(0), np.full(num, 0.5), accuracy)
