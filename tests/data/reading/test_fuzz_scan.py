"""Any damage to a scan's file ends in a refusal, or in exactly what nibabel reads from it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.reading import fuzz_scan as fuzz

HARNESS = Path(fuzz.__file__)
PLAIN = fuzz.plain_files()
SEEDS = fuzz.seeds()
FIELDS = {348: nib.Nifti1Header.template_dtype, 540: nib.Nifti2Header.template_dtype}
MGH_FIELDS = nib.freesurfer.mghformat.header_dtype
EXTREMES = {
    "i": [0, 1, -1, 2, 3, 4, 7, 8, 16, 32, 64, 255, 256, 511, 512, 768, 1024, 1280, 1536, 2048, 2304, 32767, -32768],
    "u": [0, 1, 2, 3, 8, 255],
    "f": [0, 1, -1, 2, 0.5, 352, 353, 1e-30, 1e10, 3e38, -3e38, np.nan, np.inf, -np.inf],
    "S": [b"", b"n+1", b"ni1", b"n+2", b"ni2", b"\xff\xff\xff"],
}

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
DEEP = settings(max_examples=6000, deadline=None, suppress_health_check=list(HealthCheck))


def run(layout: int, content: bytes) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return fuzz.check_bytes(layout, content, Path(folder))


@st.composite
def damaged_bytes(draw, content: bytes) -> bytes:
    """Some bytes of a file flipped, replaced, inserted, removed, moved, or its end cut off."""
    raw = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not raw:
            break
        # Headers, directories and trailers decide; so the ends are hit more often.
        place = draw(st.one_of(st.integers(0, min(len(raw), 600) - 1), st.integers(0, len(raw) - 1)))
        if draw(st.booleans()):
            place = len(raw) - 1 - place
        match draw(st.sampled_from(["flip", "replace", "insert", "remove", "cut", "repeat"])):
            case "flip":
                raw[place] ^= 1 << draw(st.integers(0, 7))
            case "replace":
                new = draw(st.binary(min_size=1, max_size=8))
                raw[place : place + len(new)] = new
            case "insert":
                raw[place:place] = draw(st.binary(min_size=1, max_size=40))
            case "remove":
                del raw[place : place + draw(st.integers(1, 40))]
            case "cut":
                del raw[place:]
            case "repeat":
                raw += raw[place:]
    return bytes(raw)


@st.composite
def files_with_other_headers(draw) -> tuple[int, bytes]:
    """A scan whose header's fields hold other, often extreme, values; plain, compressed or in an archive."""
    name = draw(st.sampled_from(sorted(PLAIN)))
    content = bytearray(PLAIN[name])
    is_mgh = name.endswith("mgh")
    size = 90 if is_mgh else 348 if content[344:347] == b"n+1" else 540
    dtype = MGH_FIELDS if is_mgh else FIELDS[size].newbyteorder(">" if "big" in name else "<")
    header = np.frombuffer(content[:size], dtype).copy().reshape(())
    for field in draw(st.lists(st.sampled_from(dtype.names), min_size=1, max_size=3)):
        base = dtype[field].base
        value = draw(
            st.one_of(st.sampled_from(EXTREMES[base.kind]), st.binary(min_size=base.itemsize, max_size=base.itemsize))
        )
        # An extreme may not fit the field: it wraps as a byte pattern would.
        if isinstance(value, bytes):
            value = np.frombuffer(value.ljust(base.itemsize, b"\0")[: base.itemsize], base)[0]
        else:
            with np.errstate(all="ignore"):
                value = np.asarray(value).astype(base)
        if dtype[field].shape:
            index = tuple(draw(st.integers(0, length - 1)) for length in dtype[field].shape)
            header[field][index] = value
        else:
            header[field] = value
    content[:size] = header.tobytes()
    return draw(st.sampled_from([2, 6] if is_mgh else [0, 5, 7, 8])), bytes(content)


any_damage = st.sampled_from(SEEDS).flatmap(lambda seed: st.tuples(st.just(seed[0]), damaged_bytes(seed[1])))


def test_every_seed_is_read():
    assert all(run(layout, content) for layout, content in SEEDS)


@QUICK
@given(files_with_other_headers())
def test_any_header_is_refused_or_read_as_nibabel_does(case):
    run(*case)


@QUICK
@given(any_damage)
def test_any_damage_is_refused_or_read_as_nibabel_does(case):
    run(*case)


@pytest.mark.slow
@DEEP
@given(st.one_of(files_with_other_headers(), any_damage))
def test_damage_in_depth(case):
    run(*case)


def test_the_rule_is_broken_by_a_wrong_voxel(monkeypatch, tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(PLAIN["little.nii"])
    right = fuzz.load_scan

    def wrong(path):
        scan = right(path)
        scan.data[0, 0, 0] += 1
        return scan

    monkeypatch.setattr(fuzz, "load_scan", wrong)
    with pytest.raises(AssertionError):
        fuzz.check(path)


def test_the_fuzzer_runs(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed; `pip install atheris` runs the guided fuzzer")
    done = subprocess.run(
        [sys.executable, str(HARNESS), "-runs=150", "-seed=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Done 150" in done.stderr
    assert list(tmp_path.iterdir()) == []
