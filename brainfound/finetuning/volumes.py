"""Training volumes: the slices of a session at a step, their augmentation, and a dataset for other training loops.

The random numbers of `VolumeReader` and `EmbeddedReader` are a function of (seed, step), see
`brainfound.training.randomness`. `VolumeDataset` is for `transformers.Trainer`.

Axis legend: B volumes, S slices, C contrasts, H W pixels, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from brainfound.data.augmentation import IntensityRecipe, ViewsRecipe, drop_contrasts, random_affine, vary_intensity
from brainfound.data.augmentation.transforms import (
    MAX_DISPLACEMENT,
    EffectSelection,
    displacement_field,
    random_control_points,
    random_selection,
    uniform,
)
from brainfound.data.batches import VolumeBatch, collate, evenly_spaced_slices, to_unit_range
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.finetuning.embedding_cache import EmbeddedBatch, EmbeddingCache
from brainfound.finetuning.tasks import TargetColumn, Task
from brainfound.recipes import Recipe
from brainfound.training.randomness import VIEWS, StepKey, numpy_generator, torch_generator

AUGMENTATION, NOISE, ELASTIC = 1_000_000, 1_000_001, 1_000_002
"""Keys of random streams; single volumes use the keys from 0."""


class VolumeAugmentation(Recipe):
    """Random changes of a training volume, the same for all its slices.

    One of the `PRESETS`, by name (``augmentation: strong``), or these fields.
    """

    rotation_degrees: float = Field(10.0, ge=0, le=45)
    """Largest in-plane rotation, to either side."""
    scale: float = Field(0.1, ge=0, lt=1)
    """The volume is scaled by 1 ± this."""
    shear: float = Field(0.05, ge=0, lt=1)
    """Largest in-plane shear, to either side."""
    elastic_probability: float = Field(0.0, ge=0, le=1)
    """Probability of an in-plane elastic deformation, in the same resampling."""
    elastic: float = Field(0.08, ge=0)
    """Largest displacement of its control points along each axis, as a share of the image's side."""
    elastic_cells: int = Field(5, ge=1, le=32)
    """Cells of the control points' grid along each side; few cells bend smoothly."""
    flip_left_right: float = Field(0.0, ge=0, le=1)
    """Probability of a left-right flip. 0 by default: the side of a lesion is information."""
    contrast_dropout: float = Field(0.2, ge=0, lt=1)
    """Probability of withholding a present contrast; at least one stays."""
    intensity: IntensityRecipe = IntensityRecipe(gamma_probability=0.3, contrast_probability=0.3, blur_probability=0.1)

    @classmethod
    def presets(cls) -> Mapping[str, Mapping[str, Any]]:
        return {name: preset.model_dump(mode="json") for name, preset in PRESETS.items()}

    @model_validator(mode="after")
    def _require_no_folding(self) -> VolumeAugmentation:
        if self.elastic * self.elastic_cells >= MAX_DISPLACEMENT:
            raise ValueError(
                f"elastic: {self.elastic:g} in {self.elastic_cells} cells would fold the image; "
                f"it must be below {MAX_DISPLACEMENT / self.elastic_cells:.3g}, or elastic_cells smaller"
            )
        return self


PRESETS: Mapping[str, VolumeAugmentation] = {
    "none": VolumeAugmentation(
        rotation_degrees=0,
        scale=0,
        shear=0,
        contrast_dropout=0,
        intensity=IntensityRecipe(gamma_probability=0, contrast_probability=0, blur_probability=0, noise_probability=0),
    ),
    "mild": VolumeAugmentation(rotation_degrees=5, scale=0.05, shear=0),
    "strong": VolumeAugmentation(
        rotation_degrees=30,
        scale=0.25,
        shear=0.1,
        elastic_probability=0.5,
        intensity=IntensityRecipe(
            gamma_probability=0.5,
            contrast_probability=0.5,
            bias_field_probability=0.3,
            blur_probability=0.2,
            low_resolution_probability=0.25,
        ),
    ),
}
"""Augmentation by name. In the FOMO25 challenge strong spatial augmentation helped segmentation, and hurt
classification and regression. No preset flips left and right."""


def sample_jittered_slices(num_slices: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """One random slice from each of ``wanted`` equal parts of the stack; all slices if there are no more."""
    if wanted >= num_slices:
        return np.arange(num_slices)
    edges = np.arange(wanted) * num_slices / wanted
    return np.floor(edges + rng.uniform(size=wanted) * num_slices / wanted).astype(int)


def sample_foreground_slices(mask: np.ndarray, wanted: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Random slices for a segmentation in ascending order, about ``share`` of them through the structure.

    Slices may repeat where few show the structure.
    """
    marked = np.flatnonzero(mask.any(axis=(1, 2)))
    num_marked = round(wanted * share) if marked.size else 0
    through = rng.choice(marked, num_marked) if num_marked else np.empty(0, int)
    return np.sort(np.concatenate([through, rng.choice(len(mask), wanted - num_marked)]).astype(int))


def sample_contiguous_slices(mask: np.ndarray, wanted: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """A run of neighbouring slices for a segmentation; ``share`` of the runs cover a slice with the structure.

    Prediction reads every slice, so a model that mixes neighbours must be trained on slices at the same distance.
    """
    wanted = min(wanted, len(mask))
    marked = np.flatnonzero(mask.any(axis=(1, 2)))
    seen = rng.choice(marked) if marked.size and rng.uniform() < share else rng.integers(len(mask))
    first = np.clip(seen - rng.integers(wanted), 0, len(mask) - wanted)
    return first + np.arange(wanted)


def choose_slices(
    stack: Stack, rng: np.random.Generator, wanted: int, foreground_share: float | None, neighbours: bool
) -> np.ndarray:
    """Random slices of a stack for a training step; see `VolumeReader`."""
    if foreground_share is None or stack.mask is None:
        return sample_jittered_slices(len(stack.pixels), wanted, rng)
    sample = sample_contiguous_slices if neighbours else sample_foreground_slices
    return sample(np.asarray(stack.mask), wanted, foreground_share, rng)


@dataclass
class VolumeReader:
    """Reads the training volumes of a micro-batch: random slices of some of the ``sessions`` of a store."""

    store: Store
    sessions: Any
    num_slices: int
    foreground_share: float | None = None
    """For a segmentation, share of the slices that show the structure; None for other tasks."""
    neighbours: bool = False
    """For a segmentation, read adjacent slices (`sample_contiguous_slices`)."""

    def __post_init__(self) -> None:
        self.sessions = np.asarray(self.sessions)

    def read(self, positions: Sequence[int], key: StepKey) -> tuple[VolumeBatch, np.ndarray]:
        """The volumes at the given positions of the training part, and the store's session index of each."""
        indices = self.sessions[list(positions)]
        stacks = [self.store[int(session)] for session in indices]
        rngs = [numpy_generator(VIEWS, key.seed, *key.keys, place) for place in range(len(indices))]
        slices = [
            choose_slices(stack, rng, self.num_slices, self.foreground_share, self.neighbours)
            for stack, rng in zip(stacks, rngs, strict=True)
        ]
        return collate(stacks, slices), indices


class EmbeddedReader:
    """Reads the training volumes of a micro-batch as slice embeddings, for a frozen backbone."""

    def __init__(self, cache: EmbeddingCache, sessions: Sequence[int]) -> None:
        self.cache, self.store, self.sessions = cache, cache.store, np.asarray(sessions)

    def read(self, positions: Sequence[int], key: StepKey) -> tuple[EmbeddedBatch, np.ndarray]:
        indices = self.sessions[list(positions)]
        return self.cache.batch(indices.tolist()), indices


@overload
def augment_volumes(batch: VolumeBatch, recipe: VolumeAugmentation, key: StepKey) -> VolumeBatch: ...
@overload
def augment_volumes(batch: EmbeddedBatch, recipe: VolumeAugmentation, key: StepKey) -> EmbeddedBatch: ...
def augment_volumes(
    batch: VolumeBatch | EmbeddedBatch, recipe: VolumeAugmentation, key: StepKey
) -> VolumeBatch | EmbeddedBatch:
    """A random variant of each volume, on the batch's device; masks move with the pixels.

    One affine and, at random, one elastic deformation per volume, in a single resampling (bilinear for pixels,
    nearest for masks); intensities vary per volume and contrast. Embedded volumes are returned unchanged.
    """
    if isinstance(batch, EmbeddedBatch):
        return batch
    # Filters are matrix products, which would lose precision under the bf16 autocast of a training step.
    with torch.autocast(batch.pixel_values.device.type, enabled=False):
        return _augment(batch, recipe, key)


def _augment(batch: VolumeBatch, recipe: VolumeAugmentation, key: StepKey) -> VolumeBatch:
    generator = torch_generator(VIEWS, key.seed, *key.keys, AUGMENTATION)
    pixels = to_unit_range(batch.pixel_values)
    num_volumes, num_slices, _, height, width = pixels.shape
    matrices = _affines(num_volumes, (height, width), recipe, generator).to(pixels.device)
    grid = F.affine_grid(matrices, [num_volumes, 1, height, width], align_corners=False)
    _apply_elastic(grid, matrices, recipe, key)
    flat = rearrange(pixels, "b s c h w -> b (s c) h w")
    moved = F.grid_sample(flat, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    # One image per volume and contrast: its slices share their random intensities, and no filter crosses from one
    # slice to the next.
    images = rearrange(moved, "b (s c) h w -> b c s h w", s=num_slices).contiguous()
    noise_generator = torch_generator(VIEWS, key.seed, *key.keys, NOISE, device=pixels.device)
    images = vary_intensity(images, recipe.intensity, generator, noise_generator)
    contrast_mask = drop_contrasts(batch.contrast_mask.cpu(), recipe.contrast_dropout, generator).to(pixels.device)
    masks = batch.masks
    if masks is not None:
        masks = F.grid_sample(masks.float(), grid, mode="nearest", align_corners=False).round().long()
    return replace(
        batch,
        pixel_values=rearrange(images, "b c s h w -> b s c h w") * contrast_mask[:, None, :, None, None],
        contrast_mask=contrast_mask,
        masks=masks,
    )


def _affines(count: int, size: tuple[int, int], recipe: VolumeAugmentation, generator: torch.Generator) -> Tensor:
    """One matrix per volume; `random_affine` with crops of the whole image, then scaled."""
    own = recipe.model_dump(include={"rotation_degrees", "shear", "flip_left_right"})
    matrices = random_affine(count, size, (1.0, 1.0), ViewsRecipe(aspect=(1.0, 1.0), **own), generator)
    factor = 1 + recipe.scale * (2 * torch.rand(count, generator=generator) - 1)
    matrices[:, :, :2] *= factor[:, None, None]
    return matrices


def _apply_elastic(grid: Tensor, matrices: Tensor, recipe: VolumeAugmentation, key: StepKey) -> None:
    """Add a smooth displacement to the sampling grid (B H W 2) of some volumes, in place.

    It acts after the affine: a strong zoom does not amplify it.
    """
    if not recipe.elastic_probability:
        return
    num_volumes, height, width = grid.shape[:3]
    # A separate generator: elastic deformation leaves all other random numbers unchanged.
    generator = torch_generator(VIEWS, key.seed, *key.keys, ELASTIC)
    bent = EffectSelection.where(
        random_selection(num_volumes, recipe.elastic_probability, generator),
        random_control_points(num_volumes, recipe.elastic_cells, generator),
        uniform((num_volumes,), 0, recipe.elastic, generator),
    )
    if (part := bent.part(0, num_volumes, grid.device)) is not None:
        index, control, strength = part
        offsets = displacement_field(control, strength, (height, width))
        turned = torch.einsum("k x y, k h w y -> k h w x", matrices[index][:, :, :2], offsets)
        grid.index_add_(0, index, turned)


IGNORE_INDEX = -100
"""The label of padding; losses ignore it."""


class VolumeDataset(Dataset[dict[str, Tensor]]):
    """Labelled sessions of a store, each as the named tensors that a model takes.

    An example has `pixel_values (S, C, H, W)`, `contrast_mask (C,)`, `slice_mask (S,)`, `positions_mm (S,)` and
    `labels`: a class index, a number in the unit of the target, 0 or 1 for each of several labels `(K,)`; for a
    segmentation classes `(S, H, W)`, or 0 or 1 `(S, K, H, W)` if labels overlap. `collate_volumes` makes batches.

    Args:
        task: from `brainfound.finetuning.tasks.resolve` on the training part.
        sessions: which sessions of the store (None: all); those without a label are left out and counted in
            `num_left_out`.
        num_slices: slices per volume; None: all.
        augmentation: for training: random slices, randomly changed. None, for evaluation: evenly spaced slices,
            unchanged. Random numbers come from torch and follow a Trainer's seed.
        foreground_share: for training a segmentation, the share of the slices that show the structure.
        neighbours: for training a segmentation with the stem "slices" or `decoder_slice_mixing`, take neighbouring
            slices.

    Raises:
        UsageError: no session has a label, or one has an unknown class.
    """

    def __init__(
        self,
        store: Store,
        task: Task,
        sessions: Sequence[int] | np.ndarray | None = None,
        num_slices: int | None = None,
        *,
        augmentation: VolumeAugmentation | None = None,
        foreground_share: float = 0.5,
        neighbours: bool = False,
    ) -> None:
        labelled = TargetColumn.find(store, task.column).labelled
        requested = np.arange(len(store)) if sessions is None else np.asarray(sessions, dtype=int)
        self.sessions = requested[np.isin(requested, labelled)]
        self.num_left_out = len(requested) - len(self.sessions)
        if not len(self.sessions):
            what, where = f"none of {len(requested)} sessions has a label", f"store {store.path.name}"
            remedy = "Give other sessions, or add their labels and prepare the store again"
            raise UsageError(what, where=where, expected=task.column, remedy=remedy)
        self.store, self.task, self.num_slices = store, task, num_slices
        self.augmentation, self.foreground_share, self.neighbours = augmentation, foreground_share, neighbours
        self._values = task.values(store, self.sessions.tolist())

    def __len__(self) -> int:
        return len(self.sessions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        stack = self.store[int(self.sessions[index])]
        if self.augmentation is None:
            batch = collate([stack], [evenly_spaced_slices(len(stack.pixels), self.num_slices)])
        else:
            seed = int(torch.randint(2**31, ()))
            wanted = len(stack.pixels) if self.num_slices is None else self.num_slices
            share = self.foreground_share if self.task.per_voxel and self.num_slices is not None else None
            rng = np.random.default_rng(seed)
            batch = collate([stack], [choose_slices(stack, rng, wanted, share, self.neighbours)])
            batch = augment_volumes(batch, self.augmentation, StepKey(seed, 0, 0, 0))
        example = {name: value[0] for name, value in batch.inputs().items()}
        values = None if self._values is None else self._values[index]
        labels = self.task.loss_labels(values, None if batch.masks is None else batch.masks[0])
        return example | {"labels": labels}


def collate_volumes(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Examples of a `VolumeDataset` → one batch, padded to the longest; a Trainer's ``data_collator``.

    Padded slices hold zeros, have `slice_mask` False, and in a segmentation the label −100.
    """
    batch = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        if name in ("pixel_values", "slice_mask", "positions_mm"):
            batch[name] = pad_sequence(values, batch_first=True)
        elif name == "labels" and values[0].dim() >= 3:
            batch[name] = pad_sequence(values, batch_first=True, padding_value=IGNORE_INDEX)
        else:
            batch[name] = torch.stack(values)
    return batch
