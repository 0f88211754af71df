"""OpenMind's index: the tree, the variable in its paths, and what must not leave its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from brainfound.data.cohort import Cohort
from brainfound.errors import CohortError


def image(path: str, modality: str = "T1w", **more) -> dict:
    return {"name": Path(path).name, "modality": modality, "image_path": path, "associated_masks": None, **more}


def tree(*images: dict, dataset: str = "ds1", info: dict | None = None) -> str:
    session = {"session_id": "ses-1", "session_info": None, "images": list(images)}
    subject = {"subject_id": "sub-1", "subject_info": info, "sessions": {"ses-1": session}}
    content = {"dataset_index": dataset, "name": dataset, "subjects": {"sub-1": subject}}
    return json.dumps({"collection_index": 745, "collection_name": "OpenMind", "datasets": {dataset: content}})


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("nnssl_raw", raising=False)


def test_the_tree_becomes_a_cohort(layout):
    first = "$nnssl_raw/Dataset745_OpenMind/ds1/sub-1/anat/sub-1_T1w.nii.gz"
    masks = {"anatomy_mask": first.replace("T1w", "anat"), "anonymization_mask": None}
    text = tree(
        image(first, associated_masks=masks, image_info={"MagneticFieldStrength": 3}),
        image(first.replace("T1w", "FA"), "FA"),
        image(first.replace("T1w", "T2w"), "MRI"),
        info={"age": 31.5, "sex": "F", "list": [1]},
    )
    folder = "Dataset745_OpenMind"
    names = [first.removeprefix("$nnssl_raw/").replace("T1w", word) for word in ("T1w", "FA", "T2w", "anat")]
    root = layout(*names, content={f"{folder}/pretrain_data.json": text})
    for path in (root / folder, root / folder / "pretrain_data.json"):
        cohort = Cohort.read(path)
        assert cohort.source == "OpenMind"
        (session,) = cohort.sessions()
        assert (session.subject, session.session) == ("ds1_sub-1", "ses-1")
        assert session.scans.keys() == {"T1w", "T2w", "unknown"}
        assert session.masks["anatomy_mask"].name == "sub-1_anat.nii.gz"
        assert "mask" not in session.masks
        assert session.covariates["age_years"] == 31.5
        assert session.covariates["site"] == "ds1"
        assert session.covariates["field_strength_t"] == 3


def test_the_variable_says_where_images_are(layout, monkeypatch):
    root = layout(
        "far/ds/a_T1w.nii.gz", content={"index/pretrain_data.json": tree(image("$nnssl_raw/ds/a_T1w.nii.gz"))}
    )
    with pytest.raises(CohortError, match=r"none of the images exists.*Set the variable nnssl_raw"):
        Cohort.read(root / "index")
    monkeypatch.setenv("nnssl_raw", str(root / "far"))
    assert Cohort.read(root / "index").table["path"][0] == str(root / "far" / "ds" / "a_T1w.nii.gz")


def test_missing_images_are_counted(layout):
    text = tree(image("$nnssl_raw/a_T1w.nii.gz"), image("$nnssl_raw/b_T1w.nii.gz"))
    cohort = Cohort.read(layout("a_T1w.nii.gz", content={"pretrain_data.json": text}))
    assert len(cohort.table) == 1
    assert [file.name for file, _ in cohort.unused] == ["b_T1w.nii.gz"]
    assert any("1 listed files are not there" in note for note in cohort.notes)


@pytest.mark.parametrize(
    "path", ["$nnssl_raw/../x.nii.gz", "../x.nii.gz", "/etc/x.nii.gz", "$nnssl_raw//etc/../../x.nii"]
)
def test_paths_that_leave_the_folder_are_refused(layout, path):
    root = layout(content={"set/pretrain_data.json": tree(image(path))})
    with pytest.raises(CohortError, match="leads out of the folder"):
        Cohort.read(root / "set")


def test_masks_that_leave_the_folder_are_refused(layout):
    masks = {"anatomy_mask": "$nnssl_raw/../x.nii.gz"}
    text = tree(image("a_T1w.nii.gz", associated_masks=masks))
    with pytest.raises(CohortError, match="leads out of the folder"):
        Cohort.read(layout("a_T1w.nii.gz", content={"pretrain_data.json": text}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not an index of images"),
        ('{"datasets": 3}', "not a list of objects"),
        ('{"datasets": {}}', "names no images"),
        ('{"datasets": {"a": {"subjects": {"b": {"sessions": {"c": {"images": [{}]}}}}}}}', "has no path"),
    ],
)
def test_a_damaged_index_is_one_clear_line(layout, text, message):
    with pytest.raises(CohortError, match=message):
        Cohort.read(layout(content={"pretrain_data.json": text}))


def test_names_that_would_become_one_are_refused(layout):
    content = json.loads(tree(image("a_T1w.nii.gz"), dataset="a"))
    content["datasets"]["a_b"] = json.loads(json.dumps(content["datasets"]["a"]))
    content["datasets"]["a"]["subjects"] = {
        "b_c": content["datasets"]["a"]["subjects"]["sub-1"] | {"subject_id": "b_c"}
    }
    content["datasets"]["a_b"]["name"] = "a_b"
    content["datasets"]["a_b"]["subjects"] = {
        "c": content["datasets"]["a_b"]["subjects"]["sub-1"] | {"subject_id": "c"}
    }
    with pytest.raises(CohortError, match="would have one name"):
        Cohort.read(layout("a_T1w.nii.gz", content={"pretrain_data.json": json.dumps(content)}))


def test_masks_without_names_are_not_used(layout):
    text = tree(image("a_T1w.nii.gz", associated_masks=["x.nii.gz"]))
    cohort = Cohort.read(layout("a_T1w.nii.gz", content={"pretrain_data.json": text}))
    assert any("the masks of 1 images are not used" in note for note in cohort.notes)


@pytest.mark.parametrize(
    ("age", "noted"), [("n/a", False), ("unknown", False), (" ", False), ("NaN", False), ("20-25", True), (-4, True)]
)
def test_an_age_that_is_none_stops_nothing(layout, age, noted):
    text = tree(image("a_T1w.nii.gz"), info={"age": age, "sex": "F"})
    cohort = Cohort.read(layout("a_T1w.nii.gz", content={"pretrain_data.json": text}))
    (session,) = cohort.sessions()
    assert session.covariates["age_years"] is None
    assert session.covariates["sex"] == "F"
    assert any("1 × an age " in note for note in cohort.notes) == noted
