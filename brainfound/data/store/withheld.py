"""A store with some contrasts withheld, as if they had not been scanned.

Experiments with and without a contrast must use the same sessions, labels and split. So nothing is prepared again: the
store stays the same, and a withheld contrast is absent and reads as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Num

from brainfound.contrasts import parse_contrast
from brainfound.data.store.store import Store
from brainfound.errors import UsageError, did_you_mean


def restrict_contrasts(store: Store, contrasts: Sequence[str] | None) -> Store:
    """The same sessions, with only some contrasts readable.

    A session without any of them stays, with no contrast present; training and scoring leave it out.

    Args:
        contrasts: the contrasts to show; None shows all.

    Returns:
        A store with the same sessions, hash and order of channels; `Store.withheld` lists the hidden contrasts.

    Raises:
        UsageError: a contrast that the store does not have, or none at all.
    """
    whole = store.whole if isinstance(store, _RestrictedStore) else store
    if contrasts is None:
        return whole
    shown = [parse_contrast(name) for name in contrasts]
    for name in shown:
        if name not in whole.contrasts:
            raise UsageError(
                f"{name} is not a contrast of the store",
                where="contrasts",
                expected=", ".join(whole.contrasts),
                remedy=did_you_mean(name, whole.contrasts),
            )
    if not shown:
        raise UsageError("no contrast would be shown", where="contrasts", expected=", ".join(whole.contrasts))
    withheld = tuple(name for name in whole.contrasts if name not in shown)
    return _RestrictedStore(whole, withheld) if withheld else whole


class _RestrictedStore(Store):
    def __init__(self, whole: Store, withheld: tuple[str, ...]) -> None:
        shows = ~np.isin(whole.contrasts, withheld)
        super().__init__(whole.folders, replace(whole.table, present=whole.table.present & shows))
        self.whole, self.withheld, self._hides = whole, withheld, ~shows

    def __reduce__(self):
        return (_RestrictedStore, (self.whole, self.withheld))

    def __repr__(self) -> str:
        return f"{self.whole!r} without {', '.join(self.withheld)}"

    @cached_property
    def content_hash(self) -> str:
        """Hash of the whole store: the data is the same."""
        return self.whole.content_hash

    def filter(self, keep: str | Sequence[bool] | Callable[[pd.Series], bool]) -> Store:
        return _RestrictedStore(self.whole.filter(keep), self.withheld)

    def read_slices(self, rows: np.ndarray) -> Num[np.ndarray, "n C H W"]:
        return self._hidden(super().read_slices(rows))

    def damaged_sessions(self) -> list[int]:
        return self.whole.damaged_sessions()

    @cached_property
    def slices(self) -> Any:
        raise self._withheld_error("its rows hold all contrasts")

    def save(self, folder: str | Path, *, keep_ids: bool = True) -> Store:
        raise self._withheld_error("a copy would hold all contrasts")

    def _pixels(self, session: int) -> np.ndarray:
        return self._hidden(super()._pixels(session))

    def _hidden(self, pixels: np.ndarray) -> np.ndarray:
        return np.where(self._hides[:, None, None], pixels.dtype.type(0), pixels)

    def _withheld_error(self, why: str) -> UsageError:
        return UsageError(
            f"contrasts are withheld, and {why}",
            where=self.path.name,
            got=f"without {', '.join(self.withheld)}",
            remedy="Take the whole store, or prepare one with --contrasts",
        )
