"""A store's folder on disk, and the names of the folders beside it while it is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from brainfound.data.preprocessing import Preprocessing
from brainfound.data.store.session_table import SessionTable, content_hash
from brainfound.data.store.slice_files import SliceFiles
from brainfound.errors import StoreError

SCHEMA_VERSION = 2


class StoreFolder:
    """A store's folder on disk.

    Raises:
        StoreError: there is no complete store at the path, or it is of another schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / "store.json"
        if not file.is_file():
            raise _no_store(path)
        try:
            self.facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            version = self.facts["schema_version"]
        except (ValueError, KeyError, OSError) as error:
            raise StoreError(f"damaged: {error}", where=path, remedy="Prepare the store again") from error
        if version != SCHEMA_VERSION:
            raise StoreError(
                "the store has another schema",
                where=path,
                got=f"version {version}",
                expected=f"version {SCHEMA_VERSION}",
                remedy="Prepare the store again",
            )
        self.preprocessing = Preprocessing.load(path)
        self.table = SessionTable.read(path / "sessions.arrow")
        shape = (len(self.preprocessing.contrasts), *self.preprocessing.size)
        self.files = SliceFiles(path / "slices", shape, self.preprocessing.pixel_dtype)

    def require_sound_table(self) -> None:
        """Refuse a table of sessions or a preprocessing that is not the one that was written.

        Raises:
            StoreError: says what differs.
        """
        sound = self.preprocessing.model_dump(mode="json") == self.facts["preprocessing"]
        if not sound or content_hash(self.table, self.preprocessing) != self.facts["content_hash"]:
            raise StoreError(
                f"the {'table of sessions' if sound else 'preprocessing'} is not the one that was written",
                where=self.path.name,
                remedy="Copy the store again, or prepare it in a new folder",
            )


def partial_of(path: Path) -> Path:
    """Where a store is made. A name of our own: what a user calls STORE.partial is left alone."""
    return path.with_name(f".{path.name}.partial")


def replaced_of(path: Path) -> Path:
    """Where a store waits while another takes its place."""
    return path.with_name(f".{path.name}.replaced")


def _no_store(path: Path) -> StoreError:
    remedy = "Make it with: brainfound prepare SOURCE STORE"
    what = "not a store"
    if (replaced_of(path) / "store.json").is_file():
        what, remedy = "an update of the store was cut off", "Repeat the brainfound prepare command: nothing is lost"
    elif partial_of(path).is_dir():
        what, remedy = "the store is not complete", "Finish it with the same brainfound prepare command"
    return StoreError(what, where=path, expected="a folder with store.json", remedy=remedy)
