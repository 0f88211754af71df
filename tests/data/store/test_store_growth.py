"""Stores that grow, are begun twice, run out of disk, or are prepared by a cluster: nothing lost, nothing doubled."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from brainfound.data.cohort import Session
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.store import Store
from brainfound.data.store import plan as store_plan
from brainfound.data.store import prepare as prepare_module
from brainfound.data.store import prepare as preparing
from brainfound.data.store.prepare import prepare
from brainfound.errors import StoreError, UsageError

SETTINGS = Preprocessing(contrasts=("T1w", "T2w"), spacing_mm=(4, 4, 4), size=(32, 32))


@pytest.fixture
def source(tmp_path, make_cohort):
    return make_cohort(tmp_path / "cohort", num_subjects=12, contrasts=("T1w", "T2w"))


@pytest.fixture
def prepared_sessions(monkeypatch):
    """Counts how often each session is prepared."""
    counts: Counter[str] = Counter()
    write = prepare_module.write_shard

    def spy(job):
        counts.update(session.subject for session in job.sessions)
        write(job)

    monkeypatch.setattr(prepare_module, "write_shard", spy)
    return counts


def rows_of(source, keep):
    """Rewrite the manifest with the subjects that `keep` says; returns the whole table."""
    file = source / "manifest.tsv"
    whole = source / "whole.txt"
    if not whole.exists():
        shutil.copy(file, whole)
    table = pd.read_csv(whole, sep="\t", dtype={"session": str})
    table[[keep(subject) for subject in table["subject"]]].to_csv(file, sep="\t", index=False)
    return table


@pytest.mark.parametrize("given", ["x.img", "x.hdr", "x.IMG", "x.HDR", "x.img.gz", "x.hdr.gz", "x.IMG.GZ"])
@pytest.mark.parametrize("changed", ["hdr", "img"])
def test_either_file_of_a_pair_is_an_input_of_the_store(tmp_path, given, changed):
    names = {"hdr": given.replace("img", "hdr").replace("IMG", "HDR")}
    names["img"] = names["hdr"].replace("hdr", "img").replace("HDR", "IMG")
    for name in names.values():
        (tmp_path / name).write_bytes(b"one")
    session = Session("p1", "1", {"T1w": tmp_path / given}, {}, {})

    def fingerprint() -> dict:
        return store_plan.SourceFingerprints.of([session], tmp_path, SETTINGS, "mask", []).files

    before = fingerprint()
    assert fingerprint() == before
    (tmp_path / names[changed]).write_bytes(b"another")
    assert fingerprint() != before


def stop_after_the_first_shard(source, out, monkeypatch) -> None:
    """A run that is ended when eight of the twelve sessions are done."""
    write = prepare_module.write_shard

    def fails_at_the_second(job):
        if job.shard.number == 1:
            raise KeyboardInterrupt
        write(job)

    monkeypatch.setattr(prepare_module, "write_shard", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, out, SETTINGS)
    monkeypatch.setattr(prepare_module, "write_shard", write)


def assert_equal_to_new(store: Store, source, tmp_path) -> None:
    """The store is what preparing from nothing gives."""
    new = prepare(source, tmp_path / "new", SETTINGS)
    assert store.content_hash == new.content_hash == store.verify()
    assert store.sessions["subject"].tolist() == new.sessions["subject"].tolist()
    np.testing.assert_array_equal(
        store.read_slices(np.arange(store.num_slices)), new.read_slices(np.arange(new.num_slices))
    )
    assert [row["subject"] for row in store.slices] == [row["subject"] for row in new.slices]
    pd.testing.assert_frame_equal(store.rejected, new.rejected)
    pd.testing.assert_frame_equal(store.quality, new.quality)


def test_new_sessions_are_added_and_the_others_left_alone(source, tmp_path, prepared_sessions):
    rows_of(source, lambda subject: subject not in ("s00", "s05", "s11"))
    (source / "s03_T2w.nii.gz").write_bytes(b"broken")
    first = prepare(source, tmp_path / "store", SETTINGS)
    assert len(first) == 9
    prepared_sessions.clear()
    rows_of(source, lambda subject: True)
    grown = prepare(source, tmp_path / "store", SETTINGS)
    assert prepared_sessions == {"s00": 1, "s05": 1, "s11": 1}
    assert len(grown) == 12
    assert len(grown.rejected) == 1
    assert_equal_to_new(grown, source, tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".replaced", ".partial"))]
    prepared_sessions.clear()
    before = (tmp_path / "store" / "store.json").stat().st_mtime_ns
    prepare(source, tmp_path / "store", SETTINGS)
    assert not prepared_sessions
    assert (tmp_path / "store" / "store.json").stat().st_mtime_ns == before


def test_a_reader_keeps_what_it_opened_while_the_store_grows(source, tmp_path):
    rows_of(source, lambda subject: subject < "s10")
    store = prepare(source, tmp_path / "store", SETTINGS)
    expected = store.read_slices(np.arange(40))
    rows_of(source, lambda subject: True)
    prepare(source, tmp_path / "store", SETTINGS)
    np.testing.assert_array_equal(store.read_slices(np.arange(40)), expected)


def test_changed_labels_are_taken_over_without_reading_scans(source, tmp_path, prepared_sessions):
    store = prepare(source, tmp_path / "store", SETTINGS)
    prepared_sessions.clear()
    table = rows_of(source, lambda subject: True)
    table.assign(diagnosis="other", score=[row // 2 for row in range(24)]).to_csv(
        source / "manifest.tsv", sep="\t", index=False
    )
    relabelled = prepare(source, tmp_path / "store", SETTINGS)
    assert not prepared_sessions
    assert set(relabelled.sessions["diagnosis"]) == {"other"}
    assert relabelled.sessions["score"].tolist() == [*range(12)]
    assert relabelled.content_hash != store.content_hash
    assert Store.open(store.path).content_hash == relabelled.content_hash
    assert relabelled.verify() == relabelled.content_hash


def test_sessions_that_went_or_changed_need_a_word(source, tmp_path, prepared_sessions):
    prepare(source, tmp_path / "store", SETTINGS)
    rows_of(source, lambda subject: subject != "s04")
    os.utime(source / "s07_T1w.nii.gz", ns=(1, 1))
    with pytest.raises(StoreError, match=r"1 sessions gone, 1 with other files.*--overwrite"):
        prepare(source, tmp_path / "store", SETTINGS)
    assert len(Store.open(tmp_path / "store")) == 12
    prepared_sessions.clear()
    followed = prepare(source, tmp_path / "store", SETTINGS, overwrite=True)
    assert prepared_sessions == {"s07": 1}
    assert_equal_to_new(followed, source, tmp_path)


def test_an_unfinished_run_of_a_source_that_grew_is_gone_on_with(source, tmp_path, monkeypatch, prepared_sessions):
    rows_of(source, lambda subject: subject != "s00")
    stop_after_the_first_shard(source, tmp_path / "store", monkeypatch)
    rows_of(source, lambda subject: True)
    store = prepare(source, tmp_path / "store", SETTINGS)
    assert set(prepared_sessions.values()) == {1}
    assert_equal_to_new(store, source, tmp_path)


def test_an_update_that_was_cut_off_between_its_renames_is_mended(source, tmp_path):
    store = prepare(source, tmp_path / "store", SETTINGS)
    replaced = tmp_path / ".store.replaced"
    store.path.rename(replaced)
    with pytest.raises(StoreError, match="cut off.*nothing is lost"):
        Store.open(tmp_path / "store")
    assert len(prepare(source, tmp_path / "store", SETTINGS)) == 12
    # Ended later, while the old one was removed: it is never taken for a store, and goes.
    shutil.copytree(store.path, replaced)
    (replaced / "store.json").unlink()
    prepare(source, tmp_path / "store", SETTINGS)
    assert not replaced.exists()


def test_folders_of_the_user_with_names_like_ours_are_left_alone(source, tmp_path):
    for name in ("store.old", "store.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    prepare(source, tmp_path / "store", SETTINGS)
    rows_of(source, lambda subject: subject != "s00")
    prepare(source, tmp_path / "store", SETTINGS, overwrite=True)
    assert [(tmp_path / name / "thesis.txt").read_text() for name in ("store.old", "store.partial")] == ["mine"] * 2


def test_a_store_that_could_not_be_put_in_place_is_not_made_again(source, tmp_path, monkeypatch, prepared_sessions):
    def busy(partial, out):
        raise OSError(errno.EBUSY, "Device or resource busy")

    move_into_place = preparing.move_into_place
    monkeypatch.setattr(preparing, "move_into_place", busy)
    with pytest.raises(OSError, match="busy"):
        prepare(source, tmp_path / "store", SETTINGS)
    monkeypatch.setattr(preparing, "move_into_place", move_into_place)
    prepared_sessions.clear()
    store = prepare(source, tmp_path / "store", SETTINGS)
    assert not prepared_sessions
    assert_equal_to_new(store, source, tmp_path)


def test_overwrite_mends_what_is_damaged_and_tries_again_what_was_refused(source, tmp_path, prepared_sessions):
    good = (source / "s03_T1w.nii.gz").read_bytes()
    stamp = (source / "s03_T1w.nii.gz").stat()
    (source / "s03_T1w.nii.gz").write_bytes(good[:100] + b"!" + good[101:])
    os.utime(source / "s03_T1w.nii.gz", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    store = prepare(source, tmp_path / "store", SETTINGS)
    assert store.rejected["file"].tolist() == ["s03_T1w.nii.gz"]
    (source / "s03_T1w.nii.gz").write_bytes(good)  # a passing failure: the same size and time
    os.utime(source / "s03_T1w.nii.gz", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    file = store.path / "slices" / store.table.file_name(7)
    content = bytearray(file.read_bytes())
    content[int(store.table.pixels_at[7]) + 1500] ^= 4
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"session 7\b.*--overwrite"):
        store.verify()
    with pytest.raises(StoreError, match="session 7"):
        store.save(tmp_path / "copy")
    prepared_sessions.clear()
    mended = prepare(source, tmp_path / "store", SETTINGS, overwrite=True)
    assert prepared_sessions == {"s03": 1, "s07": 1}
    assert mended.rejected.empty
    assert_equal_to_new(mended, source, tmp_path)


def test_a_store_behind_a_link_stays_there(source, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scratch" / "store")
    rows_of(source, lambda subject: subject != "s00")
    prepare(source, tmp_path / "link", SETTINGS)
    rows_of(source, lambda subject: True)
    prepare(source, tmp_path / "link", SETTINGS)
    assert (tmp_path / "link").is_symlink()
    assert len(Store.open(tmp_path / "scratch" / "store")) == 12


def test_workers_get_paths_that_mean_the_same_everywhere(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    write = prepare_module.write_shard

    def spy(job):
        seen.extend([job.partial, job.root, *job.sessions[0].scans.values(), *job.sessions[0].masks.values()])
        write(job)

    monkeypatch.setattr(prepare_module, "write_shard", spy)
    prepare("cohort", "store", SETTINGS)
    assert seen
    assert all(path.is_absolute() for path in seen)
    assert prepare(source, tmp_path / "store", SETTINGS).content_hash, "the same source under another path"


def test_a_worker_of_a_run_that_is_over_writes_nothing(source, tmp_path, monkeypatch):
    jobs = []
    write = prepare_module.write_shard
    monkeypatch.setattr(prepare_module, "write_shard", lambda job: (jobs.append(job), write(job)))
    prepare(source, tmp_path / "store", SETTINGS)
    partial = jobs[0].partial
    (partial / "slices").mkdir(parents=True)
    (partial / "plan.json").write_text('{"settings": "of another run"}')
    with pytest.raises(StoreError, match="is over"):
        write(jobs[0])
    assert os.listdir(partial / "slices") == []


def test_a_resumed_run_needs_only_the_space_that_is_missing(source, tmp_path, monkeypatch):
    stop_after_the_first_shard(source, tmp_path / "store", monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    from brainfound.data.cohort import Cohort

    whole = sum(store_plan._estimate_bytes(session, SETTINGS) for session in Cohort.read(source).sessions())
    # Eight of twelve sessions are done: half of the whole is enough.
    monkeypatch.setattr(store_plan.shutil, "disk_usage", lambda path: usage._replace(free=whole // 2))
    assert len(prepare(source, tmp_path / "store", SETTINGS)) == 12


def test_a_pickled_store_that_was_changed_since_is_refused(source, tmp_path):
    rows_of(source, lambda subject: subject != "s00")
    pickled = pickle.dumps(prepare(source, tmp_path / "store", SETTINGS))
    rows_of(source, lambda subject: True)
    prepare(source, tmp_path / "store", SETTINGS)
    with pytest.raises(StoreError, match="changed while it was in use"):
        pickle.loads(pickled)


def test_scans_that_are_not_wanted_do_not_matter(source, tmp_path, prepared_sessions):
    settings = SETTINGS.model_copy(update={"contrasts": ("T1w",)})
    prepare(source, tmp_path / "store", settings)
    prepared_sessions.clear()
    os.utime(source / "s02_T2w.nii.gz", ns=(1, 1))
    prepare(source, tmp_path / "store", settings)
    assert not prepared_sessions


_PREPARE = (
    "import sys, logging; from brainfound import Preprocessing, prepare;"
    "s = prepare(sys.argv[1], sys.argv[2], Preprocessing(contrasts=('T1w', 'T2w'), spacing_mm=(4,4,4), size=(32,32)));"
    "print(s.content_hash)"
)


def test_two_processes_that_start_at_once_make_one_store(source, tmp_path):
    command = [sys.executable, "-c", _PREPARE, str(source), str(tmp_path / "store")]
    with FileLock(tmp_path / ".store.lock"):  # until both wait
        runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        for run in runs:
            assert any("waiting for it" in line for line in run.stderr)
    answers = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert_equal_to_new(Store.open(tmp_path / "store"), source, tmp_path)


def test_a_full_disk_is_reported_before_it_is_filled(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store_plan.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(StoreError, match=r"will not hold the store \(got 0.0 GB free.*12 sessions.*Free some space"):
        prepare(source, tmp_path / "store", SETTINGS)
    assert not (tmp_path / ".store.partial").exists()


def test_the_size_that_is_foreseen_is_near_the_real_one(source, tmp_path, monkeypatch):
    seen = []
    real = shutil.disk_usage

    def usage(path):
        seen.append(path)
        return real(path)

    monkeypatch.setattr(store_plan.shutil, "disk_usage", usage)
    store = prepare(source, tmp_path / "store", SETTINGS)
    from brainfound.data.cohort import Cohort

    foreseen = sum(store_plan._estimate_bytes(session, SETTINGS) for session in Cohort.read(source).sessions())
    written = sum(file.stat().st_size for file in (store.path / "slices").glob("*.arrow"))
    assert seen
    assert 0.95 < foreseen / written < 1.5


def test_a_disk_that_fills_up_on_the_way_keeps_what_was_done(source, tmp_path, monkeypatch, prepared_sessions):
    spied = prepare_module.write_shard

    def fills_up(job):
        if job.shard.number == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        spied(job)

    monkeypatch.setattr(prepare_module, "write_shard", fills_up)
    with pytest.raises(StoreError, match="disk is full.*what was done is kept"):
        prepare(source, tmp_path / "store", SETTINGS)
    monkeypatch.setattr(prepare_module, "write_shard", spied)
    prepare(source, tmp_path / "store", SETTINGS)
    assert set(prepared_sessions.values()) == {1}


def test_executors_that_cannot_work_are_one_line(source, tmp_path):
    with pytest.raises(UsageError, match="no such executor"):
        prepare(source, tmp_path / "store", SETTINGS, executor="slurm")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="which dask scheduler"):
        prepare(source, tmp_path / "store", SETTINGS, executor="dask")
    with pytest.raises(UsageError, match="--executor dask"):
        prepare(source, tmp_path / "store", SETTINGS, scheduler="tcp://127.0.0.1:1")


@pytest.mark.slow
def test_a_dask_cluster_loses_nothing_when_a_worker_is_killed(tmp_path, make_cohort):
    distributed = pytest.importorskip("dask.distributed", reason="dask is not installed")
    source = make_cohort(tmp_path / "cohort", num_subjects=40, contrasts=("T1w",))
    settings = SETTINGS.model_copy(update={"contrasts": ("T1w",)})
    expected = prepare(source, tmp_path / "expected", settings)
    killed = []
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as cluster:

        def progress(done, total):
            if done and not killed:
                victim = next(iter(cluster.workers.values()))
                os.kill(victim.pid, signal.SIGKILL)
                killed.append(time.monotonic())

        store = prepare(
            source,
            tmp_path / "store",
            settings,
            executor="dask",
            scheduler=cluster.scheduler_address,
            progress=progress,
        )
    assert killed, "no worker was killed"
    assert len(store) == 40
    assert store.sessions["subject"].is_unique
    assert store.verify() == expected.content_hash
    assert not [name for name in os.listdir(store.path / "slices") if "unfinished" in name]
