"""A cohort of damaged scans is prepared: each ends as a right row of the store, or as a line with the reason."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.reading.scan import load_scan
from brainfound.data.store.prepare import prepare
from tests.data.reading import test_fuzz_scan as damage
from tests.data.stacks import build_stack

SETTINGS = Preprocessing(contrasts=("T1w",), spacing_mm=(4, 4, 4), size=(16, 16))


def write_cohort(folder: Path, cases: list[tuple[int, bytes]]) -> dict[str, Path]:
    """A manifest of one sound session and one for each case; subject → file."""
    sound = folder / "sound.nii"
    sound.write_bytes(damage.PLAIN["little.nii"])
    files = {"sound": sound}
    for number, (layout, content) in enumerate(cases):
        place = folder / f"{number:02d}"
        place.mkdir()
        file = damage.fuzz.write(layout, content, place)
        files[f"s{number:02d}"] = file / "anat/x.nii" if file.suffix == ".zip" else file
    rows = [f"{subject}\t1\tT1w\t{file.relative_to(folder)}" for subject, file in files.items()]
    (folder / "manifest.tsv").write_text("\n".join(["subject\tsession\tcontrast\tpath", *rows]) + "\n")
    return files


def check_prepared(cases: list[tuple[int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_cohort(folder, cases)
        store = prepare(folder / "manifest.tsv", folder / "store", SETTINGS)
        kept = {store[i].subject: store[i] for i in range(len(store))}
        refused = store.rejected.set_index("subject")["reason"].astype(str)
        assert not set(kept) & set(refused.index)
        assert set(kept) | set(refused.index) == set(files)
        assert refused.str.len().min() > 10 if len(refused) else True
        assert "sound" in kept
        for subject, stack in kept.items():
            scan = load_scan(files[subject])
            expected = build_stack(SETTINGS, {"T1w": scan})
            np.testing.assert_array_equal(stack.pixels, expected.pixels)
            assert np.isfinite(stack.affine).all()
            # What is thinner than a pixel of the stack may fall between two of them.
            if (scan.spacing_mm * scan.data.shape).min() > 2 * 4:
                assert stack.pixels.any()


cases = st.lists(st.one_of(damage.files_with_other_headers(), damage.any_damage), min_size=20, max_size=20)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(cases)
def test_damaged_scans_end_as_rows_or_as_reasons(cases):
    check_prepared(cases)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases)
def test_damaged_cohorts_in_depth(cases):
    check_prepared(cases)
