"""Settings of the preprocessing, from scans to a stack. They travel with every store, checkpoint and bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, Field, field_validator

from brainfound.contrasts import parse_contrasts
from brainfound.errors import ModelError, UsageError, closest_folder, describe_path, mistaken_for
from brainfound.recipes import Recipe, load_json

FILE_NAME = "preprocessing.json"


class Preprocessing(Recipe):
    """How scans become a stack."""

    contrasts: Annotated[tuple[str, ...], BeforeValidator(parse_contrasts)] = ("T1w", "T2w", "FLAIR")
    """The contrasts, one per channel. The first contrast of a session is its reference scan."""

    spacing_mm: tuple[float | None, float | None, float | None] = (1.0, 1.0, 1.0)
    """Voxel size along x, y and z after resampling; null keeps that of the reference scan (in z: acquired slices)."""

    size: tuple[int, int] = (224, 224)
    """Rows and columns after centre cropping or padding around the foreground."""

    percentiles: tuple[float, float] = (0.5, 99.5)
    """Foreground percentiles of each scan that become the lowest and the highest pixel value."""

    ranges: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Contrast → values that become the lowest and highest pixel, in place of percentiles; for quantitative maps."""

    bits: Literal[8, 16] = 8
    """Bits per pixel. 16 bits keep the resolution of quantitative maps, and double the size of the store."""

    field_of_view_mm: float | None = Field(default=None, ge=50, le=500)
    """Length of the head that is kept below its top; null keeps all of it. 170 cuts the neck, as robustfov of FSL."""

    min_overlap: float = Field(default=0.2, ge=0, le=1)
    """A scan whose field of view covers less than this share of the reference scan's foreground is refused."""

    min_slices: int = Field(default=1, ge=1)
    """A session with fewer slices inside the foreground is refused."""

    hooks: tuple[str, ...] = ()
    """Hooks that ran on each scan beforehand (skull-stripping, registration). Only a record: nothing is run."""

    @field_validator("contrasts")
    @classmethod
    def _different_contrasts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("contrasts must be one or more different names")
        return value

    @field_validator("ranges")
    @classmethod
    def _rising_ranges(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        # Sorted: the order in which a user lists them must not change the preprocessing.
        contrasts = parse_contrasts(value)
        named = dict(sorted(zip(contrasts, value.values(), strict=True)))
        for contrast in named:
            if contrasts.count(contrast) > 1:
                spellings = " and ".join(name for name in value if parse_contrasts([name]) == (contrast,))
                raise ValueError(f"ranges holds {contrast} twice, as {spellings}")
        if any(not (np.isfinite(limits).all() and limits[0] < limits[1]) for limits in named.values()):
            raise ValueError("ranges must be two finite, rising values per contrast")
        return named

    @field_validator("spacing_mm")
    @classmethod
    def _positive_spacing(cls, value: tuple[float | None, ...]) -> tuple[float | None, ...]:
        if any(s is not None and not 0.1 <= s <= 20 for s in value):
            raise ValueError("spacing_mm must lie between 0.1 and 20 mm, or be null")
        return value

    @field_validator("size")
    @classmethod
    def _positive_size(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 8 or max(value) > 2048:
            raise ValueError("size must lie between 8 and 2048 pixels")
        return value

    @field_validator("percentiles")
    @classmethod
    def _ordered_percentiles(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 100:
            raise ValueError("percentiles must rise within 0 to 100")
        return value

    @property
    def pixel_dtype(self) -> type[np.uint8] | type[np.uint16]:
        return np.uint8 if self.bits == 8 else np.uint16

    @property
    def max_pixel_value(self) -> int:
        return 2**self.bits - 1

    def require_hooks(self, names: Sequence[str]) -> None:
        """Raise a UsageError for hooks other than those of this preprocessing: training had no such scans."""
        if self.hooks != tuple(names):
            got, expected = (", ".join(hooks) or "none" for hooks in (names, self.hooks))
            remedy = f"Give --hook {' --hook '.join(self.hooks)}" if self.hooks else "Leave the hooks out"
            what = "the preprocessing goes with other hooks"
            raise UsageError(what, where="hooks", got=got, expected=expected, remedy=remedy)

    def save(self, folder: str | Path) -> Path:
        """Write ``preprocessing.json`` into a folder."""
        return self.save_json(Path(folder) / FILE_NAME)

    @classmethod
    def load(cls, folder: str | Path) -> Preprocessing:
        """Read ``preprocessing.json`` from a folder; ModelError if it is missing, otherwise as `load_json`."""
        folder = Path(folder)
        preprocessing = load_json(cls, folder / FILE_NAME) if folder.is_dir() else None
        if preprocessing is None:
            raise not_trained_here_error(folder)
        return preprocessing


def not_trained_here_error(folder: Path) -> ModelError:
    """The error for a path without a preprocessing, which is no run, export, bundle or store."""
    what, remedy = f"{FILE_NAME} is missing", "Give a run of BrainFound, its export, a bundle or a store"
    kind = describe_path(folder)
    if not folder.exists():
        what, close = "no such folder", closest_folder(folder)
        remedy = f"Did you mean {close}?" if close else remedy
    elif kind == "a run":
        what, remedy = "the run has no export: it has not finished", "Go on with it: the same command and --resume"
    elif kind == "a model":
        what, remedy = "this is a model of another program: it states no preprocessing", f"{remedy}, trained from it"
    elif kind == "an experiment or an evaluation":
        runs = sorted(file.parent for file in folder.glob("*/export"))
        what = mistaken_for(folder, "a single model")
        remedy = f"Give one of its runs, such as {runs[0]}" if runs else remedy
    elif kind is not None:
        what = mistaken_for(folder, "a model")
    return ModelError(what, where=folder, remedy=remedy, usage=True)
