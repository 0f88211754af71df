"""Segmentations of overlapping labels, with other decoders and losses, from training to files."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

import brainfound
from brainfound.errors import RecipeError, UsageError
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.scoring import score_predictions, score_sessions
from brainfound.finetuning.tasks import Segmentation
from brainfound.finetuning.tasks.segmentation import OverlappingSegmentation
from brainfound.inference.evaluation import evaluate
from brainfound.metrics.cases import compute_headline_score
from brainfound.metrics.registry import segmentation_case_scores
from brainfound.models.stack_prediction import StackPrediction, infer
from brainfound.recipes import validate
from tests.tiny_runs import tiny_finetuning

TINY = tiny_finetuning(
    task={"kind": "segmentation", "decoder_width": 8}, head_fit_passes=4, frozen_baseline=False, evaluate_every=2
)


def test_overlapping_labels_from_recipe_to_files(small_store, tiny_backbone, tmp_path):
    overrides = [
        "task.decoder=unetr",
        "task.decoder_slice_mixing=true",
        "task.loss=focal_tversky",
        "task.tversky_beta=0.8",
        "task.regions={whole: [1, 2], core: [1]}",
    ]
    recipe = validate(FinetuneRecipe, TINY, overrides)
    run = finetune(recipe, small_store, tiny_backbone, "mask", tmp_path / "run", quiet=True)
    config = json.loads((run / "run.json").read_text())["target"]
    assert (config["names"], config["regions"]) == (["whole", "core"], [[1, 2], [1]])
    scores = json.loads((run / "scores.json").read_text())
    for part in ("scores", "trivial"):
        assert {"dice", "dice(whole)", "dice(core)"} <= set(scores[part])
    cases = pd.read_csv(run / "cases.tsv", sep="\t")
    assert {"dice", "dice(whole)", "dice(core)"} <= set(cases.columns)
    # Both regions are of code 1 here: the same truth, and a baseline that gets the same.
    assert scores["trivial"]["dice(whole)"] == scores["trivial"]["dice(core)"] == scores["trivial"]["dice"]
    assert evaluate(run, small_store)[0].to_dict()["scores"] == pytest.approx(scores["scores"])

    predictor = brainfound.load(run)
    model = predictor.model.get_base_model().config
    assert (model.decoder, model.segmentation_loss, model.tversky_beta) == ("unetr", "focal_tversky", 0.8)
    assert (model.overlapping_labels, model.num_labels, model.decoder_slice_mixing) == (True, 2, True)
    prediction = predictor.predict_stack(small_store[0])
    assert set(prediction.masks) == {"whole", "core"}
    assert prediction.answer["regions"] == {"whole": [1, 2], "core": [1]}
    card = (run / "export" / "README.md").read_text()
    assert "focal Tversky" in card


def test_exclusive_regions_answer_with_one_label_map(small_store, tiny_backbone, tmp_path):
    (tmp_path / "lut.tsv").write_text("code\tname\n1\tLesion-Left\n")
    overrides = ["task.regions={left_lesion: [lesion_left]}", "task.exclusive=true", "engine.steps=1"]
    overrides.append(f"task.lookup_table={tmp_path / 'lut.tsv'}")
    recipe = validate(FinetuneRecipe, TINY, overrides)
    run = finetune(recipe, small_store, tiny_backbone, "mask", tmp_path / "run", quiet=True)
    predictor = brainfound.load(run)
    assert predictor.model.get_base_model().config.overlapping_labels is False
    prediction = predictor.predict_stack(small_store[0])
    assert prediction.answer["labels"] == {"0": "background", "1": "left_lesion"}
    assert prediction.answer["regions"] == {"left_lesion": [1]}
    assert set(np.unique(prediction.image.dataobj)) <= {0, 1}
    assert not prediction.masks


def test_each_region_is_scored_with_its_own_mask(small_store, monkeypatch):
    """Two regions of one code: the first is found exactly, the second where it is not."""
    target = OverlappingSegmentation("mask", names=("found", "missed"), regions=((1,), (1,)))
    sessions = [index for index in range(len(small_store)) if small_store[index].mask.any()]

    def answer(model, stack, num_slices):
        labels = np.stack([stack.mask == 1, stack.mask != 1], axis=1)
        return StackPrediction(labels=labels, foreground_probability=labels.any(axis=1).astype(np.float32))

    monkeypatch.setattr("brainfound.finetuning.scoring.infer", answer)
    scored = score_sessions(torch.nn.Identity(), small_store, sessions, target, None)
    overlaps = {name: value for name, value in scored.scores.items() if name.startswith("dice")}
    assert overlaps == {"dice": 0.5, "dice(found)": 1.0, "dice(missed)": 0.0}
    assert scored.cases["dice(found)"].tolist() == [1.0] * len(sessions)
    assert scored.cases["dice(missed)"].tolist() == [0.0] * len(sessions)
    assert scored.cases["reference_pixels"].tolist() == [int(small_store[i].mask.sum()) for i in sessions]
    assert scored.trivial["dice(found)"] == scored.trivial["dice(missed)"] > 0


def test_each_of_several_classes_is_scored_over_the_sessions_that_have_it(small_store, monkeypatch):
    """The first class is found exactly; the second one session has, in which it is missed, and another is given."""
    target = Segmentation("mask", names=("background", "found", "missed"), codes=(0, 1, 2))
    first, second = [index for index in range(len(small_store)) if small_store[index].mask.any()][:2]

    def with_corner(mask: np.ndarray, code: int) -> np.ndarray:
        changed = mask.copy()
        changed[0, 0, 0] = code
        return changed

    references = iter([with_corner(small_store[first].mask, 2), small_store[second].mask])

    def answer(session, stack):
        return StackPrediction(classes=stack.mask if session == first else with_corner(stack.mask, 2))

    monkeypatch.setattr(Segmentation, "encode_mask", lambda self, mask: next(references))
    scored = score_predictions(answer, small_store, [first, second], target)
    overlaps = {name: value for name, value in scored.scores.items() if name.startswith("dice")}
    assert overlaps == {"dice": 0.5, "dice(found)": 1.0, "dice(missed)": 0.0}
    assert scored.scores["clean_negatives"] == 0.0
    assert scored.cases["dice"].tolist() == [0.5, 1.0]
    assert np.isnan(scored.cases["dice(missed)"]).tolist() == [False, True]
    assert scored.trivial["dice(found)"] > scored.trivial["dice(missed)"] == 0  # that pixel is outside of the head
    assert scored.with_intervals().intervals["dice"].num_subjects == 2
    assert compute_headline_score("segmentation", scored.cases) == 0.5


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("task.decoder=unet", "linear, fpn, unetr"),
        ("task.loss=dicee", "task.loss"),
        ("task.tversky_gamma=0.5", "tversky_gamma"),
        ("task.regions={whole: tumour}", "regions"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(small_store, tiny_backbone, tmp_path, override, told):
    with pytest.raises(RecipeError, match=told):
        finetune("finetune-segmentation", small_store, tiny_backbone, "mask", tmp_path / "run", overrides=[override])
    assert not (tmp_path / "run").exists()


SURFACES = {"surface_dice", "hd95_mm", "lesion_f1", "volume_error_mm3"}


def test_surfaces_and_empty_masks_are_scored_where_they_are_requested(small_store, tiny_backbone, tmp_path):
    overrides = ["task.scoring.surface_mm=2", "task.scoring.empty=one", "frozen_baseline=true", "evaluate_every=0"]
    run = finetune(
        validate(FinetuneRecipe, TINY, overrides), small_store, tiny_backbone, "mask", tmp_path / "run", quiet=True
    )
    scores = json.loads((run / "scores.json").read_text())
    for part in ("scores", "frozen"):
        assert SURFACES | {"dice"} <= set(scores[part])
    assert not SURFACES & set(scores["trivial"])
    # The bundle remembers how its run scored, and an evaluation may ask for something else.
    (again,) = evaluate(run / "export", small_store)
    assert again.to_dict()["scores"] == pytest.approx(scores["scores"])
    assert again.to_dict()["frozen"] == pytest.approx(scores["frozen"])
    (left_out,) = evaluate(run, small_store, empty="left_out")
    mine, theirs = (result.cases["dice"].notna().sum() for result in (left_out, again))
    assert mine < theirs == len(again.cases), "sessions without a lesion are among them"
    assert again.cases.loc[left_out.cases["dice"].isna(), "dice"].isin([0.0, 1.0]).all()
    (strict,) = evaluate(run, small_store, surface_mm=0)
    assert strict.scores["surface_dice"] <= again.scores["surface_dice"]
    case = again.cases[again.cases["reference_pixels"] > 0].iloc[0]
    stack = small_store[int(case["row"])]
    found = infer(brainfound.load(run).model, stack).classes
    expected = segmentation_case_scores(stack.mask, found, tuple(stack.spacing_mm), 2.0)
    assert {name: case[name] for name in SURFACES} == pytest.approx({name: expected[name] for name in SURFACES})


def test_surfaces_are_of_segmentations_only(small_store, tiny_backbone, tmp_path):
    content = {name: value for name, value in TINY.items() if name != "task"}
    recipe = validate(FinetuneRecipe, content, ["evaluate_every=0"])
    with pytest.raises(RecipeError, match="the setting 'scoring' needs the kind of the task"):
        finetune(
            validate(FinetuneRecipe, content, ["task.scoring.surface_mm=1"]), small_store, tiny_backbone, "age_years",
            tmp_path / "refused", quiet=True,
        )  # fmt: skip
    run = finetune(recipe, small_store, tiny_backbone, "age_years", tmp_path / "run", quiet=True)
    with pytest.raises(UsageError, match="surface_mm: surfaces and empty masks are for segmentations"):
        evaluate(run, small_store, surface_mm=1)
