"""Checks that look at the image: each fault of a synthetic head is found, and heads that differ a little pass."""

from __future__ import annotations

import numpy as np
import pytest

from brainfound.data.checking.check import image_findings
from brainfound.data.checking.contract import InputContract
from brainfound.data.checking.mean_stack import GRID, Likeness, coarse_volume, compare, decode, encode
from brainfound.data.checking.rules import worst_level
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack_builder import StackBuilder
from brainfound.data.reading.scan import Scan
from brainfound.errors import RecipeError

SHAPE, MM = (52, 62, 56), 4.0
PREPROCESSING = Preprocessing(contrasts=("T1w",), spacing_mm=(MM, MM, MM), size=(64, 64))


def _ball(mm, centre, radii):
    return (((mm - np.array(centre)) / np.array(radii)) ** 2).sum(axis=-1) < 1


def _head(seed=0, scale=1.0):
    """A head with bright skin, a brain with dark ventricles, a cerebellum, a face and a neck, in noisy air."""
    rng = np.random.default_rng(seed)
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    mm = (index - (np.array(SHAPE) - 1) / 2) * MM / scale - rng.uniform(-6, 6, 3)
    image = np.zeros(SHAPE)
    image[_ball(mm, (0, 70, -50), (45, 25, 45))] = 150
    image[(mm[..., 0] ** 2 + (mm[..., 1] + 20) ** 2 < 45**2) & (mm[..., 2] < -40)] = 180
    image[_ball(mm, (0, 0, 15), (78, 96, 84))] = 330
    image[_ball(mm, (0, 0, 18), (70, 86, 72))] = 60
    image[_ball(mm, (0, 0, 22), (64, 80, 62))] = 240
    image[_ball(mm, (0, -45, -38), (44, 30, 24))] = 200
    image[_ball(mm, (0, 8, 26), (16, 34, 13))] = 40
    return np.hypot(image + rng.normal(0, 9, SHAPE), rng.normal(0, 9, SHAPE)).astype(np.float32)


def _build(data):
    affine = np.diag([MM, MM, MM, 1.0])
    scan = Scan(data, affine, data.shape, affine)
    return scan, StackBuilder(PREPROCESSING, "T1w", scan)


@pytest.fixture(scope="module")
def contract():
    builders = [_build(_head(seed, 0.95 + 0.02 * seed))[1] for seed in range(5)]
    counts = [builder.grid[0] for builder in builders]
    volumes = [builder.quality[0].foreground_ml for builder in builders]
    mean = np.mean([coarse_volume(builder.channel("T1w"), np.full(3, MM)) for builder in builders], axis=0)
    return InputContract.from_preprocessing(PREPROCESSING).model_copy(
        update={
            "num_sessions": 5,
            "coarsest_mm": {"T1w": MM},
            "skull": {"T1w": "head"},
            "num_slices": (min(counts), max(counts)),
            "foreground_ml": (min(volumes), max(volumes)),
            "mean_stack": {"T1w": encode(mean)},
        }
    )


def _found(data, contract):
    """Level and messages of the findings that are not fine."""
    findings = [finding for finding in image_findings(*_build(data), contract) if finding.level != "ok"]
    return worst_level(findings), [f"{finding.check}: {finding.message}" for finding in findings]


@pytest.mark.parametrize("seed", range(10, 16))
def test_other_heads_pass(contract, seed):
    assert _found(_head(seed, 0.93 + 0.02 * (seed % 6)), contract) == ("ok", [])


def _shuffled(n, kind):
    rng, half = np.random.default_rng(3), (n + 1) // 2
    woven = np.empty(n, dtype=int)
    woven[0::2], woven[1::2] = np.arange(half), np.arange(half, n)
    swapped = np.arange(n)
    swapped[: n // 2 * 2] = swapped[: n // 2 * 2].reshape(-1, 2)[:, ::-1].ravel()
    return {"any": rng.permutation(n), "woven": woven, "thirds": np.r_[0:n:3, 1:n:3, 2:n:3], "pairs": swapped}[kind]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", ["any", "woven", "thirds", "pairs"])
def test_slices_out_of_order(contract, kind, axis):
    data = _head(21)
    level, messages = _found(data.take(_shuffled(data.shape[axis], kind), axis), contract)
    assert level in ("warn", "fail")
    assert any("shuffled or interleaved" in line for line in messages), messages


@pytest.mark.parametrize(
    "turn",
    [
        lambda d: d[:, :, ::-1],
        lambda d: d[:, ::-1],
        lambda d: d[::-1, ::-1],
        lambda d: d[:, ::-1, ::-1],
        lambda d: np.rot90(d, 1, (1, 2)),
        lambda d: np.rot90(d, -1, (1, 2)),
        lambda d: np.rot90(d, 1, (0, 2)),
        lambda d: np.rot90(d, 1, (0, 1)),
    ],
)
def test_a_turned_head(contract, turn):
    level, messages = _found(np.ascontiguousarray(turn(_head(22))), contract)
    assert level == "fail"
    assert any("position: upside down" in line for line in messages), messages


def test_left_and_right_look_alike(contract):
    assert _found(np.ascontiguousarray(_head(23)[::-1]), contract)[0] == "ok"


def test_noise_and_inverted_values(contract):
    rng = np.random.default_rng(5)
    for noise in (rng.random(SHAPE) * 700, rng.normal(90, 20, SHAPE), rng.permuted(_head(24).ravel()).reshape(SHAPE)):
        level, messages = _found(noise.astype(np.float32), contract)
        assert level == "fail"
        assert any("as in noise" in line for line in messages), messages
    head = _head(25)
    level, messages = _found(head.max() - head, contract)
    assert level == "fail"
    assert any("values are inverted" in line for line in messages), messages


def test_values_inverted_within_a_head_on_dark_air(contract):
    data = _head(26)
    inside = data > 35
    level, messages = _found(np.where(inside, 380 - data, data).clip(1).astype(np.float32), contract)
    assert level in ("warn", "fail")
    assert any("inverted, or another contrast" in line for line in messages), messages


@pytest.mark.parametrize(
    ("part", "side"),
    [
        ((slice(26, None),), "on the left"),
        ((slice(None, 26),), "on the right"),
        ((slice(None), slice(31, None)), "behind"),
        ((slice(None), slice(None, 31)), "in front"),
        ((slice(None), slice(None), slice(None, 30)), "above"),
        ((slice(None), slice(None), slice(30, None)), "below"),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_half_a_head(contract, part, side, padded):
    whole = _head(27)
    data = whole[part]
    if padded:
        data = np.random.default_rng(0).rayleigh(9, SHAPE).astype(np.float32)
        data[part] = whole[part]
    level, messages = _found(np.ascontiguousarray(data), contract)
    assert level == "fail", messages
    assert any("field: the head or brain is cut off" in line for line in messages), messages


def test_a_head_of_a_few_millilitres(contract):
    data = _head(28)
    small = np.diag([0.4, 0.4, 0.4, 1.0])
    fine = PREPROCESSING.model_copy(update={"spacing_mm": (0.4, 0.4, 0.4)})
    scan = Scan(data, small, data.shape, small)
    findings = image_findings(scan, StackBuilder(fine, "T1w", scan), contract)
    assert [f.level for f in findings if "ml" in f.message] == ["fail"]


def test_without_a_mean_stack_nothing_is_compared(contract):
    old = contract.model_copy(update={"mean_stack": {}})
    level, messages = _found(_head(29)[:, :, ::-1].copy(), old)
    assert level == "note"
    assert messages == ["position: not compared with the training: the model holds no average of its T1w scans"]
    unmeasured = InputContract.from_preprocessing(PREPROCESSING)
    assert _found(_head(29), unmeasured) == ("ok", [])


def test_a_mean_stack_is_text(contract):
    volume = decode(contract.mean_stack["T1w"])
    assert volume.shape == (GRID,) * 3
    assert encode(volume) == contract.mean_stack["T1w"]
    assert len(encode(volume)) < 30_000
    with pytest.raises(RecipeError, match="mean_stack"):
        _load_damaged(contract)


def _load_damaged(contract):
    from brainfound.recipes import validate

    content = contract.model_dump(mode="json") | {"mean_stack": {"T1w": "bm8="}}
    return validate(InputContract, content, where="here")


def test_cells_hold_means_in_millimetres():
    fine = coarse_volume(np.full((60, 81, 100), 9, np.uint8), np.array([2.0, 1.0, 1.5]))
    assert fine.sum() == pytest.approx(9 * 12 * 8.1 * 15, rel=1e-5)
    assert fine.max() == pytest.approx(9)
    assert compare(np.zeros((9, 9, 9), np.uint8), np.ones(3), encode(np.ones((GRID,) * 3))) is None


def test_a_scan_is_most_like_itself(contract):
    pixels = _build(_head(3))[1].channel("T1w")
    own = compare(pixels, np.full(3, MM), encode(coarse_volume(pixels, np.full(3, MM))))
    assert isinstance(own, Likeness)
    assert own.upright > 0.8
    assert own.upright > own.turned + 0.1
    assert own.inner > own.inverted
