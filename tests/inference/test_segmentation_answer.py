"""What a segmentation writes: label maps, masks of overlapping labels, probabilities, and what its options do."""

from __future__ import annotations

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfound.data.label_names import mirrored_channels
from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import UsageError
from brainfound.finetuning.tasks.segmentation import OverlappingSegmentation, Segmentation
from brainfound.inference.cohort import predict
from brainfound.inference.predictor import Predictor
from brainfound.inference.segmentation import SegmentationOptions, build_segmentation_fields
from brainfound.models import BrainFoundForSegmentation
from brainfound.models.stack_prediction import StackPrediction, infer

CLASSES = Segmentation("mask", names=("background", "label 2", "label 5"), codes=(0, 2, 5))
REGIONS = OverlappingSegmentation("mask", names=("whole", "core"), regions=((2, 5), (5,)))


@pytest.fixture
def stack() -> Stack:
    """Slices of 3 mm with pixels of 1 × 2 mm, on the scan's own grid."""
    affine = np.diag([1.0, 2.0, 3.0, 1.0])  # columns, rows, slices of the scan
    to_scan = np.zeros((4, 4))
    to_scan[[0, 1, 2, 3], [2, 1, 0, 3]] = 1
    return Stack(
        pixels=np.zeros((6, 1, 8, 8), dtype=np.uint8),
        contrasts=("T1w",),
        present=np.array([True]),
        positions_mm=np.arange(6, dtype=np.float32),
        affine=affine @ to_scan,
        native_shape=(8, 8, 6),
        native_affine=affine,
    )


@pytest.fixture
def blobs() -> np.ndarray:
    """Classes (S, H, W): pieces of class 1 with 8 and 1 pixels, and of class 2 with 3 and 2; 6 mm³ each pixel."""
    classes = np.zeros((6, 8, 8), dtype=np.uint8)
    classes[1:3, 1:3, 1:3] = 1
    classes[5, 7, 7] = 1
    classes[2:5, 5, 5] = 2
    classes[0, 5, 1:3] = 2
    return classes


def answer_of(classes) -> StackPrediction:
    probabilities = np.moveaxis(np.eye(3, dtype=np.float32)[classes] * 0.7 + 0.1, -1, 1)
    return StackPrediction(
        classes=classes, foreground_probability=1 - probabilities[:, 0], class_probabilities=probabilities
    )


def test_small_pieces_leave_the_map_and_the_volumes_but_not_the_probabilities(stack, blobs):
    whole = build_segmentation_fields(stack, answer_of(blobs), CLASSES, SegmentationOptions())
    assert whole["answer"]["volumes_mm3"] == {"label 2": 54.0, "label 5": 30.0}
    assert "removed_components" not in whole["answer"]
    np.testing.assert_array_equal(np.asarray(whole["image"].dataobj).transpose(2, 1, 0), CLASSES.decode_mask(blobs))
    cleaned = build_segmentation_fields(stack, answer_of(blobs), CLASSES, SegmentationOptions(min_volume_mm3=18.0))
    assert cleaned["answer"]["volumes_mm3"] == {"label 2": 48.0, "label 5": 18.0}
    assert cleaned["answer"]["removed_components"] == {"label 2": 1, "label 5": 1}
    assert cleaned["answer"]["min_volume_mm3"] == 18.0
    codes = np.asarray(cleaned["image"].dataobj)
    assert {code: int((codes == code).sum()) for code in (2, 5)} == {2: 8, 5: 3}
    np.testing.assert_array_equal(cleaned["image"].affine, stack.native_affine)
    for key in ("2", "5"):
        np.testing.assert_array_equal(
            np.asarray(cleaned["probabilities"][key].dataobj), np.asarray(whole["probabilities"][key].dataobj)
        )


def test_each_class_has_its_own_probability(stack, blobs):
    fields = build_segmentation_fields(stack, answer_of(blobs), CLASSES, SegmentationOptions())
    assert list(fields["probabilities"]) == ["2", "5"]
    of_two = np.asarray(fields["probabilities"]["2"].dataobj).transpose(2, 1, 0)
    np.testing.assert_allclose(of_two, np.where(blobs == 1, 0.8, 0.1), atol=1e-6)


def test_overlapping_labels_become_masks(stack, blobs):
    labels = np.stack([blobs > 0, blobs == 2], axis=1)
    answer = StackPrediction(labels=labels, foreground_probability=labels.any(axis=1).astype(np.float32))
    fields = build_segmentation_fields(stack, answer, REGIONS, SegmentationOptions(min_volume_mm3=13.0))
    assert "image" not in fields
    assert fields["answer"]["regions"] == {"whole": [2, 5], "core": [5]}
    assert fields["answer"]["volumes_mm3"] == {"whole": 66.0, "core": 18.0}
    assert fields["answer"]["removed_components"] == {"whole": 2, "core": 1}
    assert set(np.unique(np.asarray(fields["masks"]["core"].dataobj))) == {0, 1}


def segmenter_of(target, store, backbone, **config) -> Predictor:
    torch.manual_seed(0)
    model = BrainFoundForSegmentation.from_backbone(
        backbone, contrasts=store.contrasts, decoder_width=8, id2label=dict(enumerate(target.names)), **config
    )
    return Predictor(model, store.preprocessing, target)


def test_a_cohort_gets_one_file_for_each_region(small_store, tiny_backbone, tmp_path):
    predictor = segmenter_of(REGIONS, small_store, tiny_backbone, overlapping_labels=True)
    source = small_store.path.parent / "source"
    outcomes = predict(predictor, source, tmp_path, probabilities=True)
    names = {path.name.removeprefix("s00_ses-1") for path in tmp_path.glob("s00*")}
    assert names == {".json", "_probability.nii.gz"} | {
        f"_label-{region}_{kind}.nii.gz" for region in ("whole", "core") for kind in ("mask", "probability")
    }
    content = json.loads((tmp_path / "s00_ses-1.json").read_text())
    for region in ("whole", "core"):
        mask = nib.load(tmp_path / f"s00_ses-1_label-{region}_mask.nii.gz")
        probability = nib.load(tmp_path / f"s00_ses-1_label-{region}_probability.nii.gz")
        np.testing.assert_array_equal(mask.affine, nib.load(source / "s00_T1w.nii.gz").affine)
        assert mask.shape == probability.shape
        assert content["volumes_mm3"][region] == pytest.approx(int(np.asarray(mask.dataobj).sum()) * 27.0, rel=1e-5)
    assert not any((tmp_path / f"{name}_dseg.nii.gz").exists() for name in ("s00_ses-1", "s01_ses-1"))
    # What lies in files is not kept: the volumes of a whole cohort would fill the memory.
    assert all(outcome.result.masks == outcome.result.probabilities == {} for outcome in outcomes)
    assert outcomes[0].result.probability is None
    assert outcomes[0].result.answer["volumes_mm3"] == content["volumes_mm3"]


def test_one_class_has_one_probability(segmenter, source, tmp_path):
    scans = [source / f"s01_{contrast}.nii.gz" for contrast in ("T1w", "T2w", "FLAIR")]
    asked = segmenter.with_options(SegmentationOptions(class_probabilities=True)).predict(*scans)
    assert asked.probabilities == {}
    assert [path.name for path in asked.save(tmp_path, "case", probabilities=True)] == [
        "case_dseg.nii.gz",
        "case_probability.nii.gz",
        "case.json",
    ]


def test_averaging_is_done_and_reported(segmenter, small_store):
    stack = small_store[0]
    plain = segmenter.predict_stack(stack)
    assert "averaged" not in plain.answer
    averaged = segmenter.with_options(SegmentationOptions(flips=True, overlap=True)).predict_stack(stack)
    assert averaged.answer["averaged"] == ["flips", "overlap"]
    assert not np.allclose(np.asarray(averaged.probability.dataobj), np.asarray(plain.probability.dataobj), atol=1e-4)


@pytest.mark.parametrize(
    ("names", "channels"),
    [
        (("ventricleL", "ventricleR", "stem"), (1, 0, 2)),
        (("background", "Right-Putamen", "Left-Putamen"), (0, 2, 1)),
        (("lhcortex", "rhcortex", "LEFTthalamus", "RIGHTthalamus"), (1, 0, 3, 2)),
        (("VR", "VL"), (1, 0)),
        (("putamenleft", "putamenright", "bright"), (1, 0, 2)),
        (("NCR", "ED", "ET", "lesion", "tumor"), (0, 1, 2, 3, 4)),
        (("background", "label 4", "label 43"), (0, 1, 2)),
    ],
)
def test_labels_of_two_sides_are_each_other_s_mirror_image(names, channels):
    assert mirrored_channels(names) == channels


@pytest.mark.parametrize("names", [("caudateR", "stem"), ("left caudate",), ("LL", "LR", "RL")])
def test_sides_that_cannot_be_exchanged_are_refused(small_store, tiny_backbone, names):
    target = OverlappingSegmentation("mask", names=names, regions=((2,),) * len(names))
    predictor = segmenter_of(target, small_store, tiny_backbone, overlapping_labels=True)
    with pytest.raises(UsageError, match="names a side, and (no label is|two labels are) its mirror image") as caught:
        predictor.with_options(SegmentationOptions(flips=True))
    assert "\n" not in str(caught.value)


def test_labels_that_name_a_side_are_exchanged_in_mirrored_slices(small_store, tiny_backbone):
    target = OverlappingSegmentation("mask", names=("coreL", "coreR"), regions=((2,), (5,)))
    predictor = segmenter_of(target, small_store, tiny_backbone, overlapping_labels=True)
    augmentation = SegmentationOptions(flips=True).augmentation(target)
    stack = small_store[1]
    mirrored = replace(stack, pixels=np.ascontiguousarray(stack.pixels[..., ::-1]))
    here, there = (
        infer(predictor.model, one, None, augmentation, True).class_probabilities for one in (stack, mirrored)
    )
    np.testing.assert_allclose(there, here[:, ::-1, :, ::-1], atol=1e-5)
    assert not np.allclose(here[:, 0], here[:, 1], atol=1e-3)


def test_codes_without_names_may_have_a_side(small_store, tiny_backbone):
    predictor = segmenter_of(CLASSES, small_store, tiny_backbone)
    flipped = predictor.with_options(SegmentationOptions(flips=True)).predict_stack(small_store[0])
    assert any("wrong for codes without a name that stand for one side" in note for note in flipped.notes)
    assert not any("side" in note for note in predictor.predict_stack(small_store[0]).notes)


def test_options_of_a_segmentation_are_refused_elsewhere(run, encoder_export):
    from brainfound.inference.loading import load

    for model in (run, encoder_export):
        with pytest.raises(UsageError, match="are for segmentations"):
            load(model, options=SegmentationOptions(flips=True))
    for volume in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="at least 0"):
            SegmentationOptions(min_volume_mm3=volume)
