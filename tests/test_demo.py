"""The demo walks the whole road, and what it learns beats not looking at the images."""

from __future__ import annotations

import json

import nibabel as nib
import pytest

from brainfound.cli.main import main
from brainfound.demo import MARKER, run_demo
from brainfound.errors import UsageError


@pytest.mark.slow
def test_the_demo_beats_its_trivial_baselines_on_held_out_subjects(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    monkeypatch.setattr("sys.argv", ["brainfound", "demo", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    rows = {row["metric"]: row for row in json.loads((out / MARKER).read_text())["rows"]}
    assert rows["auroc"]["adapted"][0] >= 0.75
    assert rows["mae"]["adapted"][0] <= 0.8 * rows["mae"]["trivial"]
    assert rows["dice"]["adapted"][0] >= 0.4
    assert rows["dice"]["adapted"][0] > rows["dice"]["trivial"] + 0.2
    for row in rows.values():
        assert row["task"] in printed
        assert row["num_test"] >= 10
    # The outline lies on the grid of the patient's own reference scan.
    (outline,) = (out / "predictions").glob("*_dseg.nii.gz")
    subject = outline.name.split("_")[0]
    reference = nib.load(out / "cohort" / subject / "anat" / f"{subject}_T1w.nii.gz")
    predicted = nib.load(outline)
    assert predicted.shape == reference.shape
    assert (predicted.affine == reference.affine).all()
    with pytest.raises(UsageError, match="--overwrite"):
        run_demo(out)


def test_the_demo_never_touches_a_foreign_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no demo"):
        run_demo(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
