"""Stateless seeding: the randomness of a step is a function of (seed, step, rank), not of history.

Every generator that a step uses (order of the data, augmentation, masks, dropout) is made anew from
those numbers when the step starts. A resumed run therefore needs no saved generator state: step 100
draws the same numbers whether or not steps 0 to 99 ran in the same process. It also means that
skipping a step, or looking at a probe in between, cannot shift what later steps draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

ORDER, VIEWS, MASKS, DROPOUT, INITIALISATION, PROBE, NEIGHBOURS = range(7)
"""What a stream of random numbers is for; streams of different purposes are independent."""


def derive_seed(purpose: int, seed: int, *keys: int) -> int:
    """A 63-bit seed that mixes all its keys (numpy's SeedSequence)."""
    return int(np.random.SeedSequence([purpose, seed, *keys]).generate_state(1, np.uint64)[0] >> 1)


def numpy_generator(purpose: int, seed: int, *keys: int) -> np.random.Generator:
    """A numpy generator for a purpose and keys (step, micro-batch, rank…)."""
    return np.random.default_rng(np.random.SeedSequence([purpose, seed, *keys]))


def torch_generator(purpose: int, seed: int, *keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for a purpose and keys, on a device."""
    return torch.Generator(device=device).manual_seed(derive_seed(purpose, seed, *keys))


def seed_dropout(seed: int, step: int, *keys: int) -> None:
    """Seed the global generators, from which dropout and stochastic depth draw inside the model."""
    torch.manual_seed(derive_seed(DROPOUT, seed, step, *keys))


def uniform_at_positions(start: int, count: int, purpose: int, seed: int) -> np.ndarray:
    """Uniform numbers in 0–1 that belong to the positions `start` … `start + count − 1` of an endless sequence.

    Each is a function of its own position: a counter-based generator (Philox; Salmon et al. 2011) is set to it. Its
    step of the counter gives four numbers, of which the first is taken.
    """
    generator = np.random.Generator(np.random.Philox(key=derive_seed(purpose, seed), counter=start))
    return generator.random(4 * count)[::4]


@dataclass(frozen=True)
class StepKey:
    """Names the randomness of one micro-batch; see `brainfound.training.randomness`."""

    seed: int
    step: int
    micro_batch: int
    rank: int

    @property
    def keys(self) -> tuple[int, int, int]:
        return (self.step, self.micro_batch, self.rank)
