"""``brainfound show``: a recipe, a store or a model in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from brainfound.cli.terminal import AsJson
from brainfound.errors import RecipeError, UsageError


def show(
    what: Annotated[str, typer.Argument(help="A recipe's name, a store, a run, a bundle or a model folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="A store: read every byte and prove its hash.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a recipe, store, run or model holds."""
    path = Path(what)
    if verify:
        from brainfound.data.store import Store

        print(f"{Store.open(path).verify()}  every byte is as it was written")
        return
    for name in ("store.json", "scores.json", "run.json", "bundle.json", "config.json"):
        if (path / name).is_file():
            content = json.loads((path / name).read_text(encoding="utf-8"))
            if as_json:
                print(json.dumps(content, indent=1))
            else:
                _print_mapping(content)
            return
    print(_recipe_text(what))


def _recipe_text(name: str) -> str:
    from brainfound.recipes import find

    errors = []
    for room in ("train", "adapters"):
        try:
            return find(name, room).read_text(encoding="utf-8").rstrip()
        except RecipeError as error:
            errors.append(error)
    raise UsageError(
        f"nothing named {name!r}",
        expected="a recipe, or a folder of a store, run, bundle or model",
        remedy=errors[0].remedy,
    )


def _print_mapping(content: dict, indent: str = "") -> None:
    for key, value in content.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            _print_mapping(value, indent + "  ")
        else:
            print(f"{indent}{key}: {value}")
