"""What `brainfound.load` takes: bundles, several at once, Hub ids; and what it refuses, in one line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import brainfound
from brainfound.adapters import AdapterRecipe, attach_adapter, save_bundle
from brainfound.data.checking.contract import InputContract
from brainfound.data.cohort import Session
from brainfound.errors import BrainFoundError, ModelError, ScanError, UsageError
from brainfound.finetuning.tasks import Classification, Regression, Segmentation
from brainfound.inference.loading import load
from brainfound.inference.segmentation import SegmentationOptions
from brainfound.models import BrainFoundForClassification, BrainFoundForRegression, BrainFoundForSegmentation
from tests.damage import truncate

TARGETS = {
    "age": Regression("age_years", mean=50.0, std=10.0),
    "sex": Classification("sex", names=("F", "M")),
    "lesion": Segmentation("mask", names=("background", "lesion"), codes=(0, 7)),
}
CLASSES = {
    "regression": BrainFoundForRegression,
    "classification": BrainFoundForClassification,
    "segmentation": BrainFoundForSegmentation,
}


def bundle_of(folder, name, store, source, **options):
    """An untrained adapter of a task, away from where it would start."""
    target = TARGETS[name]
    torch.manual_seed(len(name))
    fields = {"id2label": dict(enumerate(target.names))} if target.names else {"target_mean": 50.0, "target_std": 10.0}
    model = CLASSES[target.kind].from_pretrained(source, decoder_width=8, **fields)
    model = attach_adapter(model, AdapterRecipe(rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    settings = {"labels": target.to_dict(), "metadata": {"num_slices": 4}, **options}
    return save_bundle(folder, model, preprocessing=store.preprocessing, **settings)


@pytest.fixture(scope="module")
def bundles(small_store, encoder_export, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {name: bundle_of(folder / name, name, small_store, encoder_export) for name in TARGETS}


def test_several_adapters_answer_as_each_does_alone(bundles, source, small_store):
    several = brainfound.load(bundles)
    files = [source / f"s01_{contrast}.nii.gz" for contrast in ("T1w", "T2w")]
    flair = source / "s01_FLAIR.nii.gz"
    assert (list(several), len(several), "age" in several, "iq" in several) == (list(TARGETS), 3, True, False)
    assert "lesion: segmentation" in repr(several)
    for name in ("lesion", "age", "sex", "lesion"):
        alone = brainfound.load(bundles[name])
        together, expected = several.predict(*files, adapter=name, flair=flair), alone.predict(*files, flair=flair)
        assert together.to_dict() == expected.to_dict()
        if expected.image is not None:
            np.testing.assert_array_equal(together.image.dataobj, expected.image.dataobj)
        assert several.predict_stack(small_store[2], name).answer == alone.predict_stack(small_store[2]).answer
    session = Session("s01", "1", {"T1w": files[0]}, {}, {})
    assert several.predict_session(session, "sex").missing == ("T2w", "FLAIR")
    weights = {id(p) for p in several["age"].model.parameters()} & {id(p) for p in several["sex"].model.parameters()}
    assert len(weights) > 30


def test_what_several_adapters_refuse(bundles, small_store, run, tmp_path, tiny_backbone, encoder_export):
    several = load(bundles)
    with pytest.raises(UsageError, match="no adapter named 'agee'. Did you mean age"):
        several.predict("scan.nii.gz", adapter="agee")
    with pytest.raises(UsageError, match="no bundle was given"):
        load({})
    with pytest.raises(UsageError, match="are for segmentations"):
        load({"age": bundles["age"]}, options=SegmentationOptions(flips=True))
    averaged = load(bundles, options=SegmentationOptions(flips=True)).predict_stack(small_store[0], "lesion")
    assert averaged.answer["averaged"] == ["flips"]
    other = brainfound.BrainFoundModel.from_pretrained(encoder_export)
    with torch.no_grad():
        other.encoder.backbone.layernorm.weight.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    stranger = bundle_of(tmp_path / "stranger", "age", small_store, tmp_path / "other")
    with pytest.raises(ModelError, match=r"stranger \(.*trained on another backbone than sex") as error:
        load({"sex": bundles["sex"], "stranger": stranger})
    assert "\n" not in str(error.value)


def put_on_the_hub(folder, cache, name="tiny"):
    """What the Hub's client leaves behind after a download."""
    repository = cache / f"models--lab--{name}"
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def test_a_bundle_and_an_encoder_by_hub_id(bundles, encoder_export, small_store, hub, tmp_path, monkeypatch):
    put_on_the_hub(bundles["sex"], hub)
    expected = load(bundles["sex"]).predict_stack(small_store[1]).answer
    assert load("lab/tiny").predict_stack(small_store[1]).answer == expected
    put_on_the_hub(encoder_export, hub, "encoder")
    assert load("lab/encoder").task == "embedding"
    (tmp_path / "trained" / "age" / "export").mkdir(parents=True)
    (tmp_path / "trained" / "sex").mkdir()
    monkeypatch.chdir(tmp_path)
    for given in ("traind/age", "trained/agee", "traind"):
        is_two = "/" in given
        with pytest.raises(
            ModelError, match=r"Did you mean trained/age\?" if is_two else "no such model folder"
        ) as error:
            load(given)
        assert ("Did you mean" in str(error.value)) == is_two
    with pytest.raises(ModelError, match="neither a folder nor a model that can be fetched"):
        load("lab/nothing")


def test_a_head_without_its_labels_is_not_taken_for_an_encoder(small_store, tiny_backbone, tmp_path):
    """What a Trainer saves: its answers would have no names, and its head would be dropped."""
    BrainFoundForClassification.from_backbone(tiny_backbone, contrasts=small_store.contrasts).save_pretrained(tmp_path)
    small_store.preprocessing.save(tmp_path)
    with pytest.raises(ModelError, match="BrainFoundForClassification by itself.*save_bundle") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "labels",
    [{}, {"0": "F", "1": "M"}, TARGETS["age"].to_dict(), {**TARGETS["sex"].to_dict(), "names": ["F", "M", "other"]}],
)
def test_labels_that_say_nothing_are_refused(small_store, encoder_export, tmp_path, labels):
    folder = bundle_of(tmp_path / "b", "sex", small_store, encoder_export, labels=labels)
    with pytest.raises(ModelError, match="labels do not describe the answers of the model.*with 2 names") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_bundle_that_says_no_number_of_slices_reads_all(small_store, encoder_export, tmp_path):
    folder = bundle_of(tmp_path / "b", "sex", small_store, encoder_export, metadata={})
    found = load(folder)
    assert found.num_slices is None
    assert found.predict_stack(small_store[0]).answer["class"] in ("F", "M")


def test_a_bundle_of_an_encoder_embeds(small_store, encoder_export, tmp_path):
    model = brainfound.BrainFoundModel.from_pretrained(encoder_export)
    folder = save_bundle(tmp_path / "b", model, preprocessing=small_store.preprocessing, labels={})
    assert load(folder).predict_stack(small_store[0]).answer == {"dimensions": 32}


def without_a_file(folder):
    (folder / "adapter_model.safetensors").unlink()


def truncated(folder):
    truncate(folder / "adapter_model.safetensors")


def not_json(folder):
    (folder / "bundle.json").write_text("{")


def another_description(folder):
    content = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**content, "base": {"source": "folder"}, "labels": [1]}))


def pickled(folder):
    torch.save({"weight": torch.zeros(1)}, folder / "adapter_model.bin")


@pytest.mark.parametrize("damage", [without_a_file, truncated, not_json, another_description, pickled])
def test_a_damaged_bundle_is_one_line(bundles, tmp_path, damage):
    folder = shutil.copytree(bundles["age"], tmp_path / "b")
    damage(folder)
    before = sorted(path.name for path in folder.rglob("*"))
    for source in (folder, {"age": folder}):
        with pytest.raises(ModelError) as error:
            load(source)
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused(encoder_export, tmp_path, name):
    folder = shutil.copytree(encoder_export, tmp_path / "export only", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"weight": torch.zeros(1)}, folder / name)
    with pytest.raises(ModelError, match="pickled weights are refused because they can run code"):
        load(folder)
    with pytest.raises(ModelError, match="this is a file, not a model folder"):
        load(folder / name)


@pytest.fixture(scope="module")
def without_flair(small_store, encoder_export, tmp_path_factory):
    """A model that reads FLAIR, but learnt from sessions that had none."""
    contract = InputContract.of(small_store)
    learnt = {contrast: size for contrast, size in contract.coarsest_mm.items() if contrast != "FLAIR"}
    folder = tmp_path_factory.mktemp("unseen") / "b"
    contract = contract.model_copy(update={"coarsest_mm": learnt})
    return load(bundle_of(folder, "sex", small_store, encoder_export, contract=contract))


def test_a_contrast_that_training_never_saw(without_flair, source):
    files = {contrast: source / f"s01_{contrast}.nii.gz" for contrast in ("T1w", "T2w", "FLAIR")}
    for given in (files, {"FLAIR": files["FLAIR"]}, {"SWI": files["FLAIR"]}):
        with pytest.raises(UsageError, match=r"not trained with (FLAIR|SWI) .*expected T1w, T2w\)") as error:
            without_flair.predict(**given)
        assert "\n" not in str(error.value)
    known = {contrast: files[contrast] for contrast in ("T1w", "T2w")}
    expected = without_flair.predict(**known)
    found = without_flair.predict_session(Session("s01", "1", files, {}, {}, (("FLAIR", files["FLAIR"]),)))
    assert found.answer == expected.answer
    assert found.missing == ()
    assert "FLAIR: not read, the model was not trained with it" in found.notes
    with pytest.raises(ScanError, match="no scan can be used; SWI: not read"):
        without_flair.predict_session(Session("s01", "1", {"SWI": files["FLAIR"]}, {}, {}))
    assert "FLAIR" not in without_flair.as_encoder().input_contrasts


def test_what_is_not_known_is_not_refused(small_store, encoder_export, source, tmp_path):
    """A bundle may have no contract; that of a store without a table of scans is empty."""
    unmeasured = InputContract.of(small_store).model_copy(update={"coarsest_mm": {}})
    for options in ({}, {"contract": unmeasured}):
        model = load(bundle_of(tmp_path / f"b{len(options)}", "sex", small_store, encoder_export, **options))
        assert model.predict(flair=source / "s01_FLAIR.nii.gz").contrasts == ("FLAIR",)


def test_every_refusal_is_one_of_ours(tmp_path):
    for source in (tmp_path, tmp_path / "nothing", "nothing", {"a": tmp_path}):
        with pytest.raises(BrainFoundError):
            load(source)
