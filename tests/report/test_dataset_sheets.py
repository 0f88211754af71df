"""The dataset sheets' Python runs on the layout that the sheet describes and gives a cohort."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from brainfound.data.cohort import Cohort

_SHEETS = Path(__file__).parents[2] / "data"
_LAYOUTS = {
    "ixi": (
        "T1/IXI002-Guys-0828-T1.nii.gz",
        "T2/IXI002-Guys-0828-T2.nii.gz",
        "PD/IXI012-HH-1211-PD.nii.gz",
        "DTI/IXI012-HH-1211-DTI-00.nii.gz",
    ),
    "brats": tuple(
        f"BraTS-GLI-00008-00{visit}/BraTS-GLI-00008-00{visit}-{name}.nii.gz"
        for visit in (0, 1)
        for name in ("t1n", "t1c", "t2w", "t2f", "seg")
    ),
    "open-ms": (
        *(f"patient01/{name}.nii.gz" for name in ("T1W", "T1WKS", "T2W", "FLAIR", "consensus_gt", "brainmask")),
        "patient02/patient02_FLAIR.nii.gz",
        "patient02/patient02_consensus_gt.nii.gz",
    ),
    "fomo60k": (
        "sub_1/ses_1/t1.nii.gz",
        "sub_1/ses_1/t1_2.nii.gz",
        "sub_1/ses_2/flair.nii.gz",
        "sub_2/ses_1/scan_3.nii.gz",
    ),
    "openmind": (
        "ds001/sub-01/anat/sub-01_T1w.nii.gz",
        "ds001/sub-01/anat/sub-01_T1w__Data/deface_mask.nii.gz",
        "ds002/sub-01/ses-b/anat/sub-01_ses-b_T2w.nii.gz",
    ),
}
_EXPECTED = {
    "ixi": {("IXI002", "1"): ["T1w", "T2w"], ("IXI012", "1"): ["PDw"]},
    "brats": {("BraTS-GLI-00008", visit): ["FLAIR", "T1ce", "T1w", "T2w"] for visit in ("000", "001")},
    "open-ms": {("patient01", "1"): ["FLAIR", "T1ce", "T1w", "T2w"], ("patient02", "1"): ["FLAIR"]},
    "fomo60k": {("sub_1", "ses_1"): ["T1w", "T1w"], ("sub_1", "ses_2"): ["FLAIR"]},
    "openmind": {("ds001_sub-01", "1"): ["T1w"], ("ds002_sub-01", "b"): ["T2w"]},
}


@pytest.mark.parametrize("name", _LAYOUTS)
def test_the_manifest_of_a_sheet_is_a_cohort(name, tmp_path, monkeypatch):
    for file in _LAYOUTS[name]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (program,) = re.findall(r"```python\n(.*?)```", (_SHEETS / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, f"{name}.md", "exec"), {})
    cohort = Cohort.read(tmp_path)
    found = {key: sorted(rows["contrast"]) for key, rows in cohort.table.groupby(["subject", "session"])}
    assert found == _EXPECTED[name]
    assert all(Path(file).is_file() for file in cohort.table["path"])
    if name in ("brats", "open-ms"):
        assert all(Path(file).is_file() for file in cohort.table["mask"])


def test_every_sheet_is_in_the_index_and_says_what_a_reader_needs():
    index = (_SHEETS / "README.md").read_text(encoding="utf-8")
    sheets = sorted(path for path in _SHEETS.glob("*.md") if path.name != "README.md")
    assert len(sheets) >= 7
    for sheet in sheets:
        assert f"({sheet.name})" in index
        text = sheet.read_text(encoding="utf-8")
        for heading in ("**Where from.**", "**Licence.**", "**Layout", "**Contrasts.**", "**Labels", "## Prepare"):
            assert heading in text, (sheet.name, heading)
        assert "brainfound prepare " in text


def test_no_images_are_kept_with_the_sheets():
    assert {path.suffix for path in _SHEETS.rglob("*") if path.is_file()} == {".md"}
