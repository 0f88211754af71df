"""Stores: prepared cohorts on disk.

`store` is what a user opens; `folder` is one on disk, with its two halves `session_table` and `slice_files`; `plan`,
`executors` and `writer` make one; `copies` and `hub` share it; `withheld` shows a part of its contrasts.
"""

from brainfound.data.store.folder import SCHEMA_VERSION, StoreFolder
from brainfound.data.store.store import Store

__all__ = ["SCHEMA_VERSION", "Store", "StoreFolder"]
