"""Damage to files, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path


def truncate(path: Path) -> None:
    """Keep the first half of the bytes."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
