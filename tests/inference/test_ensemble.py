"""The folds and seeds of an experiment as one predictor."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest

import brainfound
from brainfound.adapters import load_bundle
from brainfound.errors import ModelError, UsageError
from brainfound.experiments.runs import finetune_folds, make_folds
from brainfound.finetuning.frozen_baseline import load_frozen_baseline
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.tasks import from_dict
from brainfound.inference.ensemble import EnsemblePredictor, Members, find_members
from brainfound.inference.evaluation import evaluate
from brainfound.inference.loading import load
from brainfound.metrics.calibration import cv_plus_interval
from brainfound.recipes import validate

TINY = {
    "name": "tiny",
    "adapter": "head-only",
    "cached_embeddings": True,
    "num_slices": 3,
    "head_fit_passes": 1,
    "evaluate_every": 0,
    "split": {"train": 0.5, "validation": 0.25, "test": 0.25},
    "engine": {"steps": 2, "batch_size": 4, "precision": "no"},
}


@pytest.fixture(scope="module")
def folder(small_store, tiny_backbone, tmp_path_factory):
    """Ages over three folds and two seeds."""
    out = tmp_path_factory.mktemp("folds") / "cv"
    recipe = validate(FinetuneRecipe, TINY, ["task.kind=regression", "task.interval_confidence=0.7"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brainfound.experiments.page.draw_figure", lambda experiment: None)
        patch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: folder)
        split = make_folds(recipe, small_store, "age_years", folds=3)
        finetune_folds(split, recipe, small_store, tiny_backbone, "age_years", out, seeds=(0, 1), quiet=True)
    return out


def test_the_mean_has_the_spread_and_the_interval_of_the_out_of_fold_errors(folder, small_store):
    stack = small_store[0]
    answer = load(folder).predict_stack(stack).answer
    runs = [f"fold-{k}/seed-{s}" for k in (1, 2, 3) for s in (0, 1)]
    alone = np.array([load(folder / run).predict_stack(stack).answer["value"] for run in runs]).reshape(3, 2)
    assert answer["value"] == pytest.approx(alone.mean())
    assert answer["spread"] == {"num_members": 6, "value": pytest.approx(alone.std(ddof=1))}
    residuals, predictions = [], []
    for k in range(3):
        tables = [pd.read_csv(folder / f"fold-{k + 1}" / f"seed-{s}" / "cases.tsv", sep="\t") for s in (0, 1)]
        mean = (tables[0]["prediction"] + tables[1]["prediction"]) / 2
        first = ~tables[0]["subject_row"].duplicated()
        residuals += (mean - tables[0]["truth"]).abs()[first].tolist()
        predictions += [alone[k].mean()] * int(first.sum())
    low, high = cv_plus_interval(residuals, predictions, confidence=0.7)
    expected = {"low": pytest.approx(low), "high": pytest.approx(high), "confidence": 0.7, "method": "CV+"}
    assert answer["interval"] == expected


def test_copies_of_one_run_answer_as_that_run(folder, small_store):
    alone = load(folder / "fold-1" / "seed-0")
    members = find_members(folder)
    copies = {name: alone for name in members.folders}
    mean = EnsemblePredictor(copies, members)
    answer = mean.predict_stack(small_store[1]).answer
    assert answer["value"] == pytest.approx(alone.predict_stack(small_store[1]).answer["value"], rel=1e-12)
    assert answer["spread"]["value"] == pytest.approx(0, abs=1e-9)


def test_masks_are_decided_from_averaged_probabilities(segmenter, small_store, monkeypatch):
    from brainfound.inference import ensemble

    stack = small_store[0]
    folders = {name: segmenter.preprocessing for name in ("a", "b")}
    members = Members(folders, {"a": "fold-1", "b": "fold-2"})
    mean = EnsemblePredictor({"a": segmenter, "b": segmenter}, members)
    one, both = segmenter.predict_stack(stack), mean.predict_stack(stack)
    np.testing.assert_array_equal(one.image.dataobj, both.image.dataobj)
    assert both.answer["spread"]["volumes_mm3"]["lesion"] == 0
    # 0.9 and 0.3 are 0.6 on average: a lesion, though one of two members finds none.
    shares = iter((0.9, 0.3))
    infer = ensemble.infer

    def altered(*arguments):
        output, share = infer(*arguments), next(shares)
        output.class_probabilities[:, 1], output.class_probabilities[:, 0] = share, 1 - share
        return output

    monkeypatch.setattr(ensemble, "infer", altered)
    output = mean.infer_stack(stack)
    assert (output.classes == 1).all()
    np.testing.assert_allclose(output.foreground_probability, 0.6, rtol=1e-6)


def test_what_a_mean_refuses(folder, run, small_store, tmp_path):
    mean, other = load(folder), load(run)
    with pytest.raises(ModelError, match="another task than a"):
        EnsemblePredictor({"a": mean.predictors["fold-1/seed-0"], "b": other}, mean.members)
    with pytest.raises(UsageError, match="cannot be embedded.*fold-1/seed-0"):
        mean.as_encoder()
    with pytest.raises(UsageError, match="cannot be explained"):
        mean.explanation_settings()
    with pytest.raises(UsageError, match="only subjects that a member was trained on.*report.md"):
        evaluate(folder, small_store)
    shutil.copytree(folder, tmp_path / "cv")
    content = json.loads((tmp_path / "cv" / "summary.json").read_text())
    (tmp_path / "cv" / "summary.json").write_text(json.dumps(content | {"num_planned": 9}))
    with pytest.raises(UsageError, match="has not finished.*6 of 9"):
        load(tmp_path / "cv")


def test_the_mean_is_scored_on_other_subjects(folder, other_store, tmp_path):
    """Each fold trained on other subjects: what is left is nobody's, and the frozen baseline is a mean too."""
    (result,) = evaluate(folder, other_store, out=tmp_path / "external")
    assert {name.split("-")[0] for name in result.cases["subject"]} == {"other"}
    mean = load(folder)
    for case in result.cases.itertuples():
        assert case.prediction == pytest.approx(mean.predict_stack(other_store[case.row]).answer["value"])
    bundles = [load_bundle(path / "export") for path in mean.members.folders.values()]
    each = [load_frozen_baseline(bundle, from_dict(bundle.labels), mean.device) for bundle in bundles]
    expected = [
        abs(np.mean([b.answer(case.row, other_store[case.row]).value for b in each]) - case.truth)
        for case in result.cases.itertuples()
    ]
    assert result.frozen["mae"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert "are left out: their subjects are in the fine-tuning" in " ".join(result.notes)
    assert (tmp_path / "external" / "report.md").is_file()


def test_groups_and_systems_are_named_and_a_subfolder_is_taken(folder, small_store, tmp_path):
    copy = tmp_path / "cv"
    shutil.copytree(folder, copy)
    table = pd.read_csv(copy / "scores.tsv", sep="\t")
    table.assign(group=table["fold"]).to_csv(copy / "scores.tsv", sep="\t", index=False)
    with pytest.raises(UsageError, match="several groups of training subjects.*such as .*fold-1"):
        load(copy)
    one_fold = brainfound.load(copy / "fold-2")
    assert one_fold.predict_stack(small_store[0]).answer["spread"]["num_members"] == 2


def test_the_interval_of_a_run_is_in_its_answer_or_its_absence_in_the_notes(folder, small_store):
    prediction = load(folder / "fold-1" / "seed-0").predict_stack(small_store[0])
    has_interval = "interval" in prediction.answer
    assert has_interval != any(note.startswith("no interval: ") for note in prediction.notes)
