"""The spread of scores over runs: over the folds of a division, and over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from brainfound.evaluate.score_files import columns_of

BY = ("system", "group")
"""What makes a group of runs whose spread is told; where a table has no such column it is all one."""


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """The spread of each score.

    Where the test part differs from fold to fold (k folds, sites) all folds are one group; where only what is
    learnt from differs (shots) each fold is a group of its own. Runs whose score is undefined are left out of it.

    Returns:
        One row per system (where there are several), group and score: mean over runs, ``std_folds`` (standard
        deviation of the means over seeds of each fold), ``std_seeds`` (mean over folds of that over seeds), lowest,
        highest, the mean of each baseline under its name, how many folds and seeds there are, and the mean of the
        sessions trained and tested on, where the table says them. A spread of one is NaN.
    """
    metrics, baselines = columns_of(table)
    by = [name for name in BY if name in table]
    rows = []
    for keys, part in table.groupby(by, sort=False):
        for name in metrics:
            rows.append(
                dict(zip(by, keys, strict=True)) | {"score": name} | spread_of(part, name, baselines) | sizes_of(part)
            )
    return pd.DataFrame(rows)


def spread_of(part: pd.DataFrame, name: str, baselines: Sequence[str]) -> dict[str, Any]:
    """Mean and spread of one score over runs; see `summarise`."""
    defined = part[part[name].notna()]
    by_fold = defined.groupby("fold", sort=False)[name]
    return {
        "mean": part[name].mean(),
        "std_folds": by_fold.mean().std(ddof=1),
        "std_seeds": by_fold.std(ddof=1).mean(),
        "lowest": part[name].min(),
        "highest": part[name].max(),
        **{baseline: part[f"{baseline} {name}"].mean() for baseline in baselines},
        "num_folds": by_fold.ngroups,
        "num_seeds": defined["seed"].nunique(),
    }


def sizes_of(part: pd.DataFrame) -> dict[str, float]:
    """Mean numbers of sessions trained and tested on, where a table says them."""
    return {name: float(np.mean(part[name])) for name in ("num_train", "num_test") if name in part}
