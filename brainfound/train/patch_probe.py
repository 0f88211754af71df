"""The patch probe: can a linear model tell the tissue under a patch from its token?

Axis legend: ``S`` slices, ``H W`` pixels, ``P`` patches of a slice, ``N`` chosen patches, ``D`` width.

A patch's label is the label that most of its pixels have in the mask. Only some patches of each slice are
looked at, as many of each label as there are, so that background does not fill the sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainfound.data.batches import as_tensor
from brainfound.data.splits import k_folds
from brainfound.data.store import Store
from brainfound.models.encoder import SliceEncoder
from brainfound.train.randomness import PROBE, numpy_generator

PATCHES_PER_SLICE = 32


def majority_labels(masks: Int[np.ndarray, "S H W"], patch_size: int) -> Int[np.ndarray, "S P"]:
    """The most frequent label of each patch, patches row by row; of equally frequent ones the lowest."""
    num_slices, height, width = masks.shape
    tiles = masks.reshape(num_slices, height // patch_size, patch_size, width // patch_size, patch_size)
    tiles = tiles.transpose(0, 1, 3, 2, 4).reshape(num_slices, -1, patch_size**2)
    labels = np.unique(masks)
    counts = np.stack([(tiles == label).sum(axis=-1) for label in labels], axis=-1)
    return labels[counts.argmax(axis=-1)]


def choose_patches(labels: Int[np.ndarray, "P"], num: int, rng: np.random.Generator) -> Int[np.ndarray, "N"]:
    """At most `num` patches of a slice, shared equally by its labels as far as they go."""
    present = np.unique(labels)
    share = max(1, num // len(present))
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:share] for label in present]
    return np.sort(np.concatenate(chosen))


class PatchProbe:
    """A fixed test of patch tokens on fixed slices with masks.

    Args:
        sessions: those with a mask.
        rows: the slice rows of each.
        subjects: by which every session of the store is divided into folds.
    """

    def __init__(
        self,
        store: Store,
        sessions: np.ndarray,
        rows: Sequence[np.ndarray],
        subjects: np.ndarray,
        num_folds: int,
        seed: int,
    ) -> None:
        self.store, self.sessions, self.rows = store, sessions, rows
        self.subjects, self.num_folds, self.seed = subjects[sessions], num_folds, seed

    @torch.no_grad()
    def run(self, encoder: SliceEncoder, device: torch.device) -> float:
        """Balanced accuracy over folds by subject; NaN where features are not finite, or all patches are alike."""
        was_training = encoder.training
        encoder.eval()
        features, labels, owners = [], [], []
        rng = numpy_generator(PROBE, self.seed, 2)
        for session, rows, subject in zip(self.sessions, self.rows, self.subjects, strict=True):
            masks = self.store.read_masks(int(session), rows - self.store.session_rows(int(session))[0])
            assert masks is not None
            present = torch.from_numpy(self.store.present[session]).to(device).expand(len(rows), -1)
            tokens = encoder(as_tensor(self.store.read_slices(rows)).to(device), present).patches
            for of_slice, slice_tokens in zip(majority_labels(masks, encoder.patch_size), tokens, strict=True):
                chosen = choose_patches(of_slice, PATCHES_PER_SLICE, rng)
                features.append(slice_tokens[torch.from_numpy(chosen).to(device)].float().cpu().numpy())
                labels.append(of_slice[chosen])
                owners.extend([subject] * len(chosen))
        encoder.train(was_training)
        return self._score(np.concatenate(features), np.concatenate(labels), owners)

    def _score(self, features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"], owners: list[str]) -> float:
        if not np.isfinite(features).all() or len(np.unique(labels)) < 2:
            return float("nan")
        predicted = np.empty_like(labels)
        for fold in k_folds(owners, min(self.num_folds, len(set(owners))), self.seed):
            train, test = fold["train"], fold["test"]
            if len(np.unique(labels[train])) == 1:
                predicted[test] = labels[train][0]
                continue
            model = make_pipeline(StandardScaler(), RidgeClassifier(class_weight="balanced"))
            predicted[test] = model.fit(features[train], labels[train]).predict(features[test])
        return float(balanced_accuracy_score(labels, predicted))
