"""From files to answers."""

from __future__ import annotations

import copy
import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfound.data.given_scans import parse_inputs
from brainfound.errors import ModelError, ScanError, UsageError
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.inference.cohort import predict
from brainfound.inference.evaluation import evaluate
from brainfound.inference.loading import load
from brainfound.inference.prediction import file_stem
from brainfound.inference.predictor import Predictor
from brainfound.inference.segmentation import SegmentationOptions
from brainfound.models.stack_prediction import StackPrediction
from brainfound.recipes import validate

CONTRASTS = ("T1w", "T2w", "FLAIR")


def scans(source, subject="s01", contrasts=CONTRASTS):
    return {contrast: source / f"{subject}_{contrast}.nii.gz" for contrast in contrasts}


def test_names_and_keywords_say_the_contrast(predictor, source, tmp_path):
    files = scans(source)
    by_name = predictor.predict(*files.values())
    odd = {
        contrast: shutil.copy(file, tmp_path / f"scan{n}.nii.gz") for n, (contrast, file) in enumerate(files.items())
    }
    by_keyword = predictor.predict(t1=odd["T1w"], T2=odd["T2w"], flair=odd["FLAIR"])
    assert by_keyword.answer == by_name.answer
    assert by_name.contrasts == CONTRASTS
    assert by_name.missing == ()
    assert set(by_name.answer["probabilities"]) == {"healthy", "patient"}
    assert sum(by_name.answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    swapped = predictor.predict(T1w=odd["FLAIR"], T2w=odd["T2w"], FLAIR=odd["T1w"])
    assert swapped.answer != by_name.answer


def test_a_missing_contrast_is_reported(predictor, source):
    full, part = predictor.predict(*scans(source).values()), predictor.predict(FLAIR=scans(source)["FLAIR"])
    assert part.contrasts == ("FLAIR",)
    assert part.missing == ("T1w", "T2w")
    assert part.to_dict()["missing_contrasts"] == ["T1w", "T2w"]
    assert part.answer["probabilities"] != full.answer["probabilities"]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_model_that_never_learnt_without_a_contrast_says_so(small_store, tiny_backbone, source, tmp_path, dropout):
    """Such answers were off by up to 200 years of age on phantoms, and nothing told."""
    content = {
        "num_slices": 4, "head_fit_passes": 0, "frozen_baseline": False, "evaluate_every": 0,
        "augmentation": {"contrast_dropout": dropout}, "split": {"train": 0.5, "validation": 0.2, "test": 0.3},
        "engine": {"steps": 1, "batch_size": 4, "precision": "no"},
    }  # fmt: skip
    recipe = validate(FinetuneRecipe, content)
    predictor = load(finetune(recipe, small_store, tiny_backbone, "diagnosis", tmp_path / "run", quiet=True))
    files = scans(source)
    needed = predictor.contract.never_absent
    assert bool(needed) == (dropout == 0)
    part = predictor.predict(FLAIR=files["FLAIR"])
    said = [note for note in part.notes if "never learnt to do without" in note]
    assert [note.split()[0] for note in said] == [contrast for contrast in needed if contrast != "FLAIR"]
    assert not [note for note in predictor.predict(*files.values()).notes if "never learnt to do without" in note]
    (scored,) = evaluate(tmp_path / "run", small_store, without=["FLAIR"], out=tmp_path / "page")
    warning = [note for note in scored.notes if note.startswith(f"FLAIR is missing in {len(scored.cases)} of")]
    assert bool(warning) == ("FLAIR" in needed)
    assert all(note in (tmp_path / "page" / "report.md").read_text() for note in warning)
    assert scored.to_dict().get("notes", []) == list(scored.notes)


def test_what_cannot_be_requested(predictor, source, tmp_path):
    files = scans(source)
    odd = shutil.copy(files["T1w"], tmp_path / "scan.nii.gz")
    with pytest.raises(UsageError, match="was not trained with SWI"):
        predictor.predict(swi=odd)
    with pytest.raises(UsageError, match="two scans of T1w"):
        predictor.predict(files["T1w"], t1=odd)
    with pytest.raises(UsageError, match="file name does not state the contrast"):
        predictor.predict(odd)
    with pytest.raises(UsageError, match="no scan was given"):
        predictor.predict()
    with pytest.raises(ScanError):
        predictor.predict(T1w=tmp_path / "absent.nii.gz")


@pytest.mark.parametrize("session", [0, 5])
def test_use_prepares_scans_as_training_did(predictor, small_store, source, session):
    """The same session through files and through the store: the same pixels, so the same answer."""
    stack = small_store[session]
    from_store, from_files = predictor.predict_stack(stack), predictor.predict(**scans(source, stack.subject))
    assert from_files.answer["class"] == from_store.answer["class"]
    for name, probability in from_store.answer["probabilities"].items():
        assert from_files.answer["probabilities"][name] == pytest.approx(probability, abs=1e-6)


OBLIQUE = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])
AXES = {
    "RAS": np.diag([3.0, 3.0, 3.0]),
    "LPS": np.diag([-3.0, -3.0, 3.0]),
    "SPL": np.array([[0.0, 0.0, -3.0], [0.0, -3.0, 0.0], [3.0, 0.0, 0.0]]),
    "oblique": OBLIQUE @ np.diag([-3.0, 3.0, 4.0]),
}


@pytest.mark.parametrize("axes", AXES)
def test_segmentation_lies_on_the_input(segmenter, write_scan, head, centred, monkeypatch, axes):
    """A model that marks what is bright must mark the bright ball of the scan itself, however it is stored."""

    def bright(model, stack, *how):
        marked = stack.pixels[:, list(stack.contrasts).index("T1w")] > 200
        return StackPrediction(classes=marked.astype(np.uint8), foreground_probability=marked.astype(np.float32))

    shape = (42, 44, 40)
    affine = centred(shape, AXES[axes])
    lesion = head.lesion(shape, affine) > 0
    image = np.where(lesion, 600, head.image(shape, affine).clip(0, 200))
    path = write_scan("sub-1_T1w.nii.gz", image.astype(np.float32), affine=affine)
    monkeypatch.setattr("brainfound.inference.predictor.infer", bright)
    found = segmenter.predict(path)
    codes = np.asarray(found.image.dataobj)
    assert found.image.shape == shape
    np.testing.assert_array_equal(found.image.affine, nib.load(path).affine)
    assert set(np.unique(codes)) == {0, 7}
    assert 2 * ((codes == 7) & lesion).sum() / ((codes == 7).sum() + lesion.sum()) > 0.8
    voxel = abs(np.linalg.det(affine[:3, :3]))
    assert found.answer["volumes_mm3"] == {"lesion": pytest.approx((codes == 7).sum() * voxel)}
    assert found.probability.shape == shape


@pytest.mark.parametrize(("qform", "sform"), [(1, 1), (1, 0), (0, 4), (1, 4), (0, 0)])
def test_masks_carry_the_codes_of_the_scan(segmenter, write_scan, tmp_path, qform, sform):
    path = write_scan("sub-1_T1w.nii.gz", affine=None if qform or sform else np.diag([-3.0, 3, 3, 1]))
    image = nib.load(path)
    turned = np.array(image.affine)
    turned[:3, :3] = OBLIQUE @ turned[:3, :3]
    image.set_qform(turned if qform else None, qform)
    image.set_sform(image.affine if sform else None, sform)
    image.header["descrip"] = b"Jane Doe"
    nib.save(image, path)
    segmenter.predict(path).save(tmp_path, "case", probabilities=True)
    scan = nib.load(path)
    for ending in ("dseg", "probability"):
        mask = nib.load(tmp_path / f"case_{ending}.nii.gz")
        np.testing.assert_array_equal(mask.affine, scan.affine)
        assert (int(mask.header["qform_code"]), int(mask.header["sform_code"])) == (qform, sform)
        np.testing.assert_array_equal(mask.header.get_qform(), scan.header.get_qform())
        assert mask.header["descrip"] == b""
        assert mask.get_data_dtype() == (np.uint8 if ending == "dseg" else np.float32)


def test_saved_files_can_be_read(segmenter, predictor, source, tmp_path):
    written = segmenter.predict(*scans(source).values()).save(tmp_path / "out", "case")
    assert [path.name for path in written] == ["case_dseg.nii.gz", "case.json"]
    content = json.loads((tmp_path / "out" / "case.json").read_text())
    image = nib.load(written[0])
    count = int((np.asarray(image.dataobj) == 7).sum())
    assert content["volumes_mm3"]["lesion"] == pytest.approx(count * 27.0, rel=1e-5)
    assert content["labels"] == {"0": "background", "7": "lesion"}
    assert content["not_a_medical_device"] is True
    assert [path.name for path in predictor.predict(*scans(source).values()).save(tmp_path)] == ["s01_T1w.json"]
    assert not list(tmp_path.rglob(".*"))


def test_a_cohort_goes_past_failures_and_skips_what_is_done(predictor, source, tmp_path, monkeypatch):
    table = pd.read_csv(source / "manifest.tsv", sep="\t", dtype=str).query("subject in ('s00', 's01', 's02')")
    for file in table["path"]:
        shutil.copy(source / file, tmp_path / file)
    table.drop(columns="mask").to_csv(tmp_path / "manifest.tsv", sep="\t", index=False)
    for contrast in CONTRASTS:
        (tmp_path / f"s01_{contrast}.nii.gz").write_bytes(b"not an image")
    (tmp_path / "s02_T2w.nii.gz").write_bytes(b"not an image")
    seen = []
    outcomes = predict(predictor, tmp_path, tmp_path / "out", progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [outcome.result is None for outcome in outcomes] == [False, True, False]
    assert "no scan can be used" in outcomes[1].reason
    assert outcomes[2].result.missing == ("T2w",)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"s00_ses-1.json", "s02_ses-1.json"}
    assert json.loads((tmp_path / "out" / "s02_ses-1.json").read_text())["subject"] == "s02"

    asked = []

    def refuse(self, session):
        asked.append(session.subject)
        raise ScanError("refused")

    monkeypatch.setattr(type(predictor), "prepare", refuse)
    again = predict(predictor, tmp_path, tmp_path / "out")
    assert [outcome.reason for outcome in again] == ["already done", "refused", "already done"]
    assert asked == ["s01"]
    predict(predictor, tmp_path, tmp_path / "out", overwrite=True)
    assert asked == ["s01", "s00", "s01", "s02"]


def test_names_of_files_stay_inside_and_apart(predictor, source, tmp_path):
    table = pd.read_csv(source / "manifest.tsv", sep="\t", dtype=str).query("subject == 's00'").drop(columns="mask")
    for file in table["path"]:
        shutil.copy(source / file, tmp_path / file)
    names = ["../x", "a/b", "a?b", "a b"]
    pd.concat([table.assign(subject=name) for name in names]).to_csv(tmp_path / "manifest.tsv", sep="\t", index=False)
    before = set(tmp_path.iterdir())
    outcomes = predict(predictor, tmp_path, tmp_path / "out" / "here")
    assert sorted(outcome.subject for outcome in outcomes) == sorted(names)
    assert all(outcome.result for outcome in outcomes)
    written = {file.name: json.loads(file.read_text())["subject"] for file in (tmp_path / "out" / "here").iterdir()}
    assert sorted(written.values()) == sorted(names)
    assert written["a b_ses-1.json"] == "a b"
    assert {name.rsplit("-", 1)[0] for name in written} >= {"-x_ses-1", "a-b_ses-1"}
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out"}
    again = predict(predictor, tmp_path, tmp_path / "out" / "here")
    assert {outcome.reason for outcome in again} == {"already done"}


def test_answers_of_another_model_are_not_taken_for_this_ones(predictor, source, tmp_path):
    weights = copy.deepcopy(predictor.model)
    next(weights.parameters()).data += 1
    other = Predictor(weights, predictor.preprocessing, predictor.target, predictor.num_slices)
    predict(predictor, source, tmp_path)
    with pytest.raises(UsageError, match=r"an answer of another model \(got s00_ses-1\.json\)"):
        predict(other, source, tmp_path)
    assert all(outcome.result for outcome in predict(other, source, tmp_path, overwrite=True))


def test_an_embedding_is_not_skipped_for_a_prediction(predictor, source, tmp_path):
    predict(predictor, source, tmp_path)
    with pytest.raises(UsageError, match=r"answer with other options \(got task classification"):
        predict(predictor.as_encoder(), source, tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    outcomes = predict(predictor.as_encoder(), source, tmp_path, overwrite=True)
    assert len(list(tmp_path.glob("*.npy"))) == len(outcomes)
    assert {outcome.reason for outcome in predict(predictor.as_encoder(), source, tmp_path)} == {"already done"}


def test_a_segmentation_is_not_skipped_for_one_with_other_options(segmenter, source, tmp_path):
    predict(segmenter, source, tmp_path)
    assert {outcome.reason for outcome in predict(segmenter, source, tmp_path)} == {"already done"}
    changed = segmenter.with_options(SegmentationOptions(min_volume_mm3=1.0))
    for other, options in ((changed, {}), (segmenter, {"probabilities": True})):
        with pytest.raises(UsageError, match="other options"):
            predict(other, source, tmp_path, **options)
    predict(segmenter, source, tmp_path, probabilities=True, overwrite=True)
    again = predict(segmenter, source, tmp_path, probabilities=True)
    assert {outcome.reason for outcome in again} == {"already done"}


def test_a_strict_run_refuses_what_a_lenient_one_answered(predictor, source, tmp_path):
    outcomes = predict(predictor, source, tmp_path)
    file = next(iter(sorted(tmp_path.glob("*.json"))))
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"input_level": "fail"}))
    again = predict(predictor.as_strict(), source, tmp_path)
    assert [outcome.reason for outcome in again] == ["", *["already done"] * (len(outcomes) - 1)]


def test_two_sessions_never_have_one_file_name():
    pairs = [
        ("a/b", "1"),
        ("a-b", "1"),
        ("a?b", "1"),
        ("a", "1_ses-2"),
        ("a_ses-1", "2"),
        ("é" * 300, "1"),
        ("\udcff", ""),
    ]
    stems = [file_stem(*pair) for pair in pairs]
    assert len(set(stems)) == len(pairs)
    assert file_stem("sub-01", "baseline") == "sub-01_ses-baseline"
    assert file_stem("", "") == ""
    for stem in stems:
        assert "/" not in stem
        assert len(stem.encode()) <= 200


def test_an_encoder_embeds(encoder_export, source, small_store):
    encoder = load(encoder_export)
    assert encoder.task == "embedding"
    found = encoder.predict(**scans(source, "s00"))
    assert found.embedding.shape == (32,)
    assert found.answer == {"dimensions": 32}
    np.testing.assert_allclose(found.embedding, encoder.predict_stack(small_store[0]).embedding, atol=1e-5)
    assert not np.allclose(found.embedding, encoder.predict_stack(small_store[11]).embedding, atol=1e-5)


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError):
        load(tmp_path / "empty")


def test_arguments_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.nii.gz").touch()
    paths, named = parse_inputs(["x_T1w.nii.gz", "flair=y.nii.gz", "a=b.nii.gz"])
    assert [str(path) for path in paths] == ["x_T1w.nii.gz", "a=b.nii.gz"]
    assert {contrast: str(path) for contrast, path in named.items()} == {"FLAIR": "y.nii.gz"}


def test_two_answers_do_not_share_a_name(segmenter, source, tmp_path):
    first, second = (segmenter.predict(source / f"{name}_T1w.nii.gz") for name in ("s02", "s03"))
    files = {file.name for answer in (first, second) for file in answer.save(tmp_path)}
    assert files == {f"{name}_T1w{ending}" for name in ("s02", "s03") for ending in ("_dseg.nii.gz", ".json")}
    with pytest.raises(UsageError, match="already exists"):
        first.save(tmp_path)
    with pytest.raises(UsageError, match="already exists"):
        first.save(tmp_path, "s03_T1w")
    assert first.save(tmp_path, overwrite=True)
