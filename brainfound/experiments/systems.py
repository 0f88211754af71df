"""What an experiment compares: starting points, adaptations of them, or subsets of the contrasts.

A system is one of them. All systems of an experiment are trained on the same folds, with the same seeds and, but for
what is said of one of them, with the same recipe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from brainfound.errors import UsageError
from brainfound.metrics.summaries import non_empty_subsets

_EXPORT = "export"
"""Of a run the folder of its model; a run is known by the name above it."""


@dataclass(frozen=True)
class SystemSpec:
    """One way to make a model, and its name in tables and folders.

    Attributes:
        name: of its folder and its rows; empty where there is only one.
        model: what it starts from, as for `brainfound.finetuning.finetune.finetune`.
        adapter: an adapter recipe; None: the recipe's own.
        overrides: of the recipe, for this system alone.
        contrasts: the only ones that it sees; None: all.
        start: the name of what it starts from.
    """

    name: str
    model: str
    adapter: str | None = None
    overrides: tuple[str, ...] = ()
    contrasts: tuple[str, ...] | None = None
    start: str = ""

    @property
    def all_overrides(self) -> tuple[str, ...]:
        """With the contrasts, as the recipe takes them."""
        shown = () if self.contrasts is None else (f"contrasts=[{', '.join(self.contrasts)}]",)
        return (*self.overrides, *shown)


def parse_systems(models: Sequence[str], adapters: Sequence[str] = ()) -> list[SystemSpec]:
    """Each starting point with each adaptation, starting points in the outer loop.

    Args:
        models: Hub ids or folders, each with or without a name before it: ``ours=runs/vits14/export``.
        adapters: adapter recipes by name or file, each with or without a name before it and recipe keys behind it:
            ``full``, ``full,optim.lr=1e-5``, ``slow=full,optim.lr=1e-5``. None: the recipe's own.

    Returns:
        One system has no name. Of several with one starting point the name is that of the adaptation, of several with
        one adaptation that of the starting point; else both, as ``dinov2-small+lora-r8``.

    Raises:
        UsageError: nothing to start from, two of the same name, or a key without a value.
    """
    starts = [_parse_start(text) for text in models]
    adaptations: list[tuple[str, str | None, tuple[str, ...]]] = [_parse_adaptation(text) for text in adapters]
    adaptations = adaptations or [("", None, ())]
    if not starts:
        raise UsageError("nothing to start from", where="--model", expected="a Hub id or a folder")
    _require_unique("--model", [name for name, _ in starts], "ours=PATH")
    _require_unique("--adapter", [name for name, _, _ in adaptations], "slow=full,optim.lr=1e-5")
    systems = []
    for start, model in starts:
        for adaptation, adapter, overrides in adaptations:
            parts = [start if len(starts) > 1 else "", adaptation if len(adaptations) > 1 else ""]
            systems.append(SystemSpec("+".join(filter(None, parts)), model, adapter, overrides, start=start))
    return systems


def make_subset_systems(system: SystemSpec, contrasts: Sequence[str]) -> list[SystemSpec]:
    """One system per non-empty subset of the contrasts, the full set first, each named by what it sees.

    Raises:
        UsageError: there is one contrast only, so that nothing could be absent.
    """
    if len(contrasts) < 2:
        raise UsageError("with one contrast nothing can be absent", where="--partial-input", got=", ".join(contrasts))
    return [
        SystemSpec("+".join(subset), system.model, system.adapter, system.overrides, subset, system.start)
        for subset in non_empty_subsets(contrasts)
    ]


def short_name(model: str | Path) -> str:
    """What a model is called where its folder is nobody's business: the last part of its id or path."""
    path = Path(model)
    return path.parent.name if path.name == _EXPORT and path.parent.name else path.name


def _parse_start(text: str) -> tuple[str, str]:
    """``[NAME=]MODEL``: its name, and the model."""
    name, equals, model = text.partition("=")
    if equals and "/" not in name and not Path(text).exists():
        return _require_non_empty("--model", name, text), _require_non_empty("--model", model, text)
    return short_name(text), text


def _parse_adaptation(text: str) -> tuple[str, str, tuple[str, ...]]:
    """``[NAME=]ADAPTER[,KEY=VALUE…]``: its name, the adapter, and the overrides."""
    first, *overrides = (part.strip() for part in text.split(","))
    for override in overrides:
        if not re.fullmatch(r"[\w.]+=.+", override):
            raise UsageError("not a key with its value", where="--adapter", got=text, expected="full,optim.lr=1e-5")
    name, equals, adapter = first.partition("=")
    if not equals:
        return Path(_require_non_empty("--adapter", first, text)).stem, first, tuple(overrides)
    return _require_non_empty("--adapter", name, text), _require_non_empty("--adapter", adapter, text), tuple(overrides)


def _require_non_empty(option: str, part: str, text: str) -> str:
    if not part:
        raise UsageError("a name or what it stands for is missing", where=option, got=text, expected="NAME=VALUE")
    return part


def _require_unique(option: str, names: Sequence[str], example: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two are called {twice[0]}", where=option, remedy=f"Give each a name: {option} {example}")
