"""The linear model on the untouched backbone that stands beside every result."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from transformers import Dinov2Model

from brainfound.adapters.bundle_reader import BASELINE_FILE, file_hash, load_bundle
from brainfound.data.batches import collate, evenly_spaced_slices
from brainfound.errors import ModelError, TrainingError
from brainfound.experiments import results
from brainfound.finetuning import embedding_cache, frozen_baseline, linear_models
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.frozen_baseline import (
    PatchClassifier,
    fit_frozen_baseline,
    patch_label_fractions,
    score_frozen_baseline,
)
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.scoring import read_scores
from brainfound.finetuning.tasks import from_dict, resolve
from brainfound.inference.evaluation import evaluate
from brainfound.models import BrainFoundForSegmentation, BrainFoundModel
from brainfound.recipes import validate
from tests.tiny_runs import tiny_finetuning

TINY = tiny_finetuning(engine={"steps": 1})
PARTS = {"train": np.arange(8), "test": np.arange(8, 12)}


def run(store, backbone, column, out, *overrides, **options):
    own = ["task={kind: segmentation, decoder_width: 8}"] if column == "mask" else []
    recipe = validate(FinetuneRecipe, TINY, [*own, *overrides])
    return finetune(recipe, store, backbone, column, out, quiet=True, **options)


def frozen_cases(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "frozen-cases.tsv", sep="\t")


@pytest.fixture
def embedded(monkeypatch):
    """The subjects that were embedded, in order; each has one session."""
    seen, embed = [], embedding_cache.slice_embeddings

    def noted(model, stack, slices):
        seen.append(stack.subject)
        return embed(model, stack, slices)

    for module in ("embedding_cache", "frozen_baseline"):
        monkeypatch.setattr(f"brainfound.finetuning.{module}.slice_embeddings", noted)
    return seen


def test_it_is_a_ridge_on_the_mean_of_slices_whose_penalty_only_the_training_part_chooses(
    small_store, tiny_backbone, tmp_path
):
    folder = run(small_store, tiny_backbone, "age_years", tmp_path / "run")
    model = BrainFoundModel.from_backbone(tiny_backbone, contrasts=small_store.contrasts)
    means = []
    for session in range(len(small_store)):
        stack = small_store[session]
        with torch.no_grad():
            output = model(**collate([stack], [evenly_spaced_slices(len(stack.pixels), 4)]).inputs())
        means.append(output.slice_embeddings[0].mean(dim=0).double().numpy())
    cases, features, ages = frozen_cases(folder), np.stack(means), small_store.sessions["age_years"].to_numpy()
    names = json.loads((folder / "splits.json").read_text())["folds"]["single"]["subjects"]["train"]
    train = np.flatnonzero(small_store.sessions["subject"].isin(names))
    test = cases["row"].to_numpy()
    features = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
    errors = {}
    for strength in np.logspace(-1, 5, 13):
        wrong = []
        for learnt, left_out in GroupKFold(5).split(train, groups=train):
            ridge = Ridge(alpha=strength).fit(features[train][learnt], ages[train][learnt])
            wrong.append(np.square(ridge.predict(features[train][left_out]) - ages[train][left_out]).mean())
        errors[strength] = np.mean(wrong)
    expected = Ridge(alpha=min(errors, key=errors.get)).fit(features[train], ages[train]).predict(features[test])
    np.testing.assert_allclose(cases["prediction"], expected, rtol=1e-4)
    assert read_scores(folder)["frozen"]["mae"] == pytest.approx(np.abs(expected - ages[test]).mean(), rel=1e-4)


@pytest.mark.parametrize("column", ["diagnosis", "ill,old", "mask"])
def test_each_task_has_the_scores_of_the_run(small_store, tiny_backbone, tmp_path, monkeypatch, column):
    monkeypatch.setitem(small_store.sessions, "ill", [0, 1] * 6)
    monkeypatch.setitem(small_store.sessions, "old", [0, 0, 1, 1] * 3)
    folder = run(small_store, tiny_backbone, column, tmp_path / "run")
    scores, cases = read_scores(folder), frozen_cases(folder)
    assert set(scores["frozen"]) == set(scores["scores"])
    own = pd.read_csv(folder / "cases.tsv", sep="\t")
    assert cases["row"].tolist() == own["row"].tolist()
    assert cases.columns.tolist() == own.columns.tolist()
    if column == "mask":
        assert cases["dice"].mean() == pytest.approx(scores["frozen"]["dice"])
    else:
        shares = cases[[name for name in cases if name.startswith("p(")]].to_numpy()
        assert ((shares > 0) & (shares < 1)).all()
        if column == "diagnosis":
            np.testing.assert_allclose(shares.sum(axis=1), 1)


def test_it_is_of_the_backbone_before_training_whatever_training_does(small_store, tiny_backbone, tmp_path):
    """Full fine-tuning with a rate that ruins the backbone, several seeds, and a frozen backbone: one baseline."""
    options = {"frozen": ("adapter=head-only",), "full": ("adapter=full", "optim.lr=0.01", "seed=3", "engine.steps=2")}
    found = []
    for name, overrides in options.items():
        folder = run(small_store, tiny_backbone, "age_years", tmp_path / name, *overrides)
        found.append((read_scores(folder)["frozen"], frozen_cases(folder)))
    assert found[0][0] == found[1][0]
    pd.testing.assert_frame_equal(found[0][1], found[1][1])


def test_no_label_of_the_test_part_is_learnt_from(small_store, tiny_backbone, monkeypatch):
    model = BrainFoundForSegmentation.from_backbone(tiny_backbone, contrasts=small_store.contrasts)
    target = resolve(small_store, PARTS["train"].tolist(), "diagnosis", "classification")
    train, test = (PARTS[part].tolist() for part in ("train", "test"))
    honest = score_frozen_baseline(fit_frozen_baseline(model, small_store, train, target, 4), small_store, test)
    shuffled = small_store.sessions["diagnosis"].to_numpy().copy()
    shuffled[PARTS["test"]] = shuffled[PARTS["test"]][::-1]
    monkeypatch.setitem(small_store.sessions, "diagnosis", shuffled)
    other = score_frozen_baseline(fit_frozen_baseline(model, small_store, train, target, 4), small_store, test)
    assert other.cases["truth"].tolist() != honest.cases["truth"].tolist()
    assert other.cases["p(patient)"].tolist() == honest.cases["p(patient)"].tolist()


@pytest.mark.parametrize("adapter", ["lora-r8-patch", "pissa-r8", "head-only"])
@pytest.mark.parametrize("column", ["age_years", "diagnosis", "ill,old", "mask"])
def test_a_bundle_answers_for_its_baseline_as_the_run_did(
    small_store, tiny_backbone, tmp_path, monkeypatch, column, adapter
):
    """Whatever training did to the weights, and with contrasts withheld it is asked without them."""
    monkeypatch.setitem(small_store.sessions, "ill", [0, 1] * 6)
    monkeypatch.setitem(small_store.sessions, "old", [0, 0, 1, 1] * 3)
    folder = run(small_store, tiny_backbone, column, tmp_path / "run", f"adapter={adapter}", "optim.lr=0.01")
    (again,) = evaluate(folder / "export", small_store)
    written = read_scores(folder)["frozen"]
    assert again.to_dict()["frozen"].keys() == written.keys()
    assert again.to_dict()["frozen"] == pytest.approx(written)
    full, *others = evaluate(folder, small_store, partial_input=True)
    assert full.frozen == pytest.approx(again.frozen, nan_ok=True)
    assert any(other.frozen != full.frozen for other in others)
    (without,) = evaluate(folder, small_store, frozen=False)
    assert without.frozen is None
    assert without.scores == pytest.approx(again.scores, nan_ok=True)


def test_a_baseline_whose_backbone_is_gone_or_that_was_not_requested_is_reported(small_store, tiny_backbone, tmp_path):
    for name, override, words in (
        ("full", "adapter=full", "all weights were trained"),
        ("off", "frozen_baseline=false", "Fine-tune with frozen_baseline=true"),
    ):
        folder = run(small_store, tiny_backbone, "age_years", tmp_path / name, override)
        (result,) = evaluate(folder, small_store)
        assert result.frozen is None
        (note,) = [note for note in result.notes if "frozen baseline" in note]
        assert words in note


def test_a_damaged_baseline_is_an_error_and_not_a_missing_one(small_store, tiny_backbone, tmp_path):
    export = run(small_store, tiny_backbone, "age_years", tmp_path / "run", "adapter=head-only") / "export"
    tensors = load_file(export / BASELINE_FILE)
    tensors.pop("bias")
    save_file(tensors, export / BASELINE_FILE)
    description = json.loads((export / "bundle.json").read_text())
    description["files"][BASELINE_FILE] = file_hash(export / BASELINE_FILE)
    (export / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(ModelError, match="baseline of the bundle is of another kind"):
        evaluate(export, small_store)
    bundle = load_bundle(export)
    with pytest.raises(ModelError, match="baseline of the bundle is of another kind"):
        results._load_frozen_baseline(bundle, from_dict(bundle.labels))
    assert results._load_frozen_baseline(replace(bundle, baseline={}), from_dict(bundle.labels)) is None


@pytest.mark.parametrize(
    ("column", "override"),
    [("age_years", "stem=per_contrast"), ("mask", "task={kind: segmentation, decoder_width: 8}")],
)
def test_the_start_of_a_full_fine_tuning_may_be_given(small_store, tiny_backbone, tmp_path, column, override):
    folder = run(small_store, tiny_backbone, column, tmp_path / "full", "adapter=full", "optim.lr=0.01", override)
    (result,) = evaluate(folder / "export", small_store, base=tiny_backbone)
    assert result.to_dict()["frozen"] == pytest.approx(read_scores(folder)["frozen"])
    with pytest.raises(ModelError, match="not the model that the run started from") as refused:
        evaluate(folder, small_store, base=folder / "export")
    assert "\n" not in str(refused.value)


def test_runs_of_one_command_embed_each_session_once(small_store, tiny_backbone, tmp_path, embedded):
    for seed in (0, 1):
        run(
            small_store, tiny_backbone, "age_years", tmp_path / f"seed-{seed}", f"seed={seed}",
            cache=tmp_path / "embeddings",
        )  # fmt: skip
    assert len(embedded) == len(set(embedded)) == 9, "the training and the test part"
    alone = run(small_store, tiny_backbone, "age_years", tmp_path / "alone")
    assert len(embedded) == 18
    assert not (alone / "embeddings").exists()
    assert read_scores(alone)["frozen"] == read_scores(tmp_path / "seed-1")["frozen"]


def test_embeddings_that_a_run_keeps_are_used_again(small_store, tiny_backbone, tmp_path, embedded):
    kept = ("adapter=head-only", "cached_embeddings=true")
    first = run(small_store, tiny_backbone, "age_years", tmp_path / "run", *kept)
    assert len(embedded) == len(set(embedded)) == 12, "all parts, for the run itself"
    assert "frozen" in read_scores(first)
    off = run(small_store, tiny_backbone, "age_years", tmp_path / "off", "frozen_baseline=false")
    assert "frozen" not in read_scores(off)
    assert not (off / "frozen-cases.tsv").exists()
    assert len(embedded) == 12


def test_a_backbone_without_finite_embeddings_is_refused_in_one_line(small_store, tiny_backbone, tmp_path):
    broken = Dinov2Model.from_pretrained(tiny_backbone)
    with torch.no_grad():
        broken.layernorm.weight.fill_(3e38)  # finite, and too large for what is computed with it
    broken.save_pretrained(tmp_path / "broken")
    for column in ("age_years", "mask"):
        with pytest.raises(TrainingError, match="not finite") as refused:
            run(small_store, tmp_path / "broken", column, tmp_path / "run")
        assert "\n" not in str(refused.value)


def test_patches_of_the_structure_are_distinguished_from_the_rest(small_store, tiny_backbone, tmp_path):
    """A linear model of a random backbone finds the bright ball better than a baseline that marks the whole head."""
    scores = read_scores(run(small_store, tiny_backbone, "mask", tmp_path / "run", "num_slices=12"))
    assert scores["frozen"]["dice"] > scores["trivial"]["dice"] + 0.1
    overlapping = run(
        small_store, tiny_backbone, "mask", tmp_path / "regions", "task.regions={whole: [1, 2], core: [1]}"
    )
    found = read_scores(overlapping)["frozen"]
    assert found["dice(whole)"] == found["dice(core)"] == found["dice"] > 0


def test_a_pixel_has_the_class_of_its_patch(small_store, tiny_backbone):
    model = BrainFoundForSegmentation.from_backbone(tiny_backbone, contrasts=small_store.contrasts)
    target = resolve(small_store, range(8), "mask", "segmentation")
    classifier = PatchClassifier.fit(model, small_store, range(8), target, 6, seed=0)
    stack = small_store[9]
    classes = classifier.answer(9, stack).classes
    side = model.encoder.patch_size
    tiles = classes.reshape(len(classes), 32 // side, side, 32 // side, side)
    assert (tiles == tiles[:, :, :1, :, :1]).all()
    with torch.no_grad():
        tokens = model.brainfound(**collate([stack]).inputs(), output_patch_embeddings=True).patch_embeddings[0]
    scores = ((tokens.double().numpy() - classifier.mean) / classifier.std) @ classifier.weight[0] + classifier.bias[0]
    expected = 1 / (1 + np.exp(-scores)) > classifier.thresholds[0]
    assert (tiles[:, :, 0, :, 0].reshape(len(classes), -1) == expected).all()
    assert expected.any()
    assert not expected.all()


def test_what_is_left_out_of_the_sample_is_counted_by_its_weights():
    masks = np.zeros((10, 2, 8, 8), dtype=np.uint8)
    masks[2:5, 0, :4, :4] = 1
    masks[3, 1, 0, 0] = 1
    shares = patch_label_fractions(masks, 4)
    assert shares.shape == (10, 4, 2)
    assert shares[3].tolist() == [[1, 1 / 16], [0, 0], [0, 0], [0, 0]]
    slices, of_slice = frozen_baseline._choose_slices(masks.any(axis=(1, 2, 3)), 4)
    assert set(slices) & {2, 3, 4} == {2, 4}
    assert len(slices) == 4
    assert of_slice.sum() == pytest.approx(10)
    chosen, weights = frozen_baseline._choose_patches(shares[slices], of_slice, 6, np.random.default_rng(0))
    assert len(set(chosen)) == len(chosen)
    marked = shares[slices].reshape(-1, 2)[chosen].any(axis=1)
    assert weights[marked].sum() == pytest.approx(3), "one patch on each of three slices"
    # No slice with the structure, and nothing but the structure.
    for shows in (np.zeros(5, bool), np.ones(5, bool)):
        slices, of_slice = frozen_baseline._choose_slices(shows, 3)
        assert (len(slices), of_slice.sum()) == (3, pytest.approx(5))


def test_shares_are_fitted_without_bias_and_the_threshold_is_the_best():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(400, 3))
    shares = np.clip(1 / (1 + np.exp(2 - 2 * features[:, 0])) + generator.normal(0, 0.05, 400), 0, 1)
    weights = generator.uniform(0.2, 1.8, 400)
    weight, bias = linear_models.fit_fractions(features, shares, weights, 1.0)
    probabilities = 1 / (1 + np.exp(-(features @ weight + bias)))
    assert weights @ probabilities == pytest.approx(weights @ shares, rel=1e-3)
    _, _, threshold = linear_models.fit_patch_label(features, shares, weights, np.arange(400) // 4)

    def dice(cut: float) -> float:
        marked = probabilities > cut
        return 2 * (weights * shares)[marked].sum() / ((weights * shares).sum() + weights[marked].sum())

    assert dice(threshold) == pytest.approx(max(dice(cut) for cut in np.linspace(0.05, 0.95, 19)), abs=0.01)
    assert threshold < 0.5
    # A class that the sample lacks, or that is all there is, stops nothing.
    assert linear_models.fit_patch_label(features, np.zeros(400), weights, np.arange(400))[1] < -10
    assert linear_models.fit_patch_label(features, np.ones(400), weights, np.arange(400))[1] > 10
