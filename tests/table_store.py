"""A store's tables without images, for tests that read no pixels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from brainfound.data.store.reader import StoreReader


class TableStore(SimpleNamespace):
    """The sessions of a store, and what else a test names."""

    contrast_counts = StoreReader.contrast_counts

    def __init__(self, sessions: pd.DataFrame, **fields: object) -> None:
        super().__init__(
            **{"sessions": sessions, "content_hash": "abc", "path": Path("stores/table"), "withheld": (), **fields}
        )

    def __len__(self) -> int:
        return len(self.sessions)

    def covariate(self, name: str) -> pd.Series:
        return self.sessions[name]
