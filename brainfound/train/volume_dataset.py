"""Sessions of a store as examples for `transformers.Trainer`, or for any PyTorch training loop.

The fine-tuning command has a loop of its own and does not need this; see `docs/how-to/trainer.md` for how to use it.

Axis legend: S slices, C contrasts, H W pixels, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from brainfound.data.batches import collate, even_slices
from brainfound.data.stack import Stack
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.train.objectives.base import StepKey
from brainfound.train.targets import Target, labelled_sessions
from brainfound.train.volumes import (
    VolumeAugmentation,
    augment_volumes,
    jittered_slices,
    run_of_slices,
    slices_with_foreground,
)

UNKNOWN_LABEL = -100
"""The label of padding; losses leave it out."""


class VolumeDataset(Dataset[dict[str, Tensor]]):
    """Labelled sessions of a store, each as the named tensors that a model takes.

    An example has `pixel_values (S, C, H, W)`, `contrast_mask (C,)`, `slice_mask (S,)`, `positions_mm (S,)` and
    `labels`: a class index, a number in the unit of the target, 0 or 1 of each of several labels `(K,)`, or for a
    segmentation classes `(S, H, W)`, where labels overlap 0 or 1 `(S, K, H, W)`. `collate_volumes` makes batches.

    Args:
        store: the data.
        target: what is learnt, from `resolve_target` on the training part.
        sessions: which sessions of the store; None: all.
        num_slices: slices per volume; None: all.
        augmentation: for training: random changes, of randomly chosen slices. None, for evaluation: evenly spaced
            slices as they are. The random numbers are torch's, so a Trainer's seed decides them.
        foreground_share: of a segmentation's training, the share of the slices that show the structure.
        neighbours: of a segmentation's training, take slices that lie side by side; for the stem "slices" and
            `decoder_slice_mixing`.

    Attributes:
        sessions: the rows of the store that are examples; those without a label are left out.
        num_left_out: how many of the asked sessions these are.

    Raises:
        UsageError: no session has a label, or one has a class that the target does not know.
    """

    def __init__(
        self,
        store: Store,
        target: Target,
        sessions: Sequence[int] | np.ndarray | None = None,
        num_slices: int | None = None,
        *,
        augmentation: VolumeAugmentation | None = None,
        foreground_share: float = 0.5,
        neighbours: bool = False,
    ) -> None:
        labelled = labelled_sessions(store, target.column)
        asked = np.arange(len(store)) if sessions is None else np.asarray(sessions, dtype=int)
        self.sessions = asked[np.isin(asked, labelled)]
        self.num_left_out = len(asked) - len(self.sessions)
        if not len(self.sessions):
            raise UsageError(
                f"none of {len(asked)} sessions has a label",
                where=f"store {store.path.name}",
                expected=target.column,
                remedy="Give other sessions, or add their labels and prepare the store again",
            )
        self.store, self.target, self.num_slices = store, target, num_slices
        self.augmentation, self.foreground_share, self.neighbours = augmentation, foreground_share, neighbours
        self._labels = None if target.task == "segmentation" else target.values(store, self.sessions.tolist())

    def __len__(self) -> int:
        return len(self.sessions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        stack = self.store[int(self.sessions[index])]
        if self.augmentation is None:
            batch = collate([stack], [even_slices(len(stack.pixels), self.num_slices)])
        else:
            seed = int(torch.randint(2**31, ()))
            batch = collate([stack], [self._random_slices(stack, np.random.default_rng(seed))])
            batch = augment_volumes(batch, self.augmentation, StepKey(seed, 0, 0, 0))
        example = {name: value[0] for name, value in batch.inputs().items()}
        return example | {"labels": self._label(index, None if batch.masks is None else batch.masks[0].numpy())}

    def _label(self, index: int, mask: np.ndarray | None) -> Tensor:
        if self._labels is None:
            assert mask is not None, "only sessions with a mask were taken"
            return torch.from_numpy(self.target.encode_mask(mask).astype(np.int64))
        is_class = self.target.task == "classification" and not self.target.multi_label
        return torch.as_tensor(self._labels[index], dtype=torch.long if is_class else torch.float32)

    def _random_slices(self, stack: Stack, rng: np.random.Generator) -> np.ndarray:
        if self.num_slices is None:
            return np.arange(len(stack.pixels))
        if self._labels is not None:
            return jittered_slices(len(stack.pixels), self.num_slices, rng)
        choose = run_of_slices if self.neighbours else slices_with_foreground
        return choose(np.asarray(stack.mask), self.num_slices, self.foreground_share, rng)


def collate_volumes(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Examples of a `VolumeDataset` → one batch, padded to the longest; a Trainer's ``data_collator``.

    Padded slices hold zeros, have `slice_mask` False, and in a segmentation the label −100.
    """
    length = max(len(example["slice_mask"]) for example in examples)
    batch = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        if name in ("pixel_values", "slice_mask", "positions_mm"):
            batch[name] = _padded(values, length, 0)
        elif name == "labels" and values[0].dim() >= 3:
            batch[name] = _padded(values, length, UNKNOWN_LABEL)
        else:
            batch[name] = torch.stack(values)
    return batch


def _padded(values: Sequence[Tensor], length: int, fill: int) -> Tensor:
    """Tensors (S, …) as one (B, S, …), the shorter ones filled up."""
    padded = values[0].new_full((len(values), length, *values[0].shape[1:]), fill)
    for row, value in enumerate(values):
        padded[row, : len(value)] = value
    return padded
