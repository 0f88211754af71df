"""The subjects that a model was trained on, as hashes that travel with the model.

A model may be shared, so it keeps salted, slow hashes of identifiers, and hashes of images, which identify a subject
under another name. Names cannot be read from it, but a list of names can be tested against it, as `evaluate` does.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from brainfound.data.store import Store
from brainfound.recipes import Recipe, load_json

HISTORY_FILE = "training_history.json"
HASH_ROUNDS = 1000
"""Rounds of PBKDF2: about half a millisecond per subject, so ten thousand are checked in seconds."""
_LEARNT = ("train", "validation")


class TrainingHistory(Recipe):
    """The subjects of every recorded training of a model's weights, the first one first."""

    complete: bool = False
    """Whether all training since the random weights is recorded."""

    trainings: tuple[dict[str, Any], ...] = ()
    """A `hash_split` per training."""

    def extended(self, store: Store, parts: Mapping[str, np.ndarray]) -> TrainingHistory:
        """With one more training, on the train and validation parts of a store."""
        split = hash_split(store, {part: own for part, own in parts.items() if part in _LEARNT})
        return self.model_copy(update={"trainings": (*self.trainings, split)})

    def seen(self, store: Store, sessions: Sequence[int]) -> np.ndarray:
        """Whether each session, ``(n,)`` bool, is by name or image of a subject of a recorded training."""
        found = np.zeros(len(sessions), dtype=bool)
        for training in self.trainings:
            found |= seen_in_training(training, store, sessions)
        return found

    def save(self, folder: str | Path) -> Path:
        """Write ``training_history.json`` into a folder."""
        return self.save_json(Path(folder) / HISTORY_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> TrainingHistory:
        """Read that of a model folder; empty where it has none. Errors as `load_json`."""
        return load_json(cls, Path(folder) / HISTORY_FILE) or cls()


def hash_split(store: Store, parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A split for a model folder: the data's hash, and hashes of each part's subjects and images."""
    # A new salt per model: models cannot be compared, and no precomputed table helps to guess names.
    salt = os.urandom(16).hex()
    subjects, images = (store.sessions[column].astype(str).to_numpy() for column in ("subject", "image_hash"))
    return {
        "data_hash": store.content_hash,
        "hash": "pbkdf2-sha256",
        "rounds": HASH_ROUNDS,
        "salt": salt,
        "subjects": {part: sorted({subject_hash(name, salt) for name in subjects[own]}) for part, own in parts.items()},
        "images": {part: sorted({_image_hash(image, salt) for image in images[own]}) for part, own in parts.items()},
    }


def is_in_parts(split: Mapping[str, Any], store: Store, sessions: Sequence[int], *parts: str) -> np.ndarray:
    """Whether the subject of each session of a store is in one of the parts of a `hash_split`; ``(n,)`` bool."""
    members = {digest for part in parts for digest in split["subjects"].get(part, ())}
    names = store.sessions["subject"]
    hashes = (subject_hash(str(names.iloc[int(i)]), split["salt"], split["rounds"]) for i in sessions)
    return np.array([digest in members for digest in hashes], dtype=bool)


def seen_in_training(split: Mapping[str, Any], store: Store, sessions: Sequence[int]) -> np.ndarray:
    """Whether each session, ``(n,)`` bool, has the name or an image of a train or validation subject of a split."""
    return is_in_parts(split, store, sessions, *_LEARNT) | image_in_training(split, store, sessions)


def image_in_training(split: Mapping[str, Any], store: Store, sessions: Sequence[int]) -> np.ndarray:
    """Whether each session, ``(n,)`` bool, has an image of a train or validation subject of a split."""
    images = {digest for part in _LEARNT for digest in split["images"].get(part, ())}
    hashes = store.sessions["image_hash"]
    return np.array([_image_hash(str(hashes.iloc[int(i)]), split["salt"]) in images for i in sessions], dtype=bool)


@lru_cache(maxsize=100_000)
def subject_hash(subject: str, salt: str, rounds: int = HASH_ROUNDS) -> str:
    """The salted, slow hash of a subject's identifier."""
    return hashlib.pbkdf2_hmac("sha256", subject.encode(), bytes.fromhex(salt), rounds, 16).hex()


def _image_hash(image_hash: str, salt: str) -> str:
    return hashlib.sha256(f"{salt} {image_hash}".encode()).hexdigest()[:32]
