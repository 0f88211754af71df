"""The input contract of a model: ranges over its training scans, never one subject's values, for `brainfound check`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, field_validator

from brainfound.data.checking.mean_stack import decode, measure_mean_stacks
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.store import Store
from brainfound.data.store.folder import session_keys
from brainfound.data.store.reader import select_sessions
from brainfound.errors import ModelError
from brainfound.recipes import Recipe, load_json

FILE_NAME = "input_contract.json"

MIN_KNOWN_SHARE = 0.5
"""With a smaller share of known scans, the skull state of a contrast is unknown."""
MAX_MINORITY_SHARE = 0.05
"""A smaller share of stripped scans among heads, or of heads among stripped scans, does not make a mixture."""

ContractSkullState = Literal["stripped", "head", "mixed", "unknown"]


class InputContract(Recipe):
    """The expected input of a model. Unmeasured values are None, ``unknown`` or empty."""

    contrasts: tuple[str, ...]
    """The contrasts of the model."""

    spacing_mm: tuple[float | None, float | None, float | None]
    """Voxel size along x, y and z after resampling; null keeps the scan's own."""

    size: tuple[int, int]
    """Rows and columns of a slice."""

    num_sessions: int | None = None
    """Number of measured sessions; None: nothing was measured."""

    coarsest_mm: dict[str, float] = Field(default_factory=dict)
    """Per contrast, the longest voxel edge among the scans as acquired."""

    skull: dict[str, ContractSkullState] = Field(default_factory=dict)
    """Per contrast, whether its scans were skull-stripped brains or whole heads."""

    age_years: tuple[float, float] | None = None
    """Youngest and oldest age."""

    num_slices: tuple[int, int] | None = None
    """Fewest and most slices of a stack."""

    foreground_ml: tuple[float, float] | None = None
    """Smallest and largest volume of the head or brain."""

    negative_values: bool | None = None
    """Whether any scan held negative values."""

    hooks: tuple[str, ...] = ()
    """Hooks that ran on each scan beforehand, such as a skull-stripper."""

    never_absent: tuple[str, ...] = ()
    """Contrasts that every session had and contrast dropout never withheld. Empty if that is not known."""

    mean_stack: dict[str, str] = Field(default_factory=dict, repr=False)
    """Per contrast, the mean of its scans in cells of 10 mm, see `brainfound.data.checking.mean_stack`. Empty if it was
    not measured, or of fewer than three sessions."""

    @field_validator("mean_stack")
    @classmethod
    def _readable_mean_stack(cls, value: dict[str, str]) -> dict[str, str]:
        for text in value.values():
            decode(text)
        return value

    @property
    def is_measured(self) -> bool:
        """False for a model that was saved without a contract: only its preprocessing is known."""
        return self.num_sessions is not None

    @classmethod
    def of(
        cls, store: Store, sessions: Sequence[int] | np.ndarray | None = None, *, withheld_in_training: bool = True
    ) -> InputContract:
        """Measure a store, or some of its sessions (the training part).

        ``withheld_in_training``: training withholds contrasts at random, so the model learns to do without each.
        """
        rows = np.arange(len(store)) if sessions is None else np.asarray(sessions, dtype=np.int64)
        table = store.sessions.iloc[rows]
        quality = select_sessions(store.quality, set(session_keys(table)))
        slices = table["num_slices"].to_numpy()
        # The longest edge of a spacing such as ``0.7x0.7x4``.
        longest = quality["spacing_mm"].astype(str).map(lambda text: max(map(float, text.split("x"))))
        always: list[str] = []
        if not withheld_in_training:
            always = [name for c, name in enumerate(store.contrasts) if store.present[rows, c].all()]
        scans = {name: quality["contrast"] == name for name in store.shown if (quality["contrast"] == name).any()}
        return cls(
            **(_contract_fields(store.preprocessing) | {"contrasts": store.shown}),
            num_sessions=len(table),
            coarsest_mm={name: float(longest[rows].max()) for name, rows in scans.items()},
            skull={name: _summarise_skull_states(quality["skull"][rows].tolist()) for name, rows in scans.items()},
            age_years=_range(table["age_years"]) if "age_years" in table else None,
            num_slices=(int(slices.min()), int(slices.max())) if len(slices) else None,
            foreground_ml=_range(quality["foreground_ml"]),
            negative_values=bool((quality["minimum"] < 0).any()) if len(quality) else None,
            mean_stack=measure_mean_stacks(store, rows),
            never_absent=tuple(name for name in always if name in store.shown),
        )

    @classmethod
    def from_preprocessing(cls, preprocessing: Preprocessing) -> InputContract:
        """The contract of a model that was saved without one."""
        return cls(**_contract_fields(preprocessing))

    def save(self, folder: str | Path) -> Path:
        """Write ``input_contract.json`` into a folder."""
        return self.save_json(Path(folder) / FILE_NAME)

    @classmethod
    def load(cls, folder: str | Path) -> InputContract:
        """As `load_or_none`, but a ModelError if the file is missing."""
        contract = cls.load_or_none(folder)
        if contract is None:
            remedy = "The model was saved without one; export it again"
            raise ModelError(f"{FILE_NAME} is missing", where=folder, remedy=remedy)
        return contract

    @classmethod
    def load_or_none(cls, folder: str | Path) -> InputContract | None:
        """Read ``input_contract.json`` from a folder; None if it is missing. Errors as `load_json`."""
        return load_json(cls, Path(folder) / FILE_NAME)


def missing_contrast_note(contrast: str, where: str = "") -> str:
    """A note on predictions without a contrast that training never lacked; ``where``: such as "in 3 of 40 sessions"."""
    missing = f"{contrast} is missing {where}".rstrip()
    return f"{missing}: the model never learnt to do without it, and its answer may mean nothing"


def _contract_fields(preprocessing: Preprocessing) -> dict[str, Any]:
    return preprocessing.model_dump(include={"contrasts", "spacing_mm", "size", "hooks"})


def _summarise_skull_states(states: list[str]) -> ContractSkullState:
    stripped, heads = states.count("stripped"), states.count("head")
    known = stripped + heads
    if known == 0 or known < MIN_KNOWN_SHARE * len(states):
        return "unknown"
    if min(stripped, heads) > MAX_MINORITY_SHARE * known:
        return "mixed"
    return "stripped" if stripped > heads else "head"


def _range(values: pd.Series) -> tuple[float, float] | None:
    known = pd.to_numeric(values, errors="coerce").dropna()
    if known.empty:
        return None
    low, high = float(known.min()), float(known.max())
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None
