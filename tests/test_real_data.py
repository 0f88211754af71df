"""The pipeline of docs/tutorial/real-data.md in small, on real brains; skipped where they are not there.

Two patients with multiple sclerosis and one with a glioma go through preparation, pretraining, fine-tuning and
prediction with a tiny model: grids, orientations and files are checked, not how good the answers are. A stroke
patient (scans on two grids), a healthy head stored posterior-superior-right with labelled left and right, and a
patient as acquired (three oblique grids) check where preparation puts things.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfound.data.cohort import Cohort
from brainfound.data.preprocessing.session import prepare_session
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.splits.split_file import Split
from brainfound.data.store import Store
from brainfound.data.store.prepare import prepare
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.inference.cohort import predict
from brainfound.inference.loading import load
from brainfound.inference.predictor import Predictor
from brainfound.metrics import dice
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.recipes import validate
from tests.tiny_runs import _one_thread, log_lines  # noqa: F401

COARSE = Preprocessing(spacing_mm=(4, 4, 4), size=(56, 56))
PRETRAINING = {
    "init": {"source": "none", "scratch": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "patch_size": 8}},
    "views": {"global_size": 40, "local_size": 24, "num_local": 2},
    "objective": {"head": {"prototypes": 32, "hidden": 32, "bottleneck": 16}, "teacher_temperature_warmup_steps": 1},
    "schedule": {"warmup_steps": 1, "head_warmup_steps": 0},
    "probe": {"every": 3, "slices_per_session": 4, "folds": 3},
    "engine": {"steps": 3, "batch_size": 8, "precision": "no", "log_every": 1, "num_workers": 0},
}
FINETUNING = {
    "task": {"kind": "segmentation", "decoder_width": 8, "merge_codes": True},
    "num_slices": 2,
    "engine": {"steps": 2, "batch_size": 1, "precision": "no", "log_every": 1},
}


def join_manifests(real_data: Path, cohorts: list[str], out: Path) -> Path:
    """One manifest of several cohorts, with paths that hold from anywhere."""
    tables = []
    for cohort in cohorts:
        table = pd.read_csv(real_data / cohort / "manifest.tsv", sep="\t", dtype=str)
        for column in ("path", "mask"):
            table[column] = str(real_data.resolve() / cohort) + "/" + table[column]
        tables.append(table)
    pd.concat(tables).to_csv(out, sep="\t", index=False)
    return out


@pytest.fixture(scope="module")
def patients(real_data, tmp_path_factory) -> Path:
    """The manifest of the three patients with lesion masks."""
    return join_manifests(real_data, ["ms", "glioma"], tmp_path_factory.mktemp("real") / "lesions.tsv")


@pytest.fixture(scope="module")
def store(patients) -> Store:
    return prepare(patients, patients.with_name("store"), COARSE)


@pytest.fixture(scope="module")
def pretrained(store) -> Path:
    recipe = validate(PretrainRecipe, PRETRAINING)
    return pretrain(recipe, store, out=store.path.with_name("pretrain"), quiet=True)


@pytest.fixture(scope="module")
def tuned(store, pretrained) -> Path:
    recipe = validate(FinetuneRecipe, FINETUNING)
    out = store.path.with_name("lesions")
    return finetune(recipe, store, pretrained / "export", "mask", out=out, quiet=True)


@pytest.fixture(scope="module")
def predictor(tuned) -> Predictor:
    return load(tuned)


def prepare_first(cohort: Path, preprocessing: Preprocessing) -> tuple[Stack, Cohort]:
    source = Cohort.read(cohort)
    prepared = prepare_session(next(source.sessions()), preprocessing)
    assert prepared.not_used == []
    assert prepared.stack is not None
    return prepared.stack, source


def test_cohorts_of_two_sources_become_one_store(store):
    assert len(store) == 3
    assert store.rejected.empty
    assert store.present.all()
    assert sorted(store.sessions["diagnosis"]) == ["glioma", "multiple sclerosis", "multiple sclerosis"]
    # Brains are 120 to 185 mm high; the skull-stripped volumes with their black margins are higher.
    heights_mm = store.sessions["num_slices"] * 4
    assert heights_mm.between(110, 190).all()


def test_a_mask_returns_to_where_it_was(store, patients):
    for index, subject in enumerate(store.sessions["subject"]):
        stack = store[index]
        mask = nib.load(next(s for s in Cohort.read(patients).sessions() if s.subject == subject).masks["mask"])
        marked = np.asarray(mask.dataobj) > 0
        back = stack.to_native((stack.mask > 0).astype(np.uint8))
        assert back.shape == mask.shape
        np.testing.assert_allclose(back.affine, mask.affine, atol=1e-4)
        # A large tumour survives 4 mm almost whole; of small lesions what stays must lie on them.
        if subject.startswith("BraTS"):
            assert dice(np.asarray(back.dataobj) > 0, marked) > 0.9
        else:
            assert marked[np.asarray(back.dataobj) > 0].mean() > 0.5


def test_lesions_keep_their_volume_at_another_spacing(real_data):
    """Half a voxel lies between the 1 mm and the 2 mm grid, so many borders are ties; they must not all go one way."""
    session = next(s for s in Cohort.read(real_data / "ms").sessions() if s.subject == "patient19")
    preprocessing = Preprocessing(contrasts=("T1w",), spacing_mm=(2, 2, 2), size=(112, 112))
    stack = prepare_session(session, preprocessing).stack
    volume_mm3 = int((np.asarray(nib.load(session.masks["mask"]).dataobj) > 0).sum())
    assert (stack.mask > 0).sum() * 8 == pytest.approx(volume_mm3, rel=0.03)


def test_pretraining_learns_from_real_slices(pretrained):
    steps = [line for line in log_lines(pretrained) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) and line["skipped_steps"] == 0 for line in steps)
    probes = [line for line in log_lines(pretrained) if "probe" in line]
    assert {line["probe_target"] for line in probes} == {"slice_position"}
    assert (pretrained / "export" / "preprocessing.json").is_file()


def test_a_segmenter_is_scored_on_the_patient_left_out(tuned, store):
    split = Split.load(tuned / "splits.json").parts()
    assert [len(split[part]) for part in ("train", "validation", "test")] == [1, 1, 1]
    scores = json.loads((tuned / "scores.json").read_text())
    assert 0 <= scores["scores"]["dice"] <= 1
    assert 0 < scores["trivial"]["dice"] < 1
    cases = pd.read_csv(tuned / "cases.tsv", sep="\t")
    assert tuple(Store.open(store.path).sessions["subject"].iloc[cases["row"]]) == split["test"]


def test_files_as_acquired_are_answered_on_the_grid_of_the_first(predictor, real_data, tmp_path):
    folder = real_data / "ms_raw" / "patient01"
    files = [folder / f"study1_{name}.nii.gz" for name in ("T1W", "T2W", "FLAIR")]
    scans = [nib.load(file) for file in files]
    assert len({scan.shape for scan in scans}) > 1
    prediction = predictor.predict(*files)
    written = prediction.save(tmp_path, "patient01")
    assert [path.name for path in written] == ["patient01_dseg.nii.gz", "patient01.json"]
    answer = nib.load(written[0])
    assert answer.shape == scans[0].shape
    np.testing.assert_allclose(answer.affine, scans[0].affine, atol=1e-4)
    assert set(np.unique(np.asarray(answer.dataobj))) <= {0, 1}
    probability = prediction.probability.get_fdata()
    assert np.isfinite(probability).all()
    assert 0 <= probability.min() < probability.max() <= 1
    content = json.loads(written[1].read_text())
    assert content["contrasts"] == ["T1w", "T2w", "FLAIR"]
    assert content["missing_contrasts"] == []
    assert all(np.isfinite(volume) for volume in content["volumes_mm3"].values())


def test_a_contrast_may_be_withheld(predictor, store):
    folder = store.path.with_name("part")
    table = pd.read_csv(store.path.with_name("lesions.tsv"), sep="\t", dtype=str)
    table = table[(table["subject"] == "BraTS-GLI-00001") & table["contrast"].isin(["T1w", "T2w"])]
    folder.mkdir()
    table.to_csv(folder / "manifest.tsv", sep="\t", index=False)
    (outcome,) = predict(predictor, folder, folder / "answers")
    assert outcome.result is not None
    assert outcome.result.missing == ("FLAIR",)
    scan = nib.load(table["path"].iloc[0])
    answer = nib.load(folder / "answers" / "BraTS-GLI-00001_ses-000_dseg.nii.gz")
    assert nib.aff2axcodes(scan.affine) == ("L", "P", "S")
    assert answer.shape == scan.shape
    np.testing.assert_allclose(answer.affine, scan.affine, atol=1e-4)


def test_scans_on_two_grids_meet_in_one_stack(real_data):
    contrasts = ("DWI", "ADC", "FLAIR")
    stack, source = prepare_first(
        real_data / "stroke", Preprocessing(contrasts=contrasts, spacing_mm=(4, 4, 4), size=(56, 56))
    )
    shapes = {nib.load(file).shape for file in source.table["path"]}
    assert len(shapes) == 2
    assert stack.present.all()
    brain = stack.pixels > 0
    assert dice(brain[:, 0], brain[:, 1]) > 0.9
    assert dice(brain[:, 0], brain[:, 2]) > 0.85
    # Diffusion is restricted in an acute infarct: bright in DWI, dark in ADC, within the brain that both show.
    infarct = stack.mask > 0
    assert infarct.any()
    fine, _ = prepare_first(
        real_data / "stroke", Preprocessing(contrasts=contrasts, spacing_mm=(2, 2, 2), size=(112, 112))
    )
    # The scan's spacing is 2 mm but for rounding in its header, so its voxels and the mask's are kept as they are.
    mask = nib.load(source.table["mask"].iloc[0])
    np.testing.assert_array_equal(np.asarray(fine.to_native(fine.mask).dataobj), np.asarray(mask.dataobj))
    inside = brain.all(axis=1)
    assert stack.pixels[:, 0][infarct].mean() > 1.3 * stack.pixels[:, 0][inside].mean()
    assert stack.pixels[:, 1][infarct & inside].mean() < stack.pixels[:, 1][inside].mean()


def test_left_is_left_and_front_is_front(real_data):
    """Storage is posterior-superior-right; the labels name the sides, so a flip or a swapped axis cannot hide."""
    folder = real_data / "ixi_2mm"
    stack, source = prepare_first(folder, Preprocessing(contrasts=("T1w",), spacing_mm=(2, 2, 2), size=(112, 112)))
    labels = nib.load(source.table.sort_values("subject")["mask"].iloc[0])
    assert nib.aff2axcodes(labels.affine) == ("P", "S", "R")
    names = pd.read_csv(folder / "muse_dict.csv").set_index("Index")["Name"]
    centres = {
        names[code]: np.argwhere(stack.mask == code).mean(axis=0)
        for code in np.unique(stack.mask)
        if code in names.index and code
    }
    pairs = [(name, name[:-2] + "_R") for name in centres if name.endswith("_L") and name[:-2] + "_R" in centres]
    assert len(pairs) > 20
    assert [left for left, right in pairs if not centres[left][2] < centres[right][2]] == []
    cerebellum, caudate = centres["CerebellumExterior_L"], centres["Caudate_L"]
    assert cerebellum[1] > caudate[1] + 20  # rows run from the front to the back
    assert cerebellum[0] < caudate[0] - 15  # slices from the bottom to the top
    # At the scan's own spacing nothing is interpolated: every label returns to its own voxel.
    np.testing.assert_array_equal(np.asarray(stack.to_native(stack.mask).dataobj), np.asarray(labels.dataobj))
