"""Segmentation of the mask: one class per pixel, or overlapping regions.

Axis legend: N slices of a batch, S slices of a stack, H W pixels, K classes or regions, F feature channels, n pixels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from brainfound.data.label_names import file_label, find_codes, read_lookup_table, unique_names
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.finetuning.linear_models import Linear, fit_pixel_logistic
from brainfound.finetuning.tasks.base import (
    MASK,
    Notify,
    Parts,
    SavedTask,
    ScoredAnswers,
    Scorer,
    ScoringRecipe,
    TargetColumn,
    Task,
    TaskRecipe,
)
from brainfound.metrics.registry import mean_case_scores, segmentation_case_scores
from brainfound.models import BrainFoundForSegmentation
from brainfound.models.stack_prediction import StackPrediction

MAX_CODES = 1000
"""Classes of a segmentation; whole-brain parcellations have 100 to 300."""
_CONFIG_FIELDS = {"decoder", "decoder_width", "decoder_slice_mixing"}
_CONFIG_FIELDS |= {"tversky_alpha", "tversky_beta", "tversky_gamma", "focal_gamma"}
_StructureScores = Mapping[str, Mapping[str, float]]
_LOSSES = {
    "dice_cross_entropy": "cross-entropy + soft Dice",
    "dice_focal": "focal cross-entropy + soft Dice",
    "tversky": "Tversky",
    "focal_tversky": "focal Tversky",
}


class SegmentationRecipe(TaskRecipe):
    """Labels, decoder, loss, training slices and scores of a segmentation."""

    needs = {  # noqa: RUF012  (declared in the base class)
        "tversky_alpha": ("loss", ("tversky", "focal_tversky")),
        "tversky_beta": ("loss", ("tversky", "focal_tversky")),
        "tversky_gamma": ("loss", ("focal_tversky",)),
        "focal_gamma": ("loss", ("dice_focal",)),
    }

    kind: Literal["segmentation"] = "segmentation"
    merge_codes: bool = False
    """Merge all nonzero label codes into one class."""
    lookup_table: str | None = None
    """A file with the names of codes (FreeSurfer, ITK-SNAP, CSV or TSV, dataset.json), see
    `brainfound.data.label_names.read_lookup_table`. Classes get these names, and regions may be made of names."""
    regions: dict[str, list[int | str]] = Field(default_factory=dict)
    """Labels made of codes, or of names in the lookup table: {whole: [1, 2, 4], hippocampus_left: [Left-Hippocampus]}.
    They may overlap, and each is predicted independently. Empty: every code is a class."""
    exclusive: bool = False
    """Regions do not overlap: each pixel belongs to one of them, or to the background, which has all other codes."""
    decoder: Literal["linear", "fpn", "unetr"] = "fpn"
    """Patch embeddings → pixels: linear, fpn, or unetr (with skips from the image)."""
    decoder_width: int = Field(128, ge=8)
    """Channels of the decoder."""
    decoder_slice_mixing: bool = False
    """The decoder mixes neighbouring slices; training then reads runs of slices."""
    loss: Literal["dice_cross_entropy", "dice_focal", "tversky", "focal_tversky"] = "dice_cross_entropy"
    """The last three are for small structures such as lesions."""
    tversky_alpha: float = Field(0.3, ge=0)
    """Tversky losses: weight of false positives."""
    tversky_beta: float = Field(0.7, ge=0)
    """Tversky losses: weight of false negatives."""
    tversky_gamma: float = Field(4 / 3, ge=1)
    """focal_tversky: the Tversky loss to the power 1/gamma."""
    focal_gamma: float = Field(2.0, ge=0)
    """dice_focal: how much to down-weight pixels that are already right; 0: cross-entropy."""
    foreground_share: float = Field(0.5, ge=0, le=1)
    """Share of the training slices (or runs of slices) that show the structure."""
    scoring: ScoringRecipe = ScoringRecipe()
    """Further scores, and the score of an empty mask."""

    @field_validator("regions")
    @classmethod
    def _usable_regions(cls, value: dict[str, list[int | str]]) -> dict[str, list[int | str]]:
        in_files: dict[str, str] = {}
        for name, codes in value.items():
            if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9 ._+-]*", name):
                raise ValueError(f"a region's name is made of letters, digits, and any of _ - . +: {name}")
            if not codes or any(isinstance(code, int) and code < 1 for code in codes):
                raise ValueError(f"a region is made of one or more codes above 0, such as [1, 4]: {name} is {codes}")
            if (other := in_files.setdefault(file_label(name).lower(), name)) != name:
                raise ValueError(f"the regions {other} and {name} would have the same file name; rename one of them")
        return value

    @model_validator(mode="after")
    def _require_regions(self) -> Self:
        if self.exclusive and not self.regions:
            raise ValueError("exclusive has no effect without regions; leave it out, or set task.regions")
        return self

    def read_names(self) -> dict[int, str]:
        """The lookup table; empty without one. UsageError: it cannot be read."""
        return {} if self.lookup_table is None else read_lookup_table(self.lookup_table)

    def region_codes(self, table: Mapping[int, str]) -> dict[str, tuple[int, ...]]:
        """The codes of each region; UsageError for a name that is not in the table."""
        found = {}
        for name, members in self.regions.items():
            where, own = f"task.regions.{name}", set[int]()
            for member in members:
                if isinstance(member, str) and not table:
                    what, remedy = "a name, and no table of names", "Give task.lookup_table, or the code"
                    raise UsageError(what, where=where, got=member, remedy=remedy)
                own.update([member] if isinstance(member, int) else find_codes(member, table, where))
            found[name] = tuple(sorted(own))
        return found


@dataclass(frozen=True)
class Segmentation(Task):
    """One class per pixel; class 0 is the background."""

    kind: ClassVar[str] = "segmentation"
    recipe: ClassVar[type[TaskRecipe]] = SegmentationRecipe
    model_class: ClassVar[type[Any]] = BrainFoundForSegmentation
    per_voxel: ClassVar[bool] = True
    overlapping: ClassVar[bool] = False
    selection_metric: ClassVar[str] = "dice"

    codes: tuple[int, ...] = ()
    """The mask's code of each class; code 0 is background."""
    merge: bool = False
    """All nonzero codes are class 1."""
    regions: tuple[tuple[int, ...], ...] = ()
    """The mask's codes of each region; none where every code is a class."""
    settings: SegmentationRecipe = field(default=SegmentationRecipe(), kw_only=True, compare=False, repr=False)

    @classmethod
    def suits(cls, store: Store, target: TargetColumn) -> bool:
        return target.is_mask

    @classmethod
    def resolve(
        cls, store: Store, train: Sequence[int], target: TargetColumn, settings: SegmentationRecipe
    ) -> Segmentation:
        masks = (store.read_masks(int(session)) for session in train)
        nonzero = {code for mask in masks if mask is not None for code in np.unique(mask).tolist() if code}
        if not nonzero:
            where = f"store {store.path.name}"
            raise UsageError("every mask of the training part is empty", where=where, remedy="Check the masks")
        table = settings.read_names()
        if settings.regions:
            regions = settings.region_codes(table)
            _require_regions(settings, regions, nonzero)
            own: dict[str, Any] = {"regions": tuple(regions.values()), "settings": settings}
            if not settings.exclusive:
                return OverlappingSegmentation(MASK, tuple(regions), **own)
            return ExclusiveSegmentation(MASK, ("background", *regions), tuple(range(len(regions) + 1)), **own)
        if settings.merge_codes:
            return cls(MASK, ("background", "foreground"), (0, 1), merge=True, settings=settings)
        if len(nonzero) > MAX_CODES:
            remedy = "Join them with task.regions and task.exclusive, or merge all with task.merge_codes"
            expected = f"at most {MAX_CODES}"
            raise UsageError("too many label codes", where="mask", got=len(nonzero), expected=expected, remedy=remedy)
        codes = sorted(nonzero)
        return cls(MASK, ("background", *unique_names(codes, table)), (0, *codes), settings=settings)

    @classmethod
    def from_saved(cls, saved: SavedTask) -> Segmentation:
        if saved.regions and saved.codes:
            return ExclusiveSegmentation(saved.column, saved.names, saved.codes, regions=saved.regions)
        if saved.regions:
            return OverlappingSegmentation(saved.column, saved.names, regions=saved.regions)
        return Segmentation(saved.column, saved.names, saved.codes, saved.merge)

    def check_parts(self, store: Store, parts: Parts, notify: Notify | None) -> None:
        for part in [name for name in parts if name != "train"] if notify else ():
            masks = (store.read_masks(int(session)) for session in parts[part])
            unknown = sorted({code for mask in masks if mask is not None for code in self.unknown_codes(mask)})
            if unknown and notify:
                codes = ", ".join(map(str, unknown))
                notify(f"masks of the {part} part have codes that training lacks, counted as background: {codes}")

    def values(self, store: Store, sessions: Sequence[int]) -> None:
        return None

    def loss_labels(self, values: Any, masks: Any) -> Tensor:
        return torch.from_numpy(self.encode_mask(np.asarray(masks)).astype(np.int64))

    def encode_mask(self, mask: np.ndarray) -> np.ndarray:
        """Label codes → class indices; codes absent from the training part become background."""
        if self.merge:
            return (mask != 0).astype(np.uint8)
        table = np.zeros(max(int(mask.max()), max(self.codes)) + 1, dtype=np.min_scalar_type(len(self.codes) - 1))
        table[list(self.codes)] = np.arange(len(self.codes))
        return table[mask]

    def decode_mask(self, classes: np.ndarray) -> np.ndarray:
        """Class indices → label codes."""
        return np.array(self.codes, dtype=np.min_scalar_type(max(self.codes)))[classes]

    def unknown_codes(self, mask: np.ndarray) -> list[int]:
        """The codes of a mask that are absent from the training part; none if all codes are merged."""
        return [] if self.merge else np.setdiff1d(np.unique(mask), self.codes).tolist()

    def config_fields(self, values: np.ndarray | None) -> dict[str, Any]:
        own = self.settings
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: k for k, name in enumerate(self.names)},
            # There is no volume embedding: an aggregator with weights would be unused.
            "aggregator": "mean",
            "overlapping_labels": self.overlapping,
            "segmentation_loss": own.loss,
            **own.model_dump(include=_CONFIG_FIELDS),
            "class_weights": None,  # left over if the model was trained on a classification
        }

    @staticmethod
    def describe_loss(config: Any) -> str:
        return _LOSSES[config.segmentation_loss]

    def reader_options(self, config: Any) -> dict[str, Any]:
        neighbours = self.settings.decoder_slice_mixing or config.stem == "slices"
        return {"foreground_share": self.settings.foreground_share, "neighbours": neighbours}

    @property
    def scoring(self) -> ScoringRecipe:
        return self.settings.scoring

    def make_scorer(self, store: Store, sessions: Sequence[int], scoring: ScoringRecipe) -> Scorer:
        return SegmentationScorer(self, scoring)

    def get_answer(self, answer: StackPrediction) -> np.ndarray:
        """Classes (S, H, W) of an answer; 0 or 1 for each overlapping label (S, K, H, W)."""
        assert answer.classes is not None
        return answer.classes

    @property
    def has_named_structures(self) -> bool:
        """Whether there are several foreground classes, or overlapping labels."""
        return self.overlapping or len(self.names) > 2

    @property
    def region_codes(self) -> dict[str, list[int]]:
        """The mask's codes of each region, by name."""
        return {name: list(codes) for name, codes in zip(self.names[-len(self.regions) :], self.regions, strict=True)}

    def structures(self, encoded: np.ndarray) -> dict[str, np.ndarray]:
        """The masks (S, H, W) to score, by class; a single class has an empty name."""
        if self.has_named_structures:
            return {name: encoded == k for k, name in enumerate(self.names) if k}
        return {"": encoded}

    def marked(self, encoded: np.ndarray) -> np.ndarray:
        """The pixels (S, H, W) of any structure."""
        return encoded

    def pixel_labels(self, masks: np.ndarray) -> Int[np.ndarray, "N H W K"]:
        """The class of each pixel (K = 1), or 0 or 1 for each overlapping label."""
        return self.encode_mask(masks)[..., None]

    def binary_labels(self, mask: np.ndarray) -> UInt8[np.ndarray, "S K H W"]:
        """0 or 1 for each class except the background, or for each overlapping label."""
        encoded = self.encode_mask(mask)
        return np.stack([encoded == k for k in range(1, len(self.names))], axis=1).astype(np.uint8)

    def fit_pixels(
        self, features: Float[np.ndarray, "n F"], labels: Int[np.ndarray, "n K"], weights: Float[np.ndarray, "n"]
    ) -> Linear:
        """The last layer of a decoder, fitted to standardised features of pixels."""
        return fit_pixel_logistic(features, labels[:, 0], weights, len(self.names))

    def patch_answer(self, pixels: Float[np.ndarray, "S K H W"]) -> np.ndarray:
        """Probabilities (0 where a label is not marked) → the answer in the form of `get_answer`."""
        classes = np.where(pixels.any(axis=1), pixels.argmax(axis=1) + 1, 0)
        return classes.astype(np.min_scalar_type(pixels.shape[1]))

    def as_prediction(self, answer: np.ndarray) -> StackPrediction:
        """The inverse of `get_answer`."""
        return StackPrediction(classes=answer)


@dataclass(frozen=True)
class OverlappingSegmentation(Segmentation):
    """Overlapping labels; the names do not include the background."""

    overlapping: ClassVar[bool] = True

    def encode_mask(self, mask: np.ndarray) -> np.ndarray:
        """Label codes (…, H, W) → 0 or 1 for each label, (…, K, H, W)."""
        return np.stack([np.isin(mask, codes) for codes in self.regions], axis=-3).astype(np.uint8)

    def unknown_codes(self, mask: np.ndarray) -> list[int]:
        return []

    def get_answer(self, answer: StackPrediction) -> np.ndarray:
        assert answer.labels is not None
        return answer.labels

    def structures(self, encoded: np.ndarray) -> dict[str, np.ndarray]:
        return {name: encoded[:, k] for k, name in enumerate(self.names)}

    def marked(self, encoded: np.ndarray) -> np.ndarray:
        return np.asarray(encoded.any(axis=1))

    def pixel_labels(self, masks: np.ndarray) -> Int[np.ndarray, "N H W K"]:
        return np.moveaxis(self.encode_mask(masks), 1, -1)

    def binary_labels(self, mask: np.ndarray) -> UInt8[np.ndarray, "S K H W"]:
        return self.encode_mask(mask)

    def fit_pixels(
        self, features: Float[np.ndarray, "n F"], labels: Int[np.ndarray, "n K"], weights: Float[np.ndarray, "n"]
    ) -> Linear:
        rows = [fit_pixel_logistic(features, column, weights, 2) for column in labels.T]
        # A softmax of two scores that differ by z is a sigmoid of z.
        return np.stack([weight[1] - weight[0] for weight, _ in rows]), np.array([b[1] - b[0] for _, b in rows])

    def patch_answer(self, pixels: Float[np.ndarray, "S K H W"]) -> np.ndarray:
        return pixels > 0

    def as_prediction(self, answer: np.ndarray) -> StackPrediction:
        return StackPrediction(labels=answer)


@dataclass(frozen=True)
class ExclusiveSegmentation(Segmentation):
    """Regions of which each pixel belongs to one; ``codes`` number them, and all other codes are background."""

    def encode_mask(self, mask: np.ndarray) -> np.ndarray:
        table = np.zeros(max(int(mask.max()), *map(max, self.regions)) + 1, dtype=np.min_scalar_type(len(self.regions)))
        for k, codes in enumerate(self.regions, start=1):
            table[list(codes)] = k
        return table[mask]

    def unknown_codes(self, mask: np.ndarray) -> list[int]:
        return []


class SegmentationScorer:
    """Scores one label map per session, without keeping the masks."""

    def __init__(self, task: Segmentation, scoring: ScoringRecipe) -> None:
        self.task, self.scoring = task, scoring
        self.cases: list[_StructureScores] = []
        self.trivial_cases: list[_StructureScores] = []
        self.unknown_codes: Counter[int] = Counter()  # code → number of sessions

    def add(self, stack: Stack, answer: StackPrediction) -> dict[str, Any]:
        task, mask = self.task, np.asarray(stack.mask)
        reference = task.encode_mask(mask)
        self.unknown_codes.update(task.unknown_codes(mask))
        expected, predicted = task.structures(reference), task.structures(task.get_answer(answer))
        score = partial(segmentation_case_scores, empty=self.scoring.empty)
        # The trivial baseline marks the whole head; its surface is not scored.
        head = np.asarray(stack.pixels.any(axis=1))
        self.trivial_cases.append({name: score(mask, head) for name, mask in expected.items()})
        if self.scoring.surface_mm is not None:
            spacing = [float(step) for step in stack.spacing_mm]
            score = partial(score, spacing_mm=spacing, tolerance_mm=self.scoring.surface_mm)
        case = {name: score(mask, predicted[name]) for name, mask in expected.items()}
        self.cases.append(case)
        marked = {"reference_pixels": reference, "predicted_pixels": task.get_answer(answer)}
        row: dict[str, Any] = {name: int(np.count_nonzero(task.marked(labels))) for name, labels in marked.items()}
        return row | {"dice": float("nan")} | _over_structures(case)

    def result(self) -> ScoredAnswers:
        notes = tuple(
            f"mask code {code}, in {n} sessions, was not learnt: counted as background"
            for code, n in self.unknown_codes.items()
        )
        return ScoredAnswers(_over_sessions(self.cases), _over_sessions(self.trivial_cases), notes)


def _over_sessions(cases: Sequence[_StructureScores]) -> dict[str, float]:
    """The scores of each structure over the sessions, and their mean."""
    return _over_structures({name: mean_case_scores([case[name] for case in cases]) for name in cases[0]})


def _over_structures(scores: _StructureScores) -> dict[str, float]:
    """The mean of each metric over the structures that have it, and the Dice of each."""
    means = {}
    for metric in dict.fromkeys(metric for one in scores.values() for metric in one):
        values = np.array([one.get(metric, np.nan) for one in scores.values()])
        means[metric] = float("nan") if np.isnan(values).all() else float(values[~np.isnan(values)].mean())
    return means | {f"dice({name})": one.get("dice", float("nan")) for name, one in scores.items() if name}


def _require_regions(settings: SegmentationRecipe, regions: Mapping[str, tuple[int, ...]], known: set[int]) -> None:
    if settings.merge_codes:
        where = "task.regions"
        raise UsageError("regions or merge_codes", where=where, got="both", remedy="Leave task.merge_codes out")
    owners: dict[int, str] = {}
    for name, codes in regions.items():
        where = f"task.regions.{name}"
        if not known.intersection(codes):
            raise UsageError(
                "no mask of the training part has a code of this region",
                where=where,
                got=list(codes),
                expected=f"some of {', '.join(map(str, sorted(known)[:10]))}",
                remedy="Check the codes, or leave the region out",
            )
        for code in codes if settings.exclusive else ():
            if (other := owners.setdefault(code, name)) != name:
                remedy = "Give each code to one region, or leave task.exclusive out"
                raise UsageError(f"the code {code} is in {other} too", where=where, got=list(codes), remedy=remedy)
