"""The target that a user names: a column of a store, several columns of 0 and 1, or the mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd

from brainfound.data.store import Store
from brainfound.errors import UsageError

MASK = "mask"


@dataclass(frozen=True, eq=False)
class TargetColumn:
    """A target of a store, found once and handed on.

    Attributes:
        name: as the user wrote it: a covariate, ``"mask"``, or several covariates as ``"edema,lesion"``.
        columns: the covariates; none for the mask.
        labelled: indices of the sessions that have a label (or a mask); of several columns, in each of them.
    """

    name: str
    columns: tuple[str, ...]
    labelled: np.ndarray

    @classmethod
    def find(cls, store: Store, name: str) -> Self:
        """Find a target in a store.

        Raises:
            UsageError: there is no such column, or no session has a label.
        """
        columns = target_columns(store, name)
        known = np.ones(len(store), dtype=bool) if columns else (store.sessions["mask_dtype"] != "").to_numpy()
        for column in columns:
            labels = store.covariate(column)
            numbers = pd.to_numeric(labels, errors="coerce")
            known &= labels.notna().to_numpy() & ~np.isinf(numbers.to_numpy(dtype=np.float64, na_value=0.0))
        if not known.any():
            what = f"the column {name!r} is empty" if columns else "no session has a mask"
            if len(columns) > 1:
                what = f"no session has a value in each of the columns {name!r}"
            remedy = "Add labels to the cohort and prepare it again"
            raise UsageError(what, where=f"store {store.path.name}", remedy=remedy)
        return cls(name, columns, np.flatnonzero(known))

    @property
    def is_mask(self) -> bool:
        return not self.columns


def target_columns(store: Store, name: str) -> tuple[str, ...]:
    """The covariates that a target names: none for the mask, several for ``"edema,lesion"``."""
    if name == MASK:
        return ()
    if "," not in name or name in store.covariates:
        return (name,)
    return tuple(dict.fromkeys(part.strip() for part in name.split(",") if part.strip())) or (name,)
