"""Retention probes: features that hold information, features that have lost it, and the reference of the start."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from brainfound.pretraining.monitoring.retention import (
    RETENTION_PROBES,
    RIDGE_PENALTY_PER_SAMPLE,
    PatchTargets,
    RetentionProbes,
    SessionLabel,
    principal_component_scores,
    ridge_out_of_fold,
)

NUM_VIEWS, NUM_SLICES, SIDE, PATCH = 12, 4, 32, 8


def slices(seed: int = 0) -> list[np.ndarray]:
    """Two contrasts; the left half is background. Brightness and grain differ from patch to patch and scan to scan."""
    rng = np.random.default_rng(seed)
    views = []
    for _ in range(NUM_VIEWS):
        bright = rng.uniform(60, 140, (NUM_SLICES, 2, 4, 4)).repeat(PATCH, 2).repeat(PATCH, 3) * rng.uniform(0.7, 1.2)
        grain = rng.uniform(1, 20, (NUM_SLICES, 2, 4, 4)).repeat(PATCH, 2).repeat(PATCH, 3)
        pixels = (bright + grain * rng.normal(size=bright.shape)).clip(1, 255)
        pixels[..., : SIDE // 2] = 0
        views.append(pixels.astype(np.uint8))
    return views


def make_probes(probe_names=RETENTION_PROBES, shown: np.ndarray | None = None, **more) -> RetentionProbes:
    subject_index = np.arange(NUM_VIEWS) // 2
    positions = np.tile(np.linspace(-30.0, 30.0, NUM_SLICES), (NUM_VIEWS, 1))
    shown = np.ones((NUM_VIEWS, 2), bool) if shown is None else shown
    return RetentionProbes(probe_names, shown, subject_index, subject_index % 3, positions, **more)


def informed(targets: PatchTargets, noise: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """CLS and patch tokens that hold everything that the probes predict, mixed."""
    rng = np.random.default_rng(1)
    session = np.repeat(2 * rng.normal(size=(NUM_VIEWS, 1, 3)), NUM_SLICES, axis=1)
    place = np.tile(np.linspace(-1, 1, NUM_SLICES)[None, :, None], (NUM_VIEWS, 1, 1))
    cls = np.concatenate([targets.slice_values.reshape(NUM_VIEWS, NUM_SLICES, -1) * 5, session, place], axis=-1)
    patches = np.concatenate([targets.mean, targets.texture * 9, targets.position], axis=-1)
    mixed = [values @ rng.normal(size=(values.shape[-1], 12)) for values in (cls, patches)]
    return tuple((values + noise * rng.normal(size=values.shape)).astype(np.float32) for values in mixed)


def scores(
    probes: RetentionProbes, cls: np.ndarray, patches: np.ndarray, targets: PatchTargets
) -> dict[str, tuple[float, float]]:
    return probes.compare(probes.subject_errors(cls, patches, targets) | probes.start_retention(cls, patches))


def test_information_in_the_features_scores_high_and_lost_information_low():
    targets, probes = PatchTargets.from_slices(slices(), PATCH, seed=0), make_probes()
    cls, patches = informed(targets)
    probes.set_reference(cls, patches)
    good = scores(probes, cls, patches, targets)
    rng = np.random.default_rng(2)
    empty = scores(probes, rng.normal(size=cls.shape), rng.normal(size=patches.shape), targets)
    assert set(good) == {
        "slice_position", "slice_intensity", "identity", "patch_intensity", "patch_texture", "patch_position",
        "kept_slices", "kept_patches",
    }  # fmt: skip
    assert min(score for score, _ in good.values()) > 0.6
    assert max(score for score, _ in empty.values()) < 0.3


@pytest.mark.parametrize("lost", ["patch_texture", "patch_position"])
def test_one_thing_may_be_lost_alone(lost):
    """Other scores stay where they were; what the start targets linearly is seen to be missing."""
    targets, probes = PatchTargets.from_slices(slices(), PATCH, seed=0), make_probes()
    cls, patches = informed(targets, noise=0.0)
    probes.set_reference(cls, patches)
    kept = {"patch_texture": (targets.mean, targets.position), "patch_position": (targets.mean, targets.texture * 9)}[
        lost
    ]
    now = scores(probes, cls, np.concatenate(kept, axis=-1), targets)
    others = {"patch_intensity", "patch_texture", "patch_position"} - {lost}
    assert now[lost][0] < 0.3
    assert all(now[name][0] > 0.95 for name in others)
    assert now["kept_patches"][0] < 0.95 < now["kept_slices"][0]


def test_a_score_is_the_r2_of_ridge_regression_over_folds():
    rng = np.random.default_rng(3)
    features, values = rng.normal(size=(60, 5)), rng.normal(size=(60, 1))
    values += features[:, :1]
    folds = np.arange(60) % 3
    expected = np.empty(60)
    for fold in range(3):
        train, test = folds != fold, folds == fold
        scaler = StandardScaler().fit(features[train])
        x, y = scaler.transform(features[train]), values[train, 0]
        weights = np.linalg.solve(x.T @ x + RIDGE_PENALTY_PER_SAMPLE * len(x) * np.eye(5), x.T @ (y - y.mean()))
        expected[test] = (scaler.transform(features[test]) @ weights + y.mean()).clip(y.min(), y.max())
    assert np.allclose(ridge_out_of_fold(features, values, folds)[:, 0], expected)
    probes = RetentionProbes((), np.ones((20, 1), bool), np.arange(20), np.arange(20) % 3, np.zeros((20, 3)))
    folds = np.repeat(np.arange(20) % 3, 3)
    r2 = r2_score(values[:, 0], ridge_out_of_fold(features, values, folds)[:, 0])
    assert 1 - probes._linear_error(features, values, 3).sum() == pytest.approx(r2)


def test_labels_are_predicted_from_sessions_and_unknown_ones_do_not_count():
    rng = np.random.default_rng(4)
    sex = np.array(["F", "M"] * (NUM_VIEWS // 2))
    known = np.ones(NUM_VIEWS, bool)
    known[:2] = False
    age = np.where(known, np.linspace(20, 80, NUM_VIEWS), np.nan)
    probes = make_probes(
        ("labels",), labels={"sex": SessionLabel(sex, known, True), "age_years": SessionLabel(age, known, False)}
    )
    cls = rng.normal(size=(NUM_VIEWS, NUM_SLICES, 4)) * 0.01
    cls[..., 0] += (sex == "F")[:, None]
    cls[..., 1] += np.linspace(0, 1, NUM_VIEWS)[:, None]
    targets = PatchTargets.from_slices(slices(), PATCH, seed=0)
    found = probes.compare(probes.subject_errors(cls, None, targets))
    assert found["sex"][0] == pytest.approx(1)
    assert found["age_years"][0] > 0.8


def test_the_error_is_that_of_the_difference_to_the_start():
    """The same features again differ by nothing; what moved for every subject alike is known well."""
    targets, probes = PatchTargets.from_slices(slices(), PATCH, seed=0), make_probes(("patch_intensity",))
    cls, patches = informed(targets)
    alone = scores(probes, cls, patches + 0.5 * np.random.default_rng(5).normal(size=patches.shape), targets)
    probes.start = {
        f"shares/{name}": subject_errors
        for name, subject_errors in probes.subject_errors(cls, patches, targets).items()
    }
    assert scores(probes, cls, patches, targets)["patch_intensity"][1] == 0
    moved = scores(probes, cls, patches + 0.5 * np.random.default_rng(5).normal(size=patches.shape), targets)
    assert moved["patch_intensity"][0] == alone["patch_intensity"][0]
    assert moved["patch_intensity"][1] > 0


def test_the_error_of_a_difference_is_that_of_a_bootstrap_over_subjects():
    probes = make_probes(())
    rng = np.random.default_rng(6)
    before, now = rng.random(200) / 200, rng.random(200) / 200
    probes.start = {"shares/x": before}
    drawn = (now - before)[rng.integers(200, size=(4000, 200))].sum(axis=1)
    assert probes.compare({"x": now})["x"][1] == pytest.approx(drawn.std(), rel=0.1)


def test_an_absent_contrast_is_not_probed():
    pixels = slices()
    shown = np.ones((NUM_VIEWS, 2), bool)
    shown[4:, 1] = False
    for view in pixels[4:]:
        view[:, 1] = 0
    targets = PatchTargets.from_slices(pixels, PATCH, seed=0)
    cls, patches = informed(targets, noise=0.0)
    assert scores(make_probes(("patch_intensity",), shown), cls, patches, targets)["patch_intensity"][0] > 0.9
    shown[:, 1] = False
    only = scores(make_probes(("patch_intensity",), shown), cls, patches, targets)["patch_intensity"][0]
    first = PatchTargets(targets.chosen, targets.mean[..., :1], targets.texture, targets.position, targets.slice_values)
    assert only == scores(make_probes(("patch_intensity",), shown), cls, patches, first)["patch_intensity"][0]


def test_patches_show_something_and_are_the_same_again():
    targets, again = (PatchTargets.from_slices(slices(), PATCH, seed=0) for _ in range(2))
    assert (targets.chosen % 4 >= 2).all()  # the right half: eight of sixteen patches
    assert np.array_equal(targets.chosen, again.chosen)
    pixels = slices()[3]
    row, column = divmod(int(targets.chosen[3, 1, 0]), 4)
    tile = pixels[1, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] / 255
    assert np.allclose(targets.mean[3, 1, 0], tile.mean(axis=(1, 2)), atol=1e-6)
    assert np.allclose(targets.texture[3, 1, 0], tile.std(axis=(1, 2)), atol=1e-6)
    assert np.allclose(targets.position[3, 1, 0], [row / 4, column / 4])


def test_the_main_directions_are_those_of_the_svd():
    features = np.random.default_rng(7).normal(size=(50, 20)) @ np.diag(np.linspace(1, 3, 20))
    scaled = StandardScaler().fit_transform(features)
    lengths = np.linalg.svd(scaled, compute_uv=False)[:16]
    assert np.allclose(np.linalg.norm(principal_component_scores(features), axis=0), lengths, rtol=1e-4)


def test_the_start_is_remembered_by_a_file(tmp_path):
    targets, probes, later = PatchTargets.from_slices(slices(), PATCH, seed=0), make_probes(), make_probes()
    cls, patches = informed(targets)
    probes.set_reference(cls, patches)
    probes.start |= {
        f"shares/{k}": v
        for k, v in (probes.subject_errors(cls, patches, targets) | probes.start_retention(cls, patches)).items()
    }
    probes.save_start(tmp_path / "checkpoints" / "start.safetensors")
    later.load_start(tmp_path / "checkpoints" / "start.safetensors")
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["start.safetensors"]
    assert scores(later, cls * 2, patches + 1, targets) == scores(probes, cls * 2, patches + 1, targets)
