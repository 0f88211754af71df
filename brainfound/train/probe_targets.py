"""What a probe predicts, and whether a store knows enough of it.

With "auto" a probe takes the first that the store supports of: diagnosis, age, sex, site, contrast,
slice position. The first four are what the cohort says of a session. The last two need no label: which
contrast a single-contrast embedding is of, and where in the head a slice lies.

A probe of site is not a goal: a model that is to work at other sites gains nothing from knowing the site.
It measures whether fine detail of the image is still in the features, and as nothing in the objective asks
for its removal, a sudden fall says damage like any other. So the guard takes it for what it is, a drop,
and nobody should choose a model for a high value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pandas as pd

from brainfound.data.store import Store

Target = Literal["diagnosis", "age_years", "sex", "site", "contrast", "slice_position"]
ORDER: tuple[Target, ...] = ("diagnosis", "age_years", "sex", "site", "contrast", "slice_position")
CLASSES: tuple[Target, ...] = ("diagnosis", "sex", "site", "contrast")
"""Targets that are classes; the others are numbers."""
OF_SLICES: tuple[Target, ...] = ("slice_position",)
"""Targets of each slice; the others are of a session."""
SMALLEST_CLASS = 5
FEWEST_AGES = 10


def choose_target(store: Store) -> Target:
    """The first of `ORDER` that a store has enough of."""
    return next(target for target in ORDER if _SUPPORT.get(target, _of_column)(store, target))


def labelled_sessions(store: Store, target: Target) -> np.ndarray:
    """Indices of the sessions whose label is known and, of classes, frequent enough; empty without such a column."""
    everybody = np.arange(len(store.sessions))
    if target == "contrast":
        return everybody[store.present[:, frequent_contrasts(store)].any(axis=1)]
    if target in OF_SLICES:
        return everybody
    if target not in store.sessions:
        return everybody[:0]
    known = store.sessions[target].notna().to_numpy()
    if target in CLASSES:
        labels = store.sessions[target].astype(str)
        known = known & (labels.map(labels[known].value_counts()).fillna(0).to_numpy() >= SMALLEST_CLASS)
    return everybody[known]


def frequent_contrasts(store: Store) -> np.ndarray:
    """Indices of the contrasts that enough sessions have."""
    return np.flatnonzero(store.present.sum(axis=0) >= SMALLEST_CLASS)


def _of_column(store: Store, target: Target) -> bool:
    labels = store.sessions[target].astype(str) if target in store.sessions else pd.Series(dtype=str)
    return labels.iloc[labelled_sessions(store, target)].nunique() >= 2


def _of_ages(store: Store, target: Target) -> bool:
    ages = store.sessions[target].dropna().astype(float) if target in store.sessions else pd.Series(dtype=float)
    return len(ages) >= FEWEST_AGES and ages.std() > 0


def _of_contrasts(store: Store, target: Target) -> bool:
    return len(frequent_contrasts(store)) >= 2


def _always(store: Store, target: Target) -> bool:
    return True


_SUPPORT: dict[Target, Callable[[Store, Target], bool]] = {
    "age_years": _of_ages,
    "contrast": _of_contrasts,
    "slice_position": _always,
}
