"""Stores: prepared cohorts on disk.

`store` is what a user opens; `session_table` and `slice_files` are its two halves on disk; `plan`, `executors` and
`writer` make one; `hub` shares it.
"""

from brainfound.data.store.store import SCHEMA_VERSION, Store, StoreFolder

__all__ = ["SCHEMA_VERSION", "Store", "StoreFolder"]
