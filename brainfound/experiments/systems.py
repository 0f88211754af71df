"""The systems that an experiment compares: starting points, adaptations of them, or subsets of the contrasts.

All systems of an experiment share the folds, the seeds and the recipe, except for their own overrides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

from brainfound.errors import UsageError


@dataclass(frozen=True)
class SystemSpec:
    """One way to train a model."""

    name: str
    """Names its folder and rows; empty for a single system."""
    model: str
    adapter: str | None = None
    """An adapter recipe; None: the recipe's own."""
    overrides: tuple[str, ...] = ()
    """Recipe overrides for this system only."""
    contrasts: tuple[str, ...] | None = None
    """The contrasts that it reads; None: all."""
    start: str = ""
    """The name of the starting point."""

    @property
    def all_overrides(self) -> tuple[str, ...]:
        """The overrides, including that of the contrasts."""
        own = () if self.contrasts is None else (f"contrasts=[{', '.join(self.contrasts)}]",)
        return (*self.overrides, *own)


def parse_systems(models: Sequence[str], adapters: Sequence[str] = ()) -> list[SystemSpec]:
    """Combine each starting point with each adaptation, starting points in the outer loop.

    A single system has no name. With one starting point, systems are named after the adaptation; with one adaptation,
    after the starting point; otherwise after both, as ``dinov2-small+lora-r8``.

    Args:
        models: Hub ids or folders, optionally with a name in front: ``ours=runs/vits14/export``.
        adapters: adapter recipes by name or file, optionally with a name in front and recipe keys behind: ``full``,
            ``full,optim.lr=1e-5``, ``slow=full,optim.lr=1e-5``. Empty: the recipe's own.

    Raises:
        UsageError: there is no model, a name is given twice, or a key has no value.
    """
    starts = [_parse_start(text) for text in models]
    adaptations: list[tuple[str, str | None, tuple[str, ...]]] = [*map(_parse_adaptation, adapters)] or [("", None, ())]
    if not starts:
        raise UsageError("nothing to start from", where="--model", expected="a Hub id or a folder")
    _require_unique("--model", [name for name, _ in starts], "ours=PATH")
    _require_unique("--adapter", [name for name, _, _ in adaptations], "slow=full,optim.lr=1e-5")
    systems = []
    for (start, model), (adaptation, adapter, overrides) in product(starts, adaptations):
        parts = [start if len(starts) > 1 else "", adaptation if len(adaptations) > 1 else ""]
        systems.append(SystemSpec("+".join(filter(None, parts)), model, adapter, overrides, start=start))
    return systems


def non_empty_subsets(contrasts: Sequence[str]) -> list[tuple[str, ...]]:
    """All 2ⁿ − 1 non-empty subsets, the full set first, then by falling size, each in the given order.

    >>> non_empty_subsets(("T1w", "FLAIR"))
    [('T1w', 'FLAIR'), ('T1w',), ('FLAIR',)]
    """
    return [subset for size in range(len(contrasts), 0, -1) for subset in combinations(contrasts, size)]


def make_subset_systems(system: SystemSpec, contrasts: Sequence[str]) -> list[SystemSpec]:
    """One system per non-empty subset of two or more contrasts, the full set first, each named after its contrasts."""
    if len(contrasts) < 2:
        raise UsageError("partial input needs two contrasts or more", where="--partial-input", got=", ".join(contrasts))
    return [replace(system, name="+".join(subset), contrasts=subset) for subset in non_empty_subsets(contrasts)]


def short_name(model: str | Path) -> str:
    """The last part of the id or path of a model, or the name of its run, for pages that should not show folders."""
    path = Path(model)
    return path.parent.name if path.name == "export" and path.parent.name else path.name


def _parse_start(text: str) -> tuple[str, str]:
    """``[NAME=]MODEL`` → name, model."""
    name, equals, model = text.partition("=")
    if equals and "/" not in name and not Path(text).exists():
        return _require_non_empty("--model", name, text), _require_non_empty("--model", model, text)
    return short_name(text), text


def _parse_adaptation(text: str) -> tuple[str, str, tuple[str, ...]]:
    """``[NAME=]ADAPTER[,KEY=VALUE…]`` → name, adapter, overrides."""
    first, *overrides = (part.strip() for part in text.split(","))
    for override in overrides:
        if not re.fullmatch(r"[\w.]+=.+", override):
            raise UsageError("not a key with its value", where="--adapter", got=text, expected="full,optim.lr=1e-5")
    name, equals, adapter = first.partition("=")
    if not equals:
        name, adapter = Path(first).stem, first
    return _require_non_empty("--adapter", name, text), _require_non_empty("--adapter", adapter, text), tuple(overrides)


def _require_non_empty(option: str, part: str, text: str) -> str:
    if not part:
        raise UsageError("a name or its value is missing", where=option, got=text, expected="NAME=VALUE")
    return part


def _require_unique(option: str, names: Sequence[str], example: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two are called {twice[0]}", where=option, remedy=f"Give each a name: {option} {example}")
