"""The patch probe: labels of patches, which are looked at, and what good and empty tokens score."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from brainfound.pretraining.monitoring.probes import PatchProbe, Probe, ProbeRecipe, choose_patches, majority_labels

SIDE, PATCH, NUM_SESSIONS, NUM_SLICES = 16, 4, 6, 3


class MaskStore:
    """Sessions of noise with a mask: a bright square of label 5 somewhere, background elsewhere."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.masks = np.zeros((NUM_SESSIONS, NUM_SLICES, SIDE, SIDE), dtype=np.int16)
        for mask in self.masks.reshape(-1, SIDE, SIDE):
            row, column = rng.integers(0, 9, 2)
            mask[row : row + 8, column : column + 8] = 5
        noise = rng.integers(0, 60, (NUM_SESSIONS, NUM_SLICES, 1, SIDE, SIDE))
        self.pixels = (noise + 150 * (self.masks == 5)[:, :, None]).astype(np.uint8)
        self.present = np.ones((NUM_SESSIONS, 1), dtype=bool)

    def session_rows(self, session: int) -> np.ndarray:
        return np.arange(NUM_SLICES) + session * NUM_SLICES

    def read_slices(self, rows: np.ndarray) -> np.ndarray:
        return self.pixels.reshape(-1, 1, SIDE, SIDE)[rows]

    def read_masks(self, session: int, slices: np.ndarray) -> np.ndarray:
        return self.masks[session][slices]


class Tokens(torch.nn.Module):
    """Tokens that are the means of patches, or say nothing."""

    patch_size = PATCH

    def __init__(self, informed: bool, value: float = 1.0) -> None:
        super().__init__()
        self.informed, self.value = informed, value

    def forward(self, pixels, present):
        means = torch.nn.functional.avg_pool2d(pixels.float(), PATCH).flatten(1)[..., None]
        tokens = means if self.informed else torch.zeros_like(means)
        return SimpleNamespace(patches=tokens.repeat(1, 1, 2) * self.value)


def probe() -> PatchProbe:
    store = MaskStore()
    rows = [store.session_rows(session)[1:] for session in range(NUM_SESSIONS)]
    subjects = np.array([f"s{session // 2}" for session in range(NUM_SESSIONS)])
    return PatchProbe(store, np.arange(NUM_SESSIONS), rows, subjects, num_folds=3, seed=0)


def test_the_label_of_a_patch_is_that_of_most_of_its_pixels():
    mask = np.zeros((1, 4, 6), dtype=int)
    mask[0, :2, 2:4] = [[7, 7], [7, 0]]
    mask[0, 2:, 4:] = [[7, 7], [0, 0]]  # a draw: the lower label
    mask[0, 2:, :2] = 3
    assert majority_labels(mask, 2).tolist() == [[0, 7, 0, 3, 0, 0]]


def test_background_does_not_fill_the_sample():
    labels = np.array([0] * 90 + [2] * 3 + [4] * 7)
    chosen = labels[choose_patches(labels, 12, np.random.default_rng(0))]
    assert [(chosen == label).sum() for label in (0, 2, 4)] == [4, 3, 4]


def test_tokens_that_show_the_tissue_score_high_and_others_do_not():
    device, tested = torch.device("cpu"), probe()
    encoder = Tokens(informed=True).train()
    score = tested.run(encoder, device)
    assert score > 0.9
    assert encoder.training
    assert tested.run(encoder, device) == score
    assert tested.run(Tokens(informed=False), device) == pytest.approx(0.5, abs=0.1)
    assert np.isnan(tested.run(Tokens(informed=True, value=float("nan")), device))


def test_a_store_without_masks_is_reported(store):
    with pytest.warns(UserWarning, match=r"probe\.patch is left out"):
        tested = Probe(store, ProbeRecipe(patch=True, slices_per_session=2, folds=3), seed=0)
    assert tested.patches is None
