"""Imports go down only: no room imports a higher one, and no two modules import each other."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "brainfound"
FLOORS = (
    *(
        {"errors", "files", "hub"},
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


def imported(file: Path) -> set[str]:
    """The modules of the package that a file imports, also lazily or for types only."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "brainfound":
            package = node.module.removeprefix("brainfound").strip(".")
            names = (f"{package}.{alias.name}".strip(".") for alias in node.names)
            found |= {name if name in MODULES else package for name in names}
    return found - {""}  # the version


def test_no_room_imports_a_higher_one():
    for name, file in MODULES.items():
        for other in imported(file):
            lower, upper = (module.partition(".")[0] for module in (other, name))
            assert lower == upper or LEVEL[lower] < LEVEL[upper], f"{name} imports {other}"


def test_metrics_stand_on_errors_and_splits_alone():
    outside = {other for name in MODULES if name.startswith("metrics") for other in imported(MODULES[name])}
    assert {other for other in outside if not other.startswith("metrics")} == {"errors", "data.splits.dividing"}


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter({name: imported(file) - {name} for name, file in MODULES.items()}).prepare()
