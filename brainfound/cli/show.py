"""``brainfound show``, ``report`` and ``doctor``: recipes, stores, runs, report pages, and this installation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from brainfound.cli.terminal import AsJson, LookupTable, label_lines
from brainfound.errors import RecipeError, UsageError, mistaken_for


def show(
    what: Annotated[str, typer.Argument(help="A recipe's name, a store, a run, a bundle or a model folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="A store: read every byte and prove its hash.")] = False,
    labels: Annotated[bool, typer.Option("--labels", help="A store: also the codes of its masks.")] = False,
    lookup_table: LookupTable = None,
    as_json: AsJson = False,
) -> None:
    """Show a recipe, store, run or model."""
    from brainfound.files import require_json

    path = Path(what)
    if verify:
        from brainfound.data.store import Store

        content_hash = Store.open(path).verify()
        verified = {"content_hash": content_hash, "verified": True}
        print(json.dumps(verified, indent=1) if as_json else f"{content_hash}  every byte is as it was written")
        return
    if (path / "store.json").is_file():
        _show_store(path, labels, lookup_table, as_json)
        return
    if labels or lookup_table:
        remedy = "Give a store, or look at a cohort with brainfound list cohort PATH --labels"
        raise UsageError("label codes are of a store", where=what, remedy=remedy)
    for name in ("scores.json", "run.json", "bundle.json", "config.json"):
        if (path / name).is_file():
            content = require_json(path / name, "Copy the folder again")
            if as_json:
                print(json.dumps(content, indent=1))
            else:
                _print_mapping(content)
            return
    print(_recipe_text(what))


def _show_store(path: Path, labels: bool, lookup_table: Path | None, as_json: bool) -> None:
    """Print what a store holds, and the facts of its store.json."""
    from brainfound.cli.list import store_lines
    from brainfound.data.store import Store
    from brainfound.files import require_json

    content = require_json(path / "store.json", "Copy the folder again")
    store = Store.open(path)
    codes = store.mask_codes() if labels else {}
    if as_json:
        print(json.dumps(content | ({"mask_codes": codes} if labels else {}), indent=1))
        return
    for line in store_lines(store):
        print(line)
    for line in ["codes of the masks", *label_lines(codes, lookup_table)] if labels else ():
        print(line)
    print()
    _print_mapping(content)


def _recipe_text(name: str) -> str:
    from brainfound.recipes import find

    errors = []
    for room in ("train", "adapters"):
        try:
            return find(name, room).read_text(encoding="utf-8").rstrip()
        except RecipeError as error:
            errors.append(error)
    if Path(name).exists():
        what, remedy = mistaken_for(name, "a store, run, bundle or model"), "Give a folder that holds one of these"
        raise UsageError(what, where=name, remedy=remedy)
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


def report(
    folder: Annotated[
        Path, typer.Argument(help="The folder of finetune, of one run or several, or of evaluate --out.")
    ],
) -> None:
    """Write report.md and report.png of a run or an experiment again, from the files of its folder.

    Needs no model and no store. The page of an unfinished experiment states its progress.
    """
    from brainfound.experiments.folder import SUMMARY_FILE
    from brainfound.experiments.page import write_experiment_page
    from brainfound.finetuning.scoring import SCORES_FILE
    from brainfound.report.run_page import write_run_page

    is_run = (folder / SCORES_FILE).is_file() and not (folder / SUMMARY_FILE).is_file()
    print((write_run_page if is_run else write_experiment_page)(folder))


def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices and optional packages."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from brainfound import __version__
    from brainfound.recipes import available

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "brainfound": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        **{name: installed(name) for name in ("torch", "transformers", "accelerate", "datasets", "peft", "nibabel")},
        **{name: installed(name) for name in ("xformers", "dask", "dcm2niix")},
        "gpus": gpus or "none: training runs on the CPU",
        "recipes": len(available("train")),
        "adapters": len(available("adapters")),
    }
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for key, value in facts.items():
        print(f"{key:<14}{value}")
