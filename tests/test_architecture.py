"""Imports go down only: no room imports a higher one, and no two modules import each other."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "brainfound"
FLOORS = (
    *(
        {"errors"},
        {"files", "hub"},
        {"contrasts"},
        {"recipes"},
        {"data"},
        {"phantom"},
        {"models", "metrics"},
        {"report"},
        {"adapters"},
    ),
    *({"training"}, {"pretraining", "finetuning"}, {"experiments"}, {"inference"}, {"demo"}, {"cli"}, {"", "__main__"}),
)
"""From the lowest to the highest; rooms of one floor do not import each other."""
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip("."): file
    for file in PACKAGE.rglob("*.py")
}


def imported(module: str) -> set[str]:
    """The modules of the package that a module imports, also lazily or for types only, in whichever form."""
    is_package = MODULES[module].name == "__init__.py"
    return imported_by(MODULES[module].read_text(encoding="utf-8"), module, is_package) - {""}  # the version


def imported_by(source: str, module: str, is_package: bool = False) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = ["brainfound", *module.split(".")][: -node.level + is_package or None] if node.level else []
            base = ".".join(part for part in [*parents, node.module] if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        inside = (name.removeprefix("brainfound").strip(".") for name in names if name.split(".")[0] == "brainfound")
        found |= {name if name in MODULES else name.rpartition(".")[0] for name in inside}
    return found


@pytest.mark.parametrize(
    "line",
    [
        "from brainfound.models import encoder",
        "from brainfound.models.encoder import SliceEncoder",
        "import brainfound.models.encoder",
        "import json, brainfound.models.encoder as part",
        "from ..models import encoder",
        "from ..models.encoder import SliceEncoder",
        "def lazily():\n    from ..models.encoder import *",
    ],
)
def test_every_form_of_import_is_found(line):
    assert imported_by(line, "data.cohort") == {"models.encoder"}
    nested = line.replace("..models", "...models")
    assert imported_by(nested, "data.sources.words") == imported_by(line, "data", is_package=True) == {"models.encoder"}


def test_no_room_imports_a_higher_one():
    for name in MODULES:
        for other in imported(name):
            lower, upper = (module.partition(".")[0] for module in (other, name))
            assert lower == upper or LEVEL[lower] < LEVEL[upper], f"{name} imports {other}"


def test_metrics_stand_on_errors_and_splits_alone():
    outside = {other for name in MODULES if name.startswith("metrics") for other in imported(name)}
    assert {other for other in outside if not other.startswith("metrics")} == {"errors", "data.splits.dividing"}


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter({name: imported(name) - {name} for name in MODULES}).prepare()
