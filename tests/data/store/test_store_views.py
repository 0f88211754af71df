"""Stores: parts of them, several as one, copies, proofs, and the Hub."""

from __future__ import annotations

import json
import pickle
import shutil

import huggingface_hub
import numpy as np
import pandas as pd
import pytest

from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.store import Store
from brainfound.data.store import sharing as store_hub
from brainfound.data.store.prepare import prepare
from brainfound.errors import StoreError, UsageError

SETTINGS = Preprocessing(spacing_mm=(4, 4, 4), size=(32, 32))


def assert_same_stacks(one: Store, other: Store) -> None:
    assert len(one) == len(other)
    for index in range(len(one)):
        first, second = one[index], other[index]
        np.testing.assert_array_equal(first.pixels, second.pixels)
        np.testing.assert_array_equal(first.affine, second.affine)
        np.testing.assert_array_equal(first.native_affine, second.native_affine)
        assert first.native_shape == second.native_shape
        assert (first.mask is None) == (second.mask is None)
        if first.mask is not None:
            np.testing.assert_array_equal(first.mask, second.mask)


def test_a_query_chooses_sessions_and_rows_are_numbered_anew(small_store):
    old = small_store.filter("age_years > 50 and has_FLAIR")
    ages = small_store.sessions["age_years"]
    expected = np.flatnonzero(ages > 50)
    assert 0 < len(old) < len(small_store)
    assert old.sessions["age_years"].tolist() == ages.iloc[expected].tolist()
    assert old.num_slices == len(old.slices) == len(old.slice_sessions) == len(old.slice_positions_mm)
    for index, whole in enumerate(expected):
        np.testing.assert_array_equal(old[index].pixels, small_store[int(whole)].pixels)
        np.testing.assert_array_equal(old.read_slices(old.session_rows(index)), old[index].pixels)
    row = old.slices[int(old.session_rows(1)[3])]
    np.testing.assert_array_equal(np.frombuffer(row["pixels"], np.uint8).reshape(3, 32, 32), old[1].pixels[3])
    assert set(old.quality["subject"]) == set(old.sessions["subject"])
    assert old.content_hash != small_store.content_hash
    assert_same_stacks(pickle.loads(pickle.dumps(old)), old)


def test_sessions_are_chosen_by_bools_and_functions_too(small_store):
    ill = small_store.sessions["diagnosis"] == "patient"
    assert len(small_store.filter(ill)) == int(ill.sum())
    assert len(small_store.filter(lambda row: row["site"] == "site1")) == 4
    twice = small_store.filter("age_years > 30").filter("age_years < 60")
    assert twice.sessions["age_years"].between(30, 60).all()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("1/0 > age_years", "cannot be read"),
        ("{1: 2}", "cannot be read"),
        ("age > 50", "cannot be read.*age_years"),
        ("age_years >", "cannot be read"),
        ("age_years", "not one yes or no per session"),
        ("age_years > 500", "no session is left"),
        ("@__builtins__", "cannot be read"),
    ],
)
def test_queries_that_cannot_work_are_one_line(small_store, query, message):
    with pytest.raises(UsageError, match=message):
        small_store.filter(query)


def test_a_query_whose_error_says_nothing_is_one_line_too(small_store, monkeypatch):
    def silent(*_arguments, **_options):
        raise NotImplementedError

    monkeypatch.setattr(pd.DataFrame, "eval", silent)
    with pytest.raises(UsageError, match="cannot be read: NotImplementedError"):
        small_store.filter("age_years > 50")


def test_stores_become_one(tmp_path, make_cohort):
    source = make_cohort(tmp_path / "cohort", num_subjects=6)
    table = pd.read_csv(source / "manifest.tsv", sep="\t", dtype={"session": str})
    parts = []
    for name, subjects in (("b", ["s01", "s04"]), ("a", ["s00", "s02", "s03", "s05"])):
        table[table["subject"].isin(subjects)].to_csv(source / f"{name}.tsv", sep="\t", index=False)
        parts.append(prepare(source / f"{name}.tsv", tmp_path / name, SETTINGS))
    whole = prepare(source, tmp_path / "whole", SETTINGS)
    joined = Store.concatenate(parts)
    assert_same_stacks(joined, whole)
    assert joined.content_hash == whole.content_hash, "the hash depends on how a store lies on disk"
    assert joined.sessions["subject"].tolist() == whole.sessions["subject"].tolist()
    np.testing.assert_array_equal(
        joined.read_slices(np.arange(joined.num_slices)), whole.read_slices(np.arange(whole.num_slices))
    )
    assert [row["subject"] for row in joined.slices] == [row["subject"] for row in whole.slices]
    assert len(joined.quality) == len(whole.quality)
    some = joined.filter("subject in ['s01', 's02']")
    assert_same_stacks(pickle.loads(pickle.dumps(some)), whole.filter("subject in ['s01', 's02']"))
    with pytest.raises(UsageError, match="in two of the stores"):
        Store.concatenate([whole, parts[0]])
    other = prepare(source / "b.tsv", tmp_path / "other", SETTINGS.model_copy(update={"size": (40, 40)}))
    with pytest.raises(UsageError, match="prepared in different ways"):
        Store.concatenate([parts[1], other])


def test_verify_finds_one_changed_byte_and_a_changed_label(small_store, tmp_path):
    assert small_store.verify() == small_store.content_hash
    copy = tmp_path / "copy"
    shutil.copytree(small_store.path, copy)
    assert Store.open(copy).verify() == small_store.content_hash
    file = sorted((copy / "slices").glob("*.arrow"))[1]
    content = bytearray(file.read_bytes())
    at = int(Store.open(copy).table.pixels_at[8]) + 5000
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match="session 8"):
        Store.open(copy).verify()
    content[at] ^= 1
    file.write_bytes(content)
    table = pd.read_feather(copy / "sessions.arrow")
    table.loc[3, "age_years"] += 1
    table.to_feather(copy / "sessions.arrow", compression="uncompressed")
    with pytest.raises(StoreError, match="table of sessions"):
        Store.open(copy).verify()
    file.write_bytes(content[: at - 5000])
    with pytest.raises(StoreError, match="shorter than the table"):
        Store.open(copy)[8]


def test_show_verifies_a_store(small_store, tmp_path, monkeypatch, capsys):
    from brainfound.cli.main import main

    shutil.copytree(small_store.path, tmp_path / "copy")
    for damage, code in ((False, 0), (True, 1)):
        if damage:
            file = next((tmp_path / "copy" / "slices").glob("*.arrow"))
            file.write_bytes(file.read_bytes()[:-4000])
        monkeypatch.setattr("sys.argv", ["brainfound", "show", str(tmp_path / "copy"), "--verify"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == code
        out, err = capsys.readouterr()
        assert (small_store.content_hash in out) != damage
        monkeypatch.setattr("sys.argv", ["brainfound", "show", str(tmp_path / "copy"), "--verify", "--json"])
        with pytest.raises(SystemExit):
            main()
        out_json = capsys.readouterr().out
        assert damage or json.loads(out_json) == {"content_hash": small_store.content_hash, "verified": True}
        assert ("shorter than the table" in err or "not those that were written" in err) == damage


def test_parts_of_a_store_know_only_their_own_files(tmp_path, make_cohort):
    source = make_cohort(tmp_path / "cohort", num_subjects=4)
    for name in ("s00_T2w", "s03_FLAIR"):
        (source / f"{name}.nii.gz").write_bytes(b"broken")
    store = prepare(source, tmp_path / "store", SETTINGS)
    first = store.filter("subject == 's00'")
    assert first.rejected["file"].tolist() == ["s00_T2w.nii.gz"]
    saved = first.save(tmp_path / "saved")
    assert saved.rejected["subject"].tolist() == ["s00"]
    assert saved.facts["num_rejected_files"] == 1
    both = Store.concatenate([first, store.filter("subject == 's03'")])
    assert sorted(both.rejected["file"]) == ["s00_T2w.nii.gz", "s03_FLAIR.nii.gz"]


def test_subjects_and_columns_with_awkward_names_keep_their_values(tmp_path, make_cohort):
    source = make_cohort(tmp_path / "cohort", num_subjects=3, contrasts=("T1w",))
    table = pd.read_csv(source / "manifest.tsv", sep="\t", dtype={"session": str})
    table["subject"] = ["NA-1", "None", "x1"]
    table["file"] = [3, 2, 1]
    table["has_T1w"] = ["a", "b", "c"]
    table.to_csv(source / "manifest.tsv", sep="\t", index=False)
    store = prepare(source, tmp_path / "store", SETTINGS.model_copy(update={"contrasts": ("T1w",)}))
    assert len(store.quality) == len(store)
    assert store.sessions["file_"].tolist() == [3, 2, 1]
    assert len(store.filter("has_T1w == 'b'")) == 1


def test_masks_of_other_label_maps_are_not_joined(tmp_path, make_cohort):
    source = make_cohort(tmp_path / "cohort", num_subjects=4)
    table = pd.read_csv(source / "manifest.tsv", sep="\t", dtype={"session": str})
    table["tissue_mask"] = table["mask"]
    stores = []
    for name, subjects in (("mask", ["s00", "s01"]), ("tissue_mask", ["s02", "s03"])):
        table[table["subject"].isin(subjects)].to_csv(source / f"{name}.tsv", sep="\t", index=False)
        stores.append(prepare(source / f"{name}.tsv", tmp_path / name, SETTINGS, mask=name))
    with pytest.raises(UsageError, match="different label maps"):
        Store.concatenate(stores)


def test_a_filtered_store_is_saved_as_one_of_its_own(small_store, tmp_path):
    some = small_store.filter("diagnosis == 'patient'")
    saved = some.save(tmp_path / "patients")
    assert_same_stacks(saved, some)
    assert saved.content_hash == some.content_hash == saved.verify()
    assert saved.sessions["age_years"].tolist() == some.sessions["age_years"].tolist()
    with pytest.raises(StoreError, match="something is there"):
        some.save(tmp_path / "patients")


def test_a_copy_without_identifiers_names_nobody(small_store, tmp_path):
    saved = small_store.save(tmp_path / "shared", keep_ids=False)
    assert len(saved) == len(small_store)
    assert sorted(saved.sessions["image_hash"]) == sorted(small_store.sessions["image_hash"])
    ages = dict(zip(small_store.sessions["image_hash"], small_store.sessions["age_years"], strict=True))
    assert [ages[h] for h in saved.sessions["image_hash"]] == saved.sessions["age_years"].tolist()
    saved.verify()
    names = {f"s{n:02d}_" for n in range(12)} | {str(small_store.path)}
    for file in saved.path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not any(name.encode() in content for name in names), file.name
    assert set(saved.slices["subject"]) == set(saved.sessions["subject"])
    assert set(saved.sessions["subject"]) == {f"subject-{n:02d}" for n in range(1, 13)}
    assert not any((saved.sessions["subject"] == name).any() for name in small_store.sessions["subject"])


def test_slices_stream_from_a_folder(small_store):
    rows = list(Store.stream(small_store.path))
    assert len(rows) == small_store.num_slices
    np.testing.assert_array_equal(rows[40]["pixels"], small_store.read_slices(np.array([40]))[0])
    first = small_store[0]
    np.testing.assert_array_equal(np.stack([row["mask"] for row in rows[: len(first.mask)]]), first.mask)
    assert rows[0]["present"].tolist() == [True, True, True]


def test_a_push_uploads_a_store_without_identifiers(small_store, tmp_path, monkeypatch):
    hub = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, *, repo_type, private, exist_ok):
            assert (repo_id, repo_type, private) == ("lab/brains", "dataset", True)

        def upload_folder(self, *, repo_id, folder_path, repo_type, commit_message):
            shutil.copytree(folder_path, hub)
            return "https://commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **options: str(hub))
    assert small_store.push_to_hub("lab/brains") == "https://commit"
    there = Store.from_hub("lab/brains")
    assert there.verify() == there.content_hash
    assert sorted(there.sessions["image_hash"]) == sorted(small_store.sessions["image_hash"])
    assert not set(there.sessions["subject"]) & set(small_store.sessions["subject"])
    card = (hub / "README.md").read_text()
    assert "slices/*.arrow" in card
    assert "12 sessions of 12 subjects" in card
    shutil.rmtree(hub)
    hub.mkdir()
    with pytest.raises(StoreError, match="holds no store"):
        Store.from_hub("lab/brains")


@pytest.mark.parametrize(
    "call",
    [
        lambda store: Store.from_hub("lab/brains"),
        lambda store: Store.from_hub("not an id"),
        lambda store: store.push_to_hub("lab/brains"),
        lambda store: next(Store.stream("lab/brains")),
    ],
    ids=["from_hub", "not an id", "push", "stream"],
)
def test_a_hub_that_cannot_be_reached_is_one_line(small_store, call):
    with pytest.raises(StoreError, match=r"cannot be (fetched|uploaded).* \(got ") as refusal:
        call(small_store)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_stream_that_breaks_off_is_one_line(small_store, monkeypatch):
    def broken(*arguments, **options):
        yield {**small_store.slices[0]}
        raise ConnectionError("reset")

    monkeypatch.setattr(store_hub, "download", lambda source, **options: small_store.path)
    monkeypatch.setattr("datasets.load_dataset", broken)
    rows = Store.stream("lab/brains")
    next(rows)
    with pytest.raises(StoreError, match="cannot be streamed"):
        next(rows)


def test_what_store_json_says_is_true(small_store):
    facts = json.loads((small_store.path / "store.json").read_text())
    assert facts["num_sessions"] == len(small_store)
    assert facts["num_slices"] == small_store.num_slices
    assert facts["hooks"] == []
    assert facts["content_hash"] == small_store.verify()


def test_a_store_of_sixteen_bits_keeps_the_values_of_a_map(tmp_path, make_cohort):
    import torch

    from brainfound.data.batches import as_tensor, collate, to_unit_range

    source = make_cohort(tmp_path / "cohort", num_subjects=2)
    settings = Preprocessing(
        contrasts=("T1w", "T2w"), spacing_mm=(3, 3, 3), size=(48, 48), bits=16, ranges={"T1w": (0, 400)}
    )
    store = prepare(source, tmp_path / "store", settings)
    store.verify()
    stack = store[0]
    assert stack.pixels.dtype == np.uint16
    assert stack.pixels[:, 1].max() == 65535
    values = stack.pixels[:, 0].astype(np.float32) * np.float32(400 / 65535)
    import nibabel as nib

    image = nib.load(source / "s00_T1w.nii.gz").get_fdata()
    native = stack.to_native(values, order=1).get_fdata()
    np.testing.assert_allclose(native[image > 0], image[image > 0], atol=400 / 65535)
    batch = collate([stack])
    assert batch.pixel_values.dtype == torch.float32
    assert float(batch.pixel_values.max()) == 1
    np.testing.assert_allclose(to_unit_range(as_tensor(stack.pixels)).numpy(), stack.pixels / 65535, rtol=1e-6)
    rows = list(store_hub.stream(store.path))
    np.testing.assert_array_equal(rows[5]["pixels"], store.read_slices(np.array([5]))[0])


def test_slices_are_read_where_the_system_has_no_positioned_reading(small_store, monkeypatch):
    import os

    rows = np.array([5, 0, 97])
    expected = small_store.read_slices(rows)
    monkeypatch.delattr(os, "preadv")
    np.testing.assert_array_equal(Store.open(small_store.path).read_slices(rows), expected)


def test_a_copy_that_the_disk_will_not_hold_is_not_begun(small_store, tmp_path, monkeypatch):
    from brainfound.data.store import plan

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StoreError, match="will not hold the store.*for the copy"):
        small_store.save(tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
