"""Labels as numbers, learnt on the training part alone."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest

from brainfound.errors import RecipeError, UsageError
from brainfound.finetuning.recipe import FinetuneRecipe, require_effective_settings
from brainfound.finetuning.splits import make_split
from brainfound.finetuning.tasks import (
    Classification,
    Regression,
    Segmentation,
    SegmentationRecipe,
    TargetColumn,
    from_dict,
    resolve,
)
from brainfound.finetuning.tasks.base import VolumeScorer, target_columns
from brainfound.finetuning.tasks.classification import MultiLabelClassification
from brainfound.finetuning.tasks.segmentation import ExclusiveSegmentation, OverlappingSegmentation
from brainfound.metrics.registry import task_metrics
from brainfound.models.stack_prediction import StackPrediction
from brainfound.recipes import validate


@pytest.fixture
def sessions(small_store, monkeypatch):
    """Put columns beside the store's own ones for the time of a test."""

    def put(**columns):
        for name, values in columns.items():
            monkeypatch.setitem(small_store.sessions, name, values)
        return small_store

    return put


def kind(store, target: str) -> str:
    return resolve(store, range(len(store)), target).kind


def test_tasks_are_guessed_from_the_labels(sessions):
    store = sessions(score=[0, 1, 2] * 4)
    assert kind(store, "mask") == "segmentation"
    assert kind(store, "age_years") == "regression"
    assert kind(store, "diagnosis") == "classification"
    assert kind(store, "score") == "classification"


def test_sessions_without_a_label_are_left_out(sessions):
    store = sessions(score=[1.0, np.nan, np.inf, 4.0] + [np.nan] * 8, word=["a", None] * 6, nothing=[np.nan] * 12)
    assert TargetColumn.find(store, "score").labelled.tolist() == [0, 3]
    assert TargetColumn.find(store, "word").labelled.tolist() == list(range(0, 12, 2))
    assert TargetColumn.find(store, "mask").labelled.tolist() == list(range(12))
    with pytest.raises(UsageError, match="empty"):
        TargetColumn.find(store, "nothing")
    with pytest.raises(UsageError, match="no_such"):
        TargetColumn.find(store, "no_such")


def test_mean_and_deviation_are_of_the_training_part(small_store):
    target = resolve(small_store, [0, 1, 2], "age_years", "regression")
    ages = small_store.sessions["age_years"].iloc[:3]
    assert target.mean == pytest.approx(ages.mean())
    assert target.std == pytest.approx(ages.std(ddof=0))
    assert target.values(small_store, [2, 0]).tolist() == [ages.iloc[2], ages.iloc[0]]


def test_classes_are_of_the_training_part(sessions):
    store = sessions(kind=["b", "a"] * 5 + ["c", "c"], code=[1.0, 0.0] * 6)
    target = resolve(store, range(10), "kind", "classification")
    assert target.names == ("a", "b")
    assert target.values(store, [0, 1]).tolist() == [1, 0]
    with pytest.raises(UsageError, match="'c' is not among"):
        target.values(store, [11])
    assert resolve(store, range(10), "code", "classification").names == ("0", "1")
    with pytest.raises(UsageError, match="two classes"):
        resolve(store, [0, 2], "kind", "classification")


def test_several_columns_are_labels_of_their_own(sessions):
    edema, lesion = [0, 1, 1, 0] * 3, [True, False, True, True] * 3
    store = sessions(edema=edema, lesion=lesion, word=["a", "b"] * 6, never=0, gap=[1.0, np.nan, 0.0] * 4)
    assert kind(store, "edema,lesion") == "classification"
    target = resolve(store, range(8), " edema, lesion", "classification")
    assert target == MultiLabelClassification("edema,lesion", ("edema", "lesion"), target.shares)
    assert target.values(store, [1, 2, 3]).tolist() == [[1, 0], [1, 1], [0, 1]]
    assert from_dict(target.to_dict()) == target
    assert TargetColumn.find(store, "edema,gap").labelled.tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    assert target_columns(store, "edema") == ("edema",)
    with pytest.raises(UsageError, match="word: a label among several must be 0 or 1 .got 'a'"):
        resolve(store, range(8), "edema,word", "classification")
    with pytest.raises(UsageError, match="never: a label needs sessions with it"):
        resolve(store, range(8), "edema,never", "classification")
    with pytest.raises(UsageError, match="a regression has one column"):
        resolve(store, range(8), "edema,lesion", "regression")
    with pytest.raises(UsageError, match="edemma"):
        resolve(store, range(8), "edemma,lesion", "classification")
    # A column whose name has a comma is itself.
    odd = sessions(**{"edema,lesion": ["a", "b"] * 6})
    assert not isinstance(resolve(odd, range(8), "edema,lesion", "classification"), MultiLabelClassification)


def test_combinations_of_labels_are_spread_over_the_parts(sessions):
    store = sessions(edema=[0, 0, 1, 1] * 3, lesion=[0, 1, 0, 1] * 3)
    split = make_split(store, target="edema,lesion", test=1 / 3, validation=1 / 3)
    assert split.counts["single"]["test"]["edema"] == {"0": 2, "1": 2}
    members = split.sessions(store)
    pairs = store.sessions[["edema", "lesion"]].to_numpy()
    for index in members.values():
        assert sorted(pairs[index].tolist()) == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_regression_of_words_or_of_a_constant_is_refused(sessions):
    store = sessions(same=2.5)
    with pytest.raises(UsageError, match="numeric"):
        resolve(store, range(12), "diagnosis", "regression")
    with pytest.raises(UsageError, match="constant"):
        resolve(store, range(12), "same", "regression")


CLASSES = Segmentation("mask", names=("background", "label 3", "label 9"), codes=(0, 3, 9))


def test_a_word_among_numbers_is_reported_in_any_part(sessions):
    store = sessions(size=["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "unknown"])
    target = resolve(store, list(range(6)), "size", "regression")
    assert target.values(store, [6, 7]).tolist() == [7.0, 8.0]
    with pytest.raises(UsageError, match=r"must be numeric.*'unknown'"):
        target.values(store, [10, 11])


def test_what_the_training_part_says_of_everybody_is_remembered(sessions):
    store = sessions(kind=["a"] * 3 + ["b"] * 9, ill=[0, 1] * 6, old=[0] * 9 + [1] * 3)
    assert resolve(store, [0, 1, 2, 3], "kind", "classification").shares == (0.75, 0.25)
    assert resolve(store, list(range(12)), "ill,old", "classification").shares == (0.5, 0.25)


def test_label_codes_go_to_classes_and_back():
    target = CLASSES
    mask = np.array([[0, 3], [9, 3]], dtype=np.uint8)
    assert target.encode_mask(mask).tolist() == [[0, 1], [2, 1]]
    assert np.array_equal(target.decode_mask(target.encode_mask(mask)), mask)
    # A code that training never saw is background.
    assert target.encode_mask(np.array([5, 12, 9])).tolist() == [0, 0, 2]
    merged = Segmentation("mask", names=("background", "foreground"), codes=(0, 1), merge=True)
    assert merged.encode_mask(np.array([0, 4, 200])).tolist() == [0, 1, 1]


def test_more_than_256_classes_keep_their_codes():
    codes = (0, *range(1001, 1300))
    task = Segmentation("mask", names=tuple(f"label {code}" for code in codes), codes=codes)
    mask = np.array([[[0, 1001, 1256, 1257, 1299, 77]]], dtype=np.uint16)
    encoded = task.encode_mask(mask)
    assert encoded.tolist() == [[[0, 1, 256, 257, 299, 0]]]
    assert task.loss_labels(None, mask).max() == 299
    assert task.decode_mask(encoded).tolist() == [[[0, 1001, 1256, 1257, 1299, 0]]]
    assert task.decode_mask(np.array([[[1]]], dtype=np.uint8)).dtype == np.uint16
    marked = np.zeros((1, 299, 1, 2))
    marked[0, 298, 0, 1] = 0.9
    assert task.patch_answer(marked).tolist() == [[[0, 299]]]


def test_regions_are_made_of_codes_and_may_overlap():
    target = OverlappingSegmentation("mask", names=("whole", "core"), regions=((1, 2, 4), (1, 4)))
    mask = np.array([[[0, 1], [2, 4]], [[9, 0], [2, 2]]], dtype=np.uint8)
    encoded = target.encode_mask(mask)
    assert encoded.shape == (2, 2, 2, 2)
    assert encoded[:, 0].tolist() == [[[0, 1], [1, 1]], [[0, 0], [1, 1]]]
    assert encoded[:, 1].tolist() == [[[0, 1], [0, 1]], [[0, 0], [0, 0]]]
    assert np.array_equal(target.encode_mask(mask[None])[0], encoded)
    assert from_dict(json.loads(json.dumps(target.to_dict()))) == target
    assert from_dict({k: v for k, v in CLASSES.to_dict().items() if k != "regions"}) == CLASSES


def test_regions_may_exclude_each_other():
    codes = ((4, 43), (17,))
    target = ExclusiveSegmentation("mask", ("background", "ventricles", "hippocampus_left"), (0, 1, 2), regions=codes)
    mask = np.array([[[0, 4], [43, 17]], [[9, 0], [2, 1000]]], dtype=np.uint16)
    encoded = target.encode_mask(mask)
    assert encoded.tolist() == [[[0, 1], [1, 2]], [[0, 0], [0, 0]]]
    assert target.decode_mask(encoded).tolist() == encoded.tolist()
    assert target.region_codes == {"ventricles": [4, 43], "hippocampus_left": [17]}
    assert target.unknown_codes(mask) == []
    assert from_dict(json.loads(json.dumps(target.to_dict()))) == target
    assert target.config_fields(None)["overlapping_labels"] is False


def test_names_come_from_a_lookup_table(small_store, tmp_path):
    (tmp_path / "lut.txt").write_text("0 Unknown 0 0 0 0\n1 Left-Lesion 1 2 3 0\n2 Right-Lesion 1 2 3 0\n")
    table = {"lookup_table": str(tmp_path / "lut.txt")}
    plain = resolve(small_store, [0, 1], "mask", SegmentationRecipe(**table))
    assert plain.names == ("background", "Left-Lesion")
    own = validate(SegmentationRecipe, {**table, "regions": {"lesion": ["lesion_left", 2]}, "exclusive": True})
    grouped = resolve(small_store, [0, 1], "mask", own)
    assert (grouped.names, grouped.regions, grouped.codes) == (("background", "lesion"), ((1, 2),), (0, 1))
    with pytest.raises(UsageError, match="Did you mean Left-Lesion"):
        resolve(small_store, [0, 1], "mask", SegmentationRecipe(**table, regions={"a": ["Left-Lezion"]}))
    with pytest.raises(UsageError, match="the code 1 is in a too"):
        resolve(small_store, [0, 1], "mask", SegmentationRecipe(regions={"a": [1], "b": [1, 2]}, exclusive=True))
    with pytest.raises(RecipeError, match="exclusive has no effect without regions"):
        validate(SegmentationRecipe, {"exclusive": True})


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (("lesion",), None),
        (("edema", "core"), None),
        (("label 1", "label 2"), "no names.*lookup_table"),
        (("hippocampus_left", "hippocampus_right"), "name a side.*Leave flip_left_right out"),
        (("hippocampus_left",), "name a side"),
    ],
)
def test_labels_of_one_side_are_not_mirrored_in_training(names, fault):
    recipe = validate(FinetuneRecipe, {"task": "segmentation", "augmentation": {"flip_left_right": 0.5}})
    task = Segmentation("mask", names=("background", *names), codes=tuple(range(len(names) + 1)))
    with nullcontext() if fault is None else pytest.raises(RecipeError, match=fault):
        require_effective_settings(recipe, task)


@pytest.mark.parametrize(
    ("regions", "told"),
    [
        ({"whole": [1], "core": []}, "regions.*core is"),
        ({"whole": [0, 1]}, "codes above 0"),
        ({"../x": [1]}, "letters, digits"),
        ({"ventricle_left": [1], "ventricleLeft": [1]}, "same file name"),
        ({"hippocampus": ["Left-Hippocampus"]}, "no table of names"),
        ({"whole": [1], "core": [3, 4]}, "no mask of the training part"),
    ],
)
def test_regions_that_cannot_be_learnt_are_named(small_store, regions, told):
    with pytest.raises(UsageError, match=told):
        resolve(small_store, [0, 1], "mask", validate(SegmentationRecipe, {"regions": regions}))


def test_regions_are_for_codes_of_a_mask(small_store):
    target = resolve(small_store, [0, 1], "mask", SegmentationRecipe(regions={"all": [2, 1, 1]}))
    assert (target.names, target.regions, target.codes) == (("all",), ((1, 2),), ())
    with pytest.raises(UsageError, match="only the mask"):
        resolve(small_store, [0, 1], "diagnosis", SegmentationRecipe(regions={"all": [1]}))
    with pytest.raises(UsageError, match="merge_codes"):
        resolve(small_store, [0, 1], "mask", SegmentationRecipe(merge_codes=True, regions={"all": [1]}))


def test_masks_of_the_training_part_give_the_codes(small_store):
    target = resolve(small_store, [0, 1], "mask", "segmentation")
    assert target.codes == (0, 1)
    with pytest.raises(UsageError, match="every mask"):
        resolve(small_store, [0, 2], "mask", "segmentation")


def test_plain_values_round_trip(small_store):
    for task, column in (("classification", "diagnosis"), ("regression", "age_years"), ("segmentation", "mask")):
        target = resolve(small_store, range(12), column, task)
        assert from_dict(target.to_dict()) == target


def trivial_scores(task, truths, answer):
    scorer = VolumeScorer(task, truths)
    for _ in truths:
        scorer.add(None, answer)
    return scorer.result().trivial


def test_the_trivial_answer_comes_from_the_training_part_alone():
    classes = Classification("diagnosis", ("no", "yes"), (2 / 3, 1 / 3))
    guess = trivial_scores(classes, [0, 1, 1], StackPrediction(probabilities=np.array([0.0, 1.0])))
    assert (guess["auroc"], guess["balanced_accuracy"], guess["mcc"]) == (0.5, 0.5, 0.0)
    assert guess["auprc"] == pytest.approx(2 / 3), "the share of positives"
    assert guess["macro_f1"] == pytest.approx((2 / 4 + 0) / 2)
    mean = trivial_scores(Regression("age_years", mean=15.0), [14.0, 18.0], StackPrediction(value=14.0))
    assert mean["mae"] == pytest.approx((1 + 3) / 2)
    assert mean["r2"] == pytest.approx(1 - (1 + 9) / 8)
    assert np.isnan(mean["pearson"])


def test_the_trivial_answer_of_several_labels():
    truths, names = [[1, 0, 0], [1, 1, 0], [0, 1, 0]], ("edema", "lesion", "bleed")
    task = MultiLabelClassification(",".join(names), names, (2 / 3, 2 / 3, 0.0))
    scores = trivial_scores(task, truths, StackPrediction(probabilities=np.array([0.5, 0.5, 0.5])))
    assert scores["auroc"] == scores["balanced_accuracy(edema)"] == 0.5
    assert np.isnan(scores["auroc(bleed)"]), "nobody has it"


def test_a_bundle_without_shares_has_no_trivial_scores():
    task = Classification("diagnosis", ("no", "yes"))
    scores = trivial_scores(task, [0, 1], StackPrediction(probabilities=np.array([0.5, 0.5])))
    assert list(scores) == [metric.name for metric in task_metrics("classification")]
    assert np.isnan(list(scores.values())).all()
