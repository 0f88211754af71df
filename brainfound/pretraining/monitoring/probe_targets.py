"""Targets of a probe, and whether a store supports them.

The first four of `TARGET_PRIORITY` are columns of the cohort. The last two need no label: the contrast of a
single-contrast embedding, and the position of a slice in the head.

A high score for site is no goal: a model for other sites gains nothing from it. But it measures whether fine detail of
the image is still in the features, so a fall shows damage.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from brainfound.data.store import Store
from brainfound.errors import RecipeError

ProbeTarget = Literal["diagnosis", "age_years", "sex", "site", "contrast", "slice_position"]
TARGET_PRIORITY: tuple[ProbeTarget, ...] = ("diagnosis", "age_years", "sex", "site", "contrast", "slice_position")
CLASS_TARGETS: tuple[ProbeTarget, ...] = ("diagnosis", "sex", "site", "contrast")
"""Targets that are classes; the others are numbers."""
SLICE_TARGETS: tuple[ProbeTarget, ...] = ("slice_position",)
"""Targets with a value per slice; the others have one per session."""
MIN_CLASS_SESSIONS = 5
MIN_AGES = 10


def choose_probe_target(store: Store) -> ProbeTarget:
    """The first of `TARGET_PRIORITY` that a store supports."""
    return next(target for target in TARGET_PRIORITY if _is_supported(store, target))


def supported_targets(store: Store) -> list[ProbeTarget]:
    """The supported targets that are columns of the cohort."""
    columns = (target for target in TARGET_PRIORITY if target not in ("contrast", *SLICE_TARGETS))
    return [target for target in columns if _is_supported(store, target)]


def _is_supported(store: Store, target: ProbeTarget) -> bool:
    """Whether "auto" may choose a target: it has two frequent classes, or enough ages that differ."""
    if target in SLICE_TARGETS:
        return True
    if target == "contrast":
        return len(frequent_contrasts(store)) >= 2
    if target not in store.sessions:
        return False
    if target in CLASS_TARGETS:
        return store.sessions[target].astype(str).iloc[sessions_with_target(store, target)].nunique() >= 2
    values = store.sessions[target].dropna().astype(float)
    return len(values) >= MIN_AGES and values.std() > 0


def sessions_with_target(store: Store, target: ProbeTarget) -> np.ndarray:
    """Indices of the sessions with a known label (of a frequent class); empty without such a column."""
    sessions = np.arange(len(store.sessions))
    if target == "contrast":
        return sessions[store.present[:, frequent_contrasts(store)].any(axis=1)]
    if target in SLICE_TARGETS:
        return sessions
    if target not in store.sessions:
        return sessions[:0]
    known = store.sessions[target].notna().to_numpy()
    if target in CLASS_TARGETS:
        labels = store.sessions[target].astype(str)
        known = known & (labels.map(labels[known].value_counts()).fillna(0).to_numpy() >= MIN_CLASS_SESSIONS)
    return sessions[known]


def frequent_contrasts(store: Store) -> np.ndarray:
    """Indices of the contrasts that enough sessions have."""
    return np.flatnonzero(store.present.sum(axis=0) >= MIN_CLASS_SESSIONS)


def require_probe_target(store: Store, target: ProbeTarget) -> None:
    """Refuse a target for which a store has too few labels: a RecipeError with the counts."""
    if target in SLICE_TARGETS:
        return
    remedy = f"Set probe.target=auto, which takes {choose_probe_target(store)} in this store"
    if target == "contrast":
        _require_classes(target, {name: count for name, count in store.contrast_counts.items() if count}, remedy)
        return
    if target not in store.sessions:
        raise RecipeError("the store has no such column", where="probe.target", got=target, remedy=remedy)
    known = store.sessions[target].dropna()
    if target in CLASS_TARGETS:
        _require_classes(target, known.astype(str).value_counts().to_dict(), remedy)
    elif len(known) < 2:
        what, got = f"too few sessions have {target}", f"{len(known)} of {len(store.sessions)} sessions"
        raise RecipeError(what, where="probe.target", got=got, expected="two or more", remedy=remedy)


def _require_classes(target: ProbeTarget, counts: dict[str, int], remedy: str) -> None:
    if sum(count >= MIN_CLASS_SESSIONS for count in counts.values()) < 2:
        # Counts without class names, which may identify people.
        sizes = ", ".join(map(str, sorted(counts.values(), reverse=True)[:5])) or "none"
        got = f"{len(counts)} {'class' if len(counts) == 1 else 'classes'}, with so many sessions: {sizes}"
        expected = f"two with {MIN_CLASS_SESSIONS} sessions or more"
        what = f"a probe of {target} needs two classes"
        raise RecipeError(what, where="probe.target", got=got, expected=expected, remedy=remedy)
