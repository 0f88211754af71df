"""Stores: what goes in comes out, once, also after a kill."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from brainfound.data.cohort import Cohort
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.reading.scan import load_scan
from brainfound.data.store import Store
from brainfound.data.store import prepare as prepare_module
from brainfound.data.store.prepare import prepare
from brainfound.errors import StoreError, UsageError
from tests.data.stacks import build_stack

SETTINGS = Preprocessing(spacing_mm=(4, 4, 4), size=(32, 32))


@pytest.fixture
def cohort_folder(tmp_path, make_cohort):
    return make_cohort(tmp_path / "cohort")


def test_store_holds_what_preprocessing_makes(cohort_folder, tmp_path):
    store = prepare(cohort_folder, tmp_path / "store", SETTINGS)
    assert len(store) == 6
    assert store.num_slices == len(store.slices) == len(store.slice_sessions) == len(store.slice_positions_mm)
    session = next(iter(Cohort.read(cohort_folder).sessions()))
    scans = {contrast: load_scan(path) for contrast, path in session.scans.items()}
    expected = build_stack(SETTINGS, scans, load_scan(session.masks["mask"], labels=True))
    stack = store[0]
    np.testing.assert_array_equal(stack.pixels, expected.pixels)
    np.testing.assert_array_equal(stack.mask, expected.mask)
    np.testing.assert_allclose(stack.affine, expected.affine)
    np.testing.assert_allclose(stack.positions_mm, expected.positions_mm)
    assert stack.covariates["age_years"] == pytest.approx(session.covariates["age_years"])
    assert store.preprocessing == SETTINGS
    row = store.slices[3]
    np.testing.assert_array_equal(np.frombuffer(row["pixels"], np.uint8).reshape(3, 32, 32), stack.pixels[3])


def test_slices_are_read_in_the_requested_order_and_across_processes(small_store):
    rows = np.array([small_store.num_slices - 1, 0, 57, 0, 130])
    pixels = pickle.loads(pickle.dumps(small_store)).read_slices(rows)
    everything = np.concatenate([small_store[i].pixels for i in range(len(small_store))])
    np.testing.assert_array_equal(pixels, everything[rows])
    with pytest.raises(StoreError, match="out of range"):
        small_store.read_slices(np.array([small_store.num_slices]))


def test_workers_do_not_change_the_store(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "cohort", num_subjects=10)
    one = prepare(cohort, tmp_path / "one", SETTINGS)
    two = prepare(cohort, tmp_path / "two", SETTINGS, workers=2)
    assert one.content_hash == two.content_hash


def test_preparing_again_is_a_no_op_and_changes_are_noticed(cohort_folder, tmp_path):
    store = prepare(cohort_folder, tmp_path / "store", SETTINGS)
    before = (tmp_path / "store" / "store.json").stat().st_mtime_ns
    assert prepare(cohort_folder, tmp_path / "store", SETTINGS).content_hash == store.content_hash
    assert (tmp_path / "store" / "store.json").stat().st_mtime_ns == before
    with pytest.raises(StoreError, match="other preprocessing"):
        prepare(cohort_folder, tmp_path / "store", SETTINGS.model_copy(update={"size": (40, 40)}))
    os.utime(cohort_folder / "s00_T1w.nii.gz", ns=(1, 1))
    with pytest.raises(StoreError, match="--overwrite"):
        prepare(cohort_folder, tmp_path / "store", SETTINGS)
    assert prepare(cohort_folder, tmp_path / "store", SETTINGS, overwrite=True).content_hash == store.content_hash


def test_an_unfinished_store_is_gone_on_with(tmp_path, make_cohort, monkeypatch):
    cohort = make_cohort(tmp_path / "cohort", num_subjects=20, contrasts=("T1w",))
    settings = SETTINGS.model_copy(update={"contrasts": ("T1w",)})
    expected = prepare(cohort, tmp_path / "expected", settings).content_hash
    code = """
import os, signal, sys
from brainfound import Preprocessing, prepare
from brainfound.data.store import prepare as preparing

write = preparing.write_shard
def dies_at_the_second(job):
    if job.shard.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    write(job)

preparing.write_shard = dies_at_the_second
prepare(sys.argv[1], sys.argv[2], Preprocessing(contrasts=("T1w",), spacing_mm=(4, 4, 4), size=(32, 32)))
"""
    killed = subprocess.run([sys.executable, "-c", code, str(cohort), str(tmp_path / "store")])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / ".store.partial" / "shard-00000.json").is_file()
    assert not (tmp_path / "store").exists()
    with pytest.raises(StoreError, match="not complete"):
        Store.open(tmp_path / "store")
    written = []
    write_shard = prepare_module.write_shard

    def spy(job):
        written.append(job.shard.number)
        write_shard(job)

    monkeypatch.setattr(prepare_module, "write_shard", spy)
    assert prepare(cohort, tmp_path / "store", settings).content_hash == expected
    assert 0 not in written


def test_faulty_scans_are_listed_and_the_rest_goes_on(cohort_folder, tmp_path):
    truncated = cohort_folder / "s00_T1w.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:500])
    nib.save(nib.Nifti1Image(np.random.rand(5, 5, 5, 4), np.eye(4)), cohort_folder / "s01_T2w.nii.gz")
    for contrast in ("T1w", "T2w", "FLAIR"):
        nib.save(nib.Nifti1Image(np.zeros((9, 9, 9)), np.eye(4)), cohort_folder / f"s02_{contrast}.nii.gz")
    (cohort_folder / "s03_mask.nii.gz").unlink()
    store = prepare(cohort_folder, tmp_path / "store", SETTINGS)
    assert len(store) == 5
    assert store.present[0].tolist() == [False, True, True]
    assert store.present[1].tolist() == [True, False, True]
    assert store[2].mask is None
    reasons = store.rejected.set_index("file")["reason"]
    assert len(reasons) == 6
    assert "cannot be read" in reasons["s00_T1w.nii.gz"]
    assert "not a 3-D volume" in reasons["s01_T2w.nii.gz"]
    assert "all voxels are zero" in reasons["s02_FLAIR.nii.gz"]
    assert "no such file" in reasons["s03_mask.nii.gz"]


def test_a_cohort_without_one_usable_session_is_an_error(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "cohort", num_subjects=2, contrasts=("T1w",))
    with pytest.raises(StoreError, match="not one session could be used"):
        prepare(cohort, tmp_path / "store", Preprocessing(contrasts=("DWI",)))
    assert not (tmp_path / "store").exists()


def test_a_foreign_folder_is_never_touched(cohort_folder, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="not empty"):
        prepare(cohort_folder, tmp_path / "store", SETTINGS, overwrite=True)
    assert (tmp_path / "store" / "thesis.txt").read_text() == "mine"


def test_what_is_no_store_says_what_to_give(small_store, cohort_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Stores" / "older").mkdir(parents=True)
    shutil.copytree(small_store.path, tmp_path / "Stores" / "old")
    for given, close in (("Stores/odl", "Stores/old"), ("store/old", "Stores/old"), ("Stores/OLDE", "Stores/old")):
        with pytest.raises(StoreError, match=rf"^{given}: no such folder .*Did you mean {close}\?$"):
            Store.open(given)
    with pytest.raises(StoreError, match=r"^zzz: no such folder .*brainfound prepare SOURCE STORE$"):
        Store.open("zzz")
    for source in (cohort_folder, cohort_folder / "manifest.tsv"):
        with pytest.raises(StoreError, match=rf"not a store .*Prepare it first: brainfound prepare {source} STORE$"):
            Store.open(source)
    shutil.copytree(cohort_folder, tmp_path / "my scans")
    with pytest.raises(StoreError, match="brainfound prepare 'my scans' STORE"):
        Store.open("my scans")
    with pytest.raises(
        StoreError,
        match=r"^Stores/older: this is an empty folder, not a store .*Make it with: brainfound prepare SOURCE STORE",
    ):
        Store.open("Stores/older")


def test_other_schemas_and_unknown_columns_are_refused(small_store, tmp_path):
    with pytest.raises(UsageError, match="no column 'age'. Did you mean age_years"):
        small_store.covariate("age")
    with pytest.raises(UsageError, match="no column 'Leeftijd'. Did you mean age_years"):
        small_store.covariate("Leeftijd")
    with pytest.raises(StoreError, match="not a store"):
        Store.open(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "store.json").write_text(json.dumps({**small_store.facts, "schema_version": 99}))
    (copy / "sessions.arrow").write_bytes((small_store.path / "sessions.arrow").read_bytes())
    with pytest.raises(StoreError, match="version 99"):
        Store.open(copy)


def test_a_reference_scan_that_cannot_be_used_does_not_stop_the_others(cohort_folder, tmp_path):
    shape = (34, 42, 30)
    flat = np.zeros(shape, np.float32)
    flat[5:-5, 5:-5, 5:-5] = 0.5
    affine = nib.load(cohort_folder / "s00_T2w.nii.gz").affine
    nib.save(nib.Nifti1Image(flat, affine), cohort_folder / "s00_T1w.nii.gz")
    store = prepare(cohort_folder, tmp_path / "store", SETTINGS)
    assert len(store) == 6
    assert store.present[0].tolist() == [False, True, True]
    assert "one value only" in store.rejected.set_index("file")["reason"]["s00_T1w.nii.gz"]


def test_files_that_are_no_scans_of_the_cohort_are_listed_and_no_failure(write_scan, tmp_path):
    for name in ("sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz", "sub-02/func/sub-02_bold.nii.gz"):
        write_scan(f"bids/{name}")
    settings = SETTINGS.model_copy(update={"contrasts": ("T1w",)})
    store = prepare(tmp_path / "bids", tmp_path / "store", settings)
    assert len(store) == 2
    assert store.rejected.empty
    assert store.unused_files["file"].tolist() == ["sub-02/func/sub-02_bold.nii.gz"]
    write_scan("bids/sub-03/anat/sub-03_T1w.nii.gz")
    assert prepare(tmp_path / "bids", tmp_path / "store", settings).unused_files.equals(store.unused_files)
    # The same head three times: one scan under three names.
    assert Store.open(tmp_path / "store").duplicates == [[0, 1, 2]]
