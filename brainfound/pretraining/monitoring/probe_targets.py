"""The patch probe: can a linear model tell the tissue under a patch from its token?

Axis legend: ``S`` slices, ``H W`` pixels, ``P`` patches of a slice, ``N`` chosen patches, ``D`` width.

A patch's label is the label that most of its pixels have in the mask. Only some patches of each slice are
looked at, as many of each label as there are, so that background does not fill the sample.

What a probe predicts, and whether a store knows enough of it.

With "auto" a probe takes the first that the store supports of: diagnosis, age, sex, site, contrast,
slice position. The first four are what the cohort says of a session. The last two need no label: which
contrast a single-contrast embedding is of, and where in the head a slice lies.

A probe of site is not a goal: a model that is to work at other sites gains nothing from knowing the site.
It measures whether fine detail of the image is still in the features, and as nothing in the objective asks
for its removal, a sudden fall says damage like any other. So the guard takes it for what it is, a drop,
and nobody should choose a model for a high value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainfound.data.batches import as_tensor
from brainfound.data.splits.dividing import k_folds
from brainfound.data.store import Store
from brainfound.errors import RecipeError
from brainfound.models.encoder import SliceEncoder
from brainfound.training.randomness import PROBE, numpy_generator

ProbeTarget = Literal["diagnosis", "age_years", "sex", "site", "contrast", "slice_position"]
TARGET_PRIORITY: tuple[ProbeTarget, ...] = ("diagnosis", "age_years", "sex", "site", "contrast", "slice_position")
CLASS_TARGETS: tuple[ProbeTarget, ...] = ("diagnosis", "sex", "site", "contrast")
"""Targets that are classes; the others are numbers."""
SLICE_TARGETS: tuple[ProbeTarget, ...] = ("slice_position",)
"""Targets of each slice; the others are of a session."""
MIN_CLASS_SESSIONS = 5
MIN_AGES = 10
_CLASSES_SHOWN = 5


def choose_probe_target(store: Store) -> ProbeTarget:
    """The first of `TARGET_PRIORITY` that a store has enough of."""
    return next(
        target for target in TARGET_PRIORITY if _SUPPORT_CHECKS.get(target, _is_column_supported)(store, target)
    )


def supported_targets(store: Store) -> list[ProbeTarget]:
    """What a store has enough of among what a cohort says of its sessions."""
    of_sessions = (target for target in TARGET_PRIORITY if target not in ("contrast", *SLICE_TARGETS))
    return [target for target in of_sessions if _SUPPORT_CHECKS.get(target, _is_column_supported)(store, target)]


def sessions_with_target(store: Store, target: ProbeTarget) -> np.ndarray:
    """Indices of the sessions whose label is known and, of classes, frequent enough; empty without such a column."""
    everybody = np.arange(len(store.sessions))
    if target == "contrast":
        return everybody[store.present[:, frequent_contrasts(store)].any(axis=1)]
    if target in SLICE_TARGETS:
        return everybody
    if target not in store.sessions:
        return everybody[:0]
    known = store.sessions[target].notna().to_numpy()
    if target in CLASS_TARGETS:
        labels = store.sessions[target].astype(str)
        known = known & (labels.map(labels[known].value_counts()).fillna(0).to_numpy() >= MIN_CLASS_SESSIONS)
    return everybody[known]


def frequent_contrasts(store: Store) -> np.ndarray:
    """Indices of the contrasts that enough sessions have."""
    return np.flatnonzero(store.present.sum(axis=0) >= MIN_CLASS_SESSIONS)


def require_probe_target(store: Store, target: ProbeTarget) -> None:
    """Refuse a target that a store knows too little of to be probed at all.

    Raises:
        RecipeError: counts what there is.
    """
    if target in SLICE_TARGETS:
        return
    remedy = f"Set probe.target=auto, which takes {choose_probe_target(store)} in this store"
    if target == "contrast":
        _require_classes(target, _contrast_counts(store), remedy)
        return
    if target not in store.sessions:
        raise RecipeError("the store has no such column", where="probe.target", got=target, remedy=remedy)
    known = store.sessions[target].dropna()
    if target in CLASS_TARGETS:
        _require_classes(target, known.astype(str).value_counts().to_dict(), remedy)
    elif len(known) < 2:
        raise RecipeError(
            f"too few sessions have {target}",
            where="probe.target",
            got=f"{len(known)} of {len(store.sessions)} sessions",
            expected="two or more",
            remedy=remedy,
        )


def _require_classes(target: ProbeTarget, counts: dict[str, int], remedy: str) -> None:
    if sum(count >= MIN_CLASS_SESSIONS for count in counts.values()) < 2:
        # Not their names: a column may hold what identifies people.
        sizes = ", ".join(map(str, sorted(counts.values(), reverse=True)[:_CLASSES_SHOWN])) or "none"
        raise RecipeError(
            f"a probe of {target} needs two classes",
            where="probe.target",
            got=f"{len(counts)} {'class' if len(counts) == 1 else 'classes'}, with so many sessions: {sizes}",
            expected=f"two with {MIN_CLASS_SESSIONS} sessions or more",
            remedy=remedy,
        )


def _contrast_counts(store: Store) -> dict[str, int]:
    counts = zip(store.contrasts, store.present.sum(axis=0).tolist(), strict=True)
    return {contrast: count for contrast, count in counts if count}


def _is_column_supported(store: Store, target: ProbeTarget) -> bool:
    labels = store.sessions[target].astype(str) if target in store.sessions else pd.Series(dtype=str)
    return labels.iloc[sessions_with_target(store, target)].nunique() >= 2


def _is_age_supported(store: Store, target: ProbeTarget) -> bool:
    ages = store.sessions[target].dropna().astype(float) if target in store.sessions else pd.Series(dtype=float)
    return len(ages) >= MIN_AGES and ages.std() > 0


def _is_contrast_supported(store: Store, target: ProbeTarget) -> bool:
    return len(frequent_contrasts(store)) >= 2


def _always(store: Store, target: ProbeTarget) -> bool:
    return True


_SUPPORT_CHECKS: dict[ProbeTarget, Callable[[Store, ProbeTarget], bool]] = {
    "age_years": _is_age_supported,
    "contrast": _is_contrast_supported,
    "slice_position": _always,
}


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
