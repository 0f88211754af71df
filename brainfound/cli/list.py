"""``brainfound list``: what there is to choose from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from brainfound.cli.terminal import AsJson
from brainfound.errors import UsageError, did_you_mean

KINDS = ("recipes", "adapters", "contrasts", "cohort")


def list_(
    kind: Annotated[str, typer.Argument(help=f"One of: {', '.join(KINDS)}.")] = "recipes",
    path: Annotated[Path | None, typer.Argument(help="With `cohort`: the source to look at.")] = None,
    sessions: Annotated[
        bool, typer.Option("--sessions", help="With `cohort`: also a line per session, with its names.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List recipes, adapters, contrasts, or what a cohort holds."""
    if kind not in KINDS:
        raise UsageError(f"cannot list {kind!r}", remedy=did_you_mean(kind, KINDS))
    if kind == "cohort":
        from brainfound.cli.cohort_listing import list_cohort

        list_cohort(path, sessions=sessions, as_json=as_json)
        return
    if sessions:
        raise UsageError("--sessions goes with `cohort` only", remedy="brainfound list cohort PATH --sessions")
    rows: list[dict[str, Any]] = list(_contrasts() if kind == "contrasts" else _recipes(kind))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(str(value) for value in row.values() if value not in ("", None)))


def _recipes(kind: str) -> list[dict[str, str]]:
    from brainfound.recipes import Room, available

    room: Room = "train" if kind == "recipes" else "adapters"
    rows = []
    for name, file in available(room).items():
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        rows.append({"name": f"{name:<28}", "about": first.removeprefix("#").strip() if first.startswith("#") else ""})
    return rows


def _contrasts() -> list[dict[str, str]]:
    from brainfound.contrasts import CONTRASTS

    return [
        {"name": f"{c.name:<8}", "about": c.description, "aliases": "(" + ", ".join(c.aliases) + ")"}
        for c in CONTRASTS.values()
    ]
