"""Slice embeddings of a store from a frozen encoder: computed once, kept on disk, memory-mapped. The folder:

    slices-32-9f86d081884c7d65/     named by the number of slices and a hash of cache.json
        cache.json                  the encoder's weights and settings, and the data
        embeddings.npy              (rows, D) float32, a session's slices in consecutive rows
        done.npy                    (sessions,) bool, the sessions whose rows are written

Sessions are embedded on first use and marked as done afterwards, so an interrupted cache can be resumed. Nothing is
augmented, and all contrasts of a session are read.

Axis legend: B volumes, S slices, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from brainfound.adapters.bundle_reader import tensors_hash
from brainfound.data.batches import collate, evenly_spaced_slices
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.store import Store
from brainfound.errors import ModelError, TrainingError
from brainfound.files import write_atomically
from brainfound.models import BrainFoundModel

_SCHEMA = "brainfound-embeddings/1"
_FACTS, _EMBEDDINGS, _DONE = "cache.json", "embeddings.npy", "done.npy"
# Where a backbone came from and how it runs; none of these affects the embeddings.
_IRRELEVANT_CONFIG_KEYS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
_IRRELEVANT_CONFIG_KEYS |= {"_attn_implementation"}


@dataclass(frozen=True)
class EmbeddedBatch:
    """A batch of embedded volumes; fields are named after the models' arguments."""

    slice_embeddings: Float[Tensor, "B S D"]
    slice_mask: Bool[Tensor, "B S"]
    positions_mm: Float[Tensor, "B S"]

    def to(self, device: torch.device | str) -> EmbeddedBatch:
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a model's forward pass."""
        return dict(vars(self))


class EmbeddingCache:
    """Embeddings of ``num_slices`` evenly spaced slices (None: all) per session, in a subfolder of ``folder``.

    The model's encoder must not change while the cache is used.

    Raises:
        ModelError: the contrasts of store and model differ.
        TrainingError: the subfolder is not a cache, or is not writable.
    """

    def __init__(self, model: BrainFoundModel, store: Store, folder: str | Path, num_slices: int | None = None) -> None:
        if tuple(model.config.contrasts) != tuple(store.contrasts):
            got, expected = ", ".join(store.contrasts), ", ".join(model.config.contrasts)
            raise ModelError("the data's contrasts are not the model's", got=got, expected=expected, usage=True)
        self.model, self.store, self.num_slices = model, store, num_slices
        self._slices = [evenly_spaced_slices(int(n), num_slices) for n in store.sessions["num_slices"]]
        self._first = np.concatenate([[0], np.cumsum([len(index) for index in self._slices])])
        facts = self._cache_metadata()
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = Path(folder) / f"slices-{num_slices or 'all'}-{key}"
        try:
            self._embeddings, self._done = self._open(facts)
        except (OSError, ValueError) as error:
            what, remedy = "the cache of embeddings cannot be used", "Remove this folder; it is created again"
            raise TrainingError(what, where=self.path, got=str(error), remedy=remedy) from error

    def ensure_embedded(self, sessions: Sequence[int], progress: Callable[[int, int], None] | None = None) -> int:
        """Embed the sessions that are not in the cache yet and return their number; ``progress`` gets (done, to do)."""
        missing = [int(session) for session in sessions if not self._done[int(session)]]
        for done, session in enumerate(missing, start=1):
            self._embeddings[self._rows(session)] = self._embed(session)
            # Rows before the mark: an interruption never marks rows that were not written.
            self._embeddings.flush()
            self._done[session] = True
            self._done.flush()
            if progress:
                progress(done, len(missing))
        return len(missing)

    def slices(self, session: int) -> Float[np.ndarray, "S D"]:
        """The slice embeddings of a session; TrainingError if `ensure_embedded` was not called for it."""
        if not self._done[session]:
            raise TrainingError("a session is not in the cache", where=self.path, got=f"session of row {session}")
        return np.asarray(self._embeddings[self._rows(session)])

    def slices_read(self, session: int) -> Int[np.ndarray, "S"]:
        """The indices of the slices of a session that are embedded."""
        return self._slices[session]

    def mean_embeddings(self, sessions: Sequence[int]) -> Float[np.ndarray, "n D"]:
        """The mean slice embedding of each session, as from a frozen backbone with mean pooling."""
        return np.stack([self.slices(int(session)).mean(axis=0) for session in sessions])

    def batch(self, sessions: Sequence[int]) -> EmbeddedBatch:
        """Sessions as a batch, padded to the longest."""
        index = [int(session) for session in sessions]
        embeddings = [torch.from_numpy(self.slices(session)) for session in index]
        all_mm = self.store.slice_positions_mm
        positions = [all_mm[self.store.session_rows(session)][self._slices[session]] for session in index]
        return EmbeddedBatch(
            pad_sequence(embeddings, batch_first=True),
            pad_sequence([torch.ones(len(part), dtype=torch.bool) for part in embeddings], batch_first=True),
            pad_sequence([torch.as_tensor(part, dtype=torch.float32) for part in positions], batch_first=True),
        )

    def _rows(self, session: int) -> slice:
        return slice(int(self._first[session]), int(self._first[session + 1]))

    def _embed(self, session: int) -> Float[np.ndarray, "S D"]:
        return slice_embeddings(self.model, self.store[session], self._slices[session])

    def _cache_metadata(self) -> dict[str, Any]:
        config = self.model.config
        backbone = {k: v for k, v in config.backbone_config.to_dict().items() if k not in _IRRELEVANT_CONFIG_KEYS}
        return {
            "schema": _SCHEMA,
            "encoder": tensors_hash(self.model.encoder.state_dict()),
            "backbone": backbone,
            **{name: getattr(config, name) for name in ("stem", "image_mean", "image_std")},
            "contrasts": list(config.contrasts),
            "data_hash": self.store.content_hash,
            "num_slices": self.num_slices,
            # Only if not the default, so that existing caches keep their names.
            **({"slice_features": config.slice_features} if config.slice_features != "cls" else {}),
            **({"feature_layers": list(config.feature_layers)} if config.feature_layers else {}),
            **({"withheld": list(self.store.withheld)} if self.store.withheld else {}),
        }

    def _open(self, facts: dict[str, Any]) -> tuple[np.memmap, np.memmap]:
        """The arrays of this cache, created if they are missing."""
        shape, sessions = (int(self._first[-1]), int(self.model.config.embedding_size)), len(self._slices)
        if not (self.path / _FACTS).is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(self.path / _EMBEDDINGS, "w+", np.float32, shape).flush()
            np.lib.format.open_memmap(self.path / _DONE, "w+", bool, (sessions,)).flush()
            # Written last: a cache that was interrupted before this point is created again.
            write_atomically(self.path / _FACTS, json.dumps(facts, indent=1, sort_keys=True) + "\n")
        embeddings, done = (_writable(self.path / name) for name in (_EMBEDDINGS, _DONE))
        if embeddings.shape != shape or embeddings.dtype != np.float32 or done.shape != (sessions,):
            raise ValueError(f"arrays of shape {embeddings.shape} and {done.shape}")
        return embeddings, done


@torch.inference_mode()
def slice_embeddings(model: BrainFoundModel, stack: Stack, slices: Int[np.ndarray, "S"]) -> Float[np.ndarray, "S D"]:
    """Embed the given slices of a stack with a model's encoder; leaves the model in eval mode."""
    model.eval()
    batch = collate([stack], [slices]).to(next(model.parameters()).device)
    return model(**batch.inputs()).slice_embeddings[0].float().cpu().numpy()


def _writable(file: Path) -> np.memmap:
    # Open read-only first: opening a truncated file for writing would pad it with zeros.
    np.lib.format.open_memmap(file, "r")
    return np.lib.format.open_memmap(file, "r+")
