"""Stores: prepared cohorts on disk, one row per slice.

Reading: `folder` (store.json and the table of sessions), `slice_files` (the Arrow files), `reader`, and on top of them
`store`, the class that users open. Writing: `prepare` plans (`plan`), runs its jobs and assembles (`writer`, with
the `contact_sheet`) a store; `sharing` copies, uploads and downloads one.
"""

from brainfound.data.store.store import Store

__all__ = ["Store"]
