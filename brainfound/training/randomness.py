"""Stateless seeding: the randomness of a step is a function of (seed, step, rank), not of history.

A resumed run needs no saved generator state, and neither a skipped step nor a probe shifts what later steps draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

ORDER, VIEWS, MASKS, DROPOUT, INITIALISATION, PROBE, NEIGHBOURS = range(7)
"""Purposes of random streams; streams of different purposes are independent."""


def derive_seed(purpose: int, seed: int, *keys: int) -> int:
    """A 63-bit seed from a purpose and keys (numpy's SeedSequence)."""
    return int(np.random.SeedSequence([purpose, seed, *keys]).generate_state(1, np.uint64)[0] >> 1)


def numpy_generator(purpose: int, seed: int, *keys: int) -> np.random.Generator:
    """A numpy generator for a purpose and keys (step, micro-batch, rank…)."""
    return np.random.default_rng(np.random.SeedSequence([purpose, seed, *keys]))


def torch_generator(purpose: int, seed: int, *keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device=device).manual_seed(derive_seed(purpose, seed, *keys))


def seed_dropout(seed: int, step: int, *keys: int) -> None:
    """Seed the global generators, which dropout and stochastic depth use."""
    torch.manual_seed(derive_seed(DROPOUT, seed, step, *keys))


def uniform_at_positions(start: int, count: int, purpose: int, seed: int) -> np.ndarray:
    """Uniform numbers in [0, 1) at positions `start` … `start + count − 1` of an endless sequence.

    Each depends on its own position only: it is the first of the four numbers that a counter-based generator (Philox;
    Salmon et al. 2011) yields at that count.
    """
    bits = np.random.Philox(key=derive_seed(purpose, seed), counter=start)
    return np.random.Generator(bits).random(4 * count)[::4]


@dataclass(frozen=True)
class StepKey:
    """The keys of one micro-batch's random streams."""

    seed: int
    step: int
    micro_batch: int
    rank: int

    @property
    def keys(self) -> tuple[int, int, int]:
        return (self.step, self.micro_batch, self.rank)
