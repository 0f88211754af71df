"""Every cohort has a sheet of one form, and the sheets' Python runs on the layout that the sheet describes."""

from __future__ import annotations

import gzip
import re
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from brainfound.data.cohort import Cohort

_SHEETS = Path(__file__).parents[2] / "data"
_COHORTS = (
    *("oasis", "nacc", "adni", "brats", "nifd", "upenn-gbm", "habs", "ucsf-pdgm", "burdenko-gbm", "aibl", "remind"),
    *("feta", "ixi", "fomo60k", "fomo300k", "fomo-tasks", "openmind", "open-ms", "phantom"),
)
_HEADINGS = (
    *("**Where from.**", "**Licence.**", "**Size", "**Layout", "**Contrasts.**", "**Alignment and skull.**"),
    *("**Labels", "**Traps.**", "## Prepare"),
)
_LAYOUTS = {
    "ixi": (
        "T1/IXI002-Guys-0828-T1.nii.gz",
        "T2/IXI002-Guys-0828-T2.nii.gz",
        "PD/IXI012-HH-1211-PD.nii.gz",
        "DTI/IXI012-HH-1211-DTI-00.nii.gz",
        "T1/IXI219-Guys-0894-T1.nii.gz",
    ),
    "open-ms": (
        *(f"patient01/{name}.nii.gz" for name in ("T1W", "T1WKS", "T2W", "FLAIR", "consensus_gt", "brainmask")),
        "patient02/patient02_FLAIR.nii.gz",
        "patient02/patient02_consensus_gt.nii.gz",
    ),
    "openmind": (
        "ds001/sub-01/anat/sub-01_T1w.nii.gz",
        "ds001/sub-01/anat/sub-01_T1w__Data/deface_mask.nii.gz",
        "ds002/sub-01/ses-b/anat/sub-01_ses-b_T2w.nii.gz",
    ),
    "oasis": (
        "OAS30001_MR_d0757/anat1/sub-OAS30001_ses-d0757_acq-TSE_T2w.nii.gz",
        "OAS30001_MR_d0757/anat2/sub-OAS30001_ses-d0757_T1w.nii.gz",
        "OAS30001_MR_d0757/func1/sub-OAS30001_ses-d0757_task-rest_run-01_bold.nii.gz",
        "OAS30001_MR_d3000/anat1/sub-OAS30001_ses-d3000_T1w.nii.gz",
        "OAS30002_MR_d0100/anat1/sub-OAS30002_ses-d0100_FLAIR.nii.gz",
        "OAS30002_AV45_d2340/pet1/sub-OAS30002_ses-d2340_acq-AV45_pet.nii.gz",
    ),
    "nacc": (
        "mri001/AX_T1_3.nii.gz",
        "mri001/AX_FLAIR_4.nii.gz",
        "mri001/localizer_1.nii.gz",
        "mri002/MPRAGE_2.nii.gz",
    ),
    "adni": (
        "sub-ADNI027S0074/ses-M000/anat/sub-ADNI027S0074_ses-M000_T1w.nii.gz",
        "sub-ADNI027S0074/ses-M012/anat/sub-ADNI027S0074_ses-M012_T1w.nii.gz",
        "sub-ADNI027S0074/ses-M012/anat/sub-ADNI027S0074_ses-M012_FLAIR.nii.gz",
        "sub-ADNI041S1260/ses-M006/anat/sub-ADNI041S1260_ses-M006_T1w.nii.gz",
    ),
    "habs": (
        "MPRAGE/P_2TZD1P_2011-01-04_HAB_1.0_ADNI_1X-MPRAGE.nii.gz",
        "FLAIR/P_2TZD1P_2011-01-04_HAB_1.0_3DFLAIR.nii.gz",
        "MPRAGE/P_2TZD1P_2014-02-04_HAB_4.0_ADNI_2X-MPRAGE.nii.gz",
        "PET/P_2TZD1P_2011-02-01_HAB_1.0_PIB_40-60.nii.gz",
    ),
    "upenn-gbm": (
        *(
            f"images_structural/UPENN-GBM-00002_{visit}/UPENN-GBM-00002_{visit}_{name}.nii.gz"
            for visit in (11, 21)
            for name in ("T1", "T1GD", "T2", "FLAIR")
        ),
        "images_structural_unstripped/UPENN-GBM-00002_11/UPENN-GBM-00002_11_T1_unstripped.nii.gz",
        "images_segm/UPENN-GBM-00002_11_segm.nii.gz",
        "automated_segm/UPENN-GBM-00002_11_automated_approx_segm.nii.gz",
    ),
    "ucsf-pdgm": tuple(
        f"{case}_nifti/{case}_{name}.nii.gz"
        for case in ("UCSF-PDGM-0004", "UCSF-PDGM-0433", "UCSF-PDGM-0433_FU007d")
        for name in ("T1", "T1c", "T2", "FLAIR", "T1_bias", "DWI", "DTI_eddy_noreg", "tumor_segmentation")
    ),
    "burdenko-gbm": tuple(
        f"Burdenko-GBM-001_{series}.nii.gz"
        for series in (
            *("20150101100000_MR_CET1", "20150101100000_MR_T2FLAIR", "20150101100000_MR_T1", "20150101100000_CT"),
            "20150601090000_MR_CET1",
        )
    ),
    "feta": (
        "sub-001/anat/sub-001_rec-mial_T2w.nii.gz",
        "sub-001/anat/sub-001_rec-mial_dseg.nii.gz",
        "sub-041/anat/sub-041_rec-irtk_T2w.nii.gz",
        "sub-041/anat/sub-041_rec-irtk_dseg.nii.gz",
    ),
}
_TABLES = {
    "ixi": {
        "IXI.csv": "IXI_ID,SEX_ID (1=m; 2=f),AGE\n2,2,35.8\n2,2,35.8\n2,0,0\n12,1,38.78\n219,2,50\n219,2,61\n".replace(
            "SEX_ID (1=m; 2=f)", '"SEX_ID (1=m, 2=f)"'
        )
    },
    "oasis": {
        "OASIS3_UDSb4_cdr.csv": "OASISID,days_to_visit,age at visit,CDRTOT\n"
        "OAS30001,700,70.0,0.5\nOAS30001,1100,71.0,1\nOAS30003,0,60,0\n"
    },
    "nacc": {
        "investigator_mri.csv": "NACCID,NACCMRFI,NACCMNUM,MRIYR,MRIMO,MRIDY,NACCMRIA,NACCADC\n"
        "NACC000011,mri001.zip,1,2010,5,1,72,289\nNACC000022,mri002.zip,2,2008,1,1,888,4347\n",
        "investigator_uds.csv": "NACCID,VISITYR,VISITMO,VISITDAY,SEX,NACCUDSD\n"
        "NACC000011,2010,4,1,2,4\nNACC000011,2009,4,1,2,3\nNACC000022,2011,1,1,1,1\n",
    },
    "adni": {
        "ADNIMERGE.csv": "PTID,VISCODE,AGE,PTGENDER,DX,Years_bl\n"
        "027_S_0074,bl,70.5,Male,CN,0\n027_S_0074,m12,70.5,Male,MCI,1.5\n"
    },
    "habs": {
        "Demographics_HABS_DataRelease_2.0.csv": "SubjID,StudyArc,NP_SessionDate,BiologicalSex,NP_Age\n"
        "P_2TZD1P,HAB_1.0,2011-01-10,F,71.25\nP_2TZD1P,HAB_4.0,2014-02-10,F,74.25\n"
    },
    "upenn-gbm": {
        "UPENN-GBM_clinical_info_v2.1.csv": "ID,Gender,Age_at_scan_years,IDH1\n"
        "UPENN-GBM-00002_11,M,63.5,Wildtype\nUPENN-GBM-00002_21,M,64.5,Wildtype\n"
    },
    "ucsf-pdgm": {
        "UCSF-PDGM-metadata_v5.csv": "ID,Sex,Age at MRI,IDH,Final pathologic diagnosis (WHO 2021),BraTS21 ID\n"
        'UCSF-PDGM-004,M,66,wildtype,"Glioblastoma, IDH-wildtype",BraTS2021_00097\n'
        'UCSF-PDGM-433,F,50,wildtype,"Glioblastoma, IDH-wildtype",\n'
        'UCSF-PDGM-433_FU007d,F,50,wildtype,"Glioblastoma, IDH-wildtype",\n'
    },
    "feta": {
        "participants.tsv": "participant_id\tPathology\tGestational age\n"
        "sub-001\tPathological\t27.9\nsub-041\tNeurotypical\t28.2\n"
    },
}
_GLIOMA = ["FLAIR", "T1ce", "T1w", "T2w"]
_EXPECTED = {
    "ixi": {("IXI002", "1"): ["T1w", "T2w"], ("IXI012", "1"): ["PDw"], ("IXI219", "1"): ["T1w"]},
    "open-ms": {("patient01", "1"): _GLIOMA, ("patient02", "1"): ["FLAIR"]},
    "openmind": {("ds001_sub-01", "1"): ["T1w"], ("ds002_sub-01", "b"): ["T2w"]},
    "oasis": {("OAS30001", "d0757"): ["T1w", "T2w"], ("OAS30001", "d3000"): ["T1w"], ("OAS30002", "d0100"): ["FLAIR"]},
    "nacc": {("NACC000011", "1"): ["FLAIR", "T1w"], ("NACC000022", "2"): ["T1w"]},
    "adni": {
        ("sub-ADNI027S0074", "ses-M000"): ["T1w"],
        ("sub-ADNI027S0074", "ses-M012"): ["FLAIR", "T1w"],
        ("sub-ADNI041S1260", "ses-M006"): ["T1w"],
    },
    "habs": {("P_2TZD1P", "HAB_1.0"): ["FLAIR", "T1w"], ("P_2TZD1P", "HAB_4.0"): ["T1w"]},
    "upenn-gbm": {("UPENN-GBM-00002", visit): _GLIOMA for visit in ("11", "21")},
    "ucsf-pdgm": {
        ("UCSF-PDGM-0004", "1"): _GLIOMA,
        ("UCSF-PDGM-0433", "1"): _GLIOMA,
        ("UCSF-PDGM-0433", "FU007d"): _GLIOMA,
    },
    "burdenko-gbm": {
        ("Burdenko-GBM-001", "20150101"): ["FLAIR", "T1ce", "T1w"],
        ("Burdenko-GBM-001", "20150601"): ["T1ce"],
    },
    "feta": {("sub-001", "1"): ["T2w"], ("sub-041", "1"): ["T2w"]},
}
_LABELS = {  # of a session: what the sheet's Python must have joined to it; None is nothing
    "ixi": {
        ("IXI002", "1"): {"age_years": 35.8, "sex": "F", "site": "Guys"},
        ("IXI012", "1"): {"age_years": 38.78, "sex": "M", "site": "HH"},
        ("IXI219", "1"): {"age_years": None, "sex": None},  # two rows that contradict each other
    },
    "oasis": {
        ("OAS30001", "d0757"): {"age_years": 70.0 + 57 / 365.25, "diagnosis": "CDR 0.5"},
        ("OAS30001", "d3000"): {"age_years": 71.0 + 1900 / 365.25, "diagnosis": None},  # too far from a visit
        ("OAS30002", "d0100"): {"age_years": None, "diagnosis": None},
    },
    "nacc": {
        ("NACC000011", "1"): {"age_years": 72, "sex": "F", "diagnosis": "dementia", "site": 289},
        ("NACC000022", "2"): {"age_years": None, "sex": None, "diagnosis": None},
    },
    "adni": {
        ("sub-ADNI027S0074", "ses-M000"): {"age_years": 70.5, "sex": "M", "diagnosis": "CN", "site": 27},
        ("sub-ADNI027S0074", "ses-M012"): {"age_years": 72.0, "diagnosis": "MCI"},
        ("sub-ADNI041S1260", "ses-M006"): {"age_years": None, "diagnosis": None},
    },
    "habs": {("P_2TZD1P", "HAB_1.0"): {"age_years": 71.25, "sex": "F"}, ("P_2TZD1P", "HAB_4.0"): {"age_years": 74.25}},
    "upenn-gbm": {("UPENN-GBM-00002", "21"): {"age_years": 64.5, "sex": "M", "IDH1": "Wildtype"}},
    "ucsf-pdgm": {
        ("UCSF-PDGM-0004", "1"): {"age_years": 66, "sex": "M", "brats21": "BraTS2021_00097"},
        ("UCSF-PDGM-0433", "FU007d"): {"age_years": 50, "brats21": None},
    },
    "feta": {
        ("sub-001", "1"): {"diagnosis": "Pathological", "gestational_age_weeks": 27.9, "age_years": None},
        ("sub-041", "1"): {"reconstruction": "irtk"},
    },
}
_WITH_MASKS = {"open-ms", "feta", "ucsf-pdgm"}
_AS_DOWNLOADED = {  # files, and what is read of them without a manifest, as the sheet says: contrasts and source
    "brats": (
        [
            f"BraTS-GLI-00008-00{visit}/BraTS-GLI-00008-00{visit}-{name}.nii.gz"
            for visit in (0, 1)
            for name in ("t1n", "t1c", "t2w", "t2f", "seg")
        ],
        {("BraTS-GLI-00008", visit): _GLIOMA for visit in ("000", "001")},
        "files by name",
    ),
    "ixi": (
        ["T1/IXI002-Guys-0828-T1.nii.gz", "T2/IXI002-Guys-0828-T2.nii.gz", "PD/IXI012-HH-1211-PD.nii.gz"],
        {("IXI002", "1"): ["T1w", "T2w"], ("IXI012", "1"): ["PDw"]},
        "files by name",
    ),
    "fomo60k": (
        [f"sub_{name}.nii.gz" for name in ("1/ses_1/t1", "1/ses_1/t1_2", "1/ses_2/flair", "2/ses_1/scan_3")],
        {("sub_1", "ses_1"): ["T1w", "T1w"], ("sub_1", "ses_2"): ["FLAIR"], ("sub_2", "ses_1"): ["unknown"]},
        "FOMO60K",
    ),
    "fomo-tasks": (
        [
            f"preprocessed/sub_{subject}/ses_1/{name}.nii.gz"
            for subject, last in ((1, "swi"), (2, "t2s"))
            for name in ("flair", "dwi_b1000", "adc", last)
        ],
        {("sub_1", "ses_1"): ["ADC", "DWI", "FLAIR", "SWI"], ("sub_2", "ses_1"): ["ADC", "DWI", "FLAIR", "T2starw"]},
        "FOMO task",
    ),
}


def _python_of(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (_SHEETS / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)


def _without_python(text: str) -> str:
    return re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)


def _run_sheet(name: str) -> None:
    (program,) = _python_of(name)
    exec(compile(program, f"{name}.md", "exec"), {})


def _touch(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


@pytest.mark.parametrize("name", _LAYOUTS)
def test_the_manifest_of_a_sheet_is_a_cohort(name, tmp_path, monkeypatch):
    for file in _LAYOUTS[name]:
        _touch(tmp_path / file)
    for table, text in _TABLES.get(name, {}).items():
        (tmp_path / table).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    _run_sheet(name)
    cohort = Cohort.read(tmp_path)
    groups = cohort.table.groupby(["subject", "session"])
    assert {key: sorted(rows["contrast"]) for key, rows in groups} == _EXPECTED[name]
    assert all(Path(file).is_file() for file in cohort.table["path"])
    if name in _WITH_MASKS:
        assert all(Path(file).is_file() for file in cohort.table["mask"])
    for key, labels in _LABELS.get(name, {}).items():
        first = groups.get_group(key).iloc[0]
        for column, wanted in labels.items():
            if wanted is None:
                assert pd.isna(first[column]), (key, column, first[column])
            elif isinstance(wanted, str):
                assert first[column] == wanted, (key, column)
            else:
                assert float(first[column]) == pytest.approx(wanted), (key, column)


def test_the_corrected_and_the_automatic_masks_of_upenn_stay_apart(tmp_path, monkeypatch):
    for file in _LAYOUTS["upenn-gbm"]:
        _touch(tmp_path / file)
    (tmp_path / "UPENN-GBM_clinical_info_v2.1.csv").write_text("ID,Gender,Age_at_scan_years,IDH1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    _run_sheet("upenn-gbm")
    first, second = Cohort.read(tmp_path).sessions()
    assert {column: file.name for column, file in first.masks.items()} == {
        "mask": "UPENN-GBM-00002_11_segm.nii.gz",
        "automated_mask": "UPENN-GBM-00002_11_automated_approx_segm.nii.gz",
    }
    assert second.masks == {}


@pytest.mark.parametrize("name", _AS_DOWNLOADED)
def test_a_source_is_read_as_downloaded_where_its_sheet_says_so(name, tmp_path):
    files, expected, source = _AS_DOWNLOADED[name]
    for file in files:
        _touch(tmp_path / file)
    cohort = Cohort.read(tmp_path)
    groups = cohort.table.groupby(["subject", "session"])
    assert cohort.source == source
    assert {key: sorted(rows["contrast"]) for key, rows in groups} == expected
    if name == "brats":
        for (subject, session), rows in groups:
            assert [Path(file).name for file in set(rows["mask"])] == [f"{subject}-{session}-seg.nii.gz"]


def test_fomo300k_is_read_in_its_zips_and_parts_do_not_share_subjects(tmp_path):
    for part in ("PT001_ClevelandCCF", "PT021_IXI"):
        session = tmp_path / part / "sub-01" / "ses-01.zip"
        session.parent.mkdir(parents=True)
        with zipfile.ZipFile(session, "w") as archive:
            archive.writestr("anat/sub-01_ses-01_T1w.nii.gz", gzip.compress(bytes(352)))
    cohort = Cohort.read(tmp_path)
    assert cohort.source == "FOMO300K"
    assert sorted(cohort.table["subject"]) == ["PT001_ClevelandCCF_sub-01", "PT021_IXI_sub-01"]
    assert list(cohort.table["contrast"]) == ["T1w", "T1w"]


def test_the_sheet_of_remind_leaves_the_operation_out_and_copies_no_byte(tmp_path, monkeypatch):
    patient = tmp_path / "ReMIND" / "ReMIND-001"
    before = Path("12-25-1982-NA-Preop-97740", "3.000000-3DAXT1postcontrast-23243", "1-1.dcm")
    during = Path("12-25-1982-NA-Intraop-90478", "1.000000-USpredura-64615", "1-1.dcm")
    for file in (before, during):
        _touch(patient / file)
    monkeypatch.chdir(tmp_path)
    _run_sheet("remind")
    made = tmp_path / "ReMIND-preop" / "ReMIND-001"
    assert [file.relative_to(made) for file in made.rglob("*.dcm")] == [before]
    assert (made / before).samefile(patient / before)


def test_every_piece_of_python_in_the_sheets_is_run_here():
    with_python = {sheet.stem for sheet in _SHEETS.glob("*.md") if _python_of(sheet.stem)}
    assert with_python == set(_LAYOUTS) | {"remind"}
    assert all(len(_python_of(name)) == 1 for name in with_python)


def test_every_cohort_has_a_sheet_that_is_in_the_index():
    index = (_SHEETS / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in _SHEETS.glob("*.md")} - {"README"} == set(_COHORTS)
    assert all(f"({name}.md)" in index for name in _COHORTS)


@pytest.mark.parametrize("name", _COHORTS)
def test_a_sheet_says_what_a_reader_needs_on_one_page(name):
    text = (_SHEETS / f"{name}.md").read_text(encoding="utf-8")
    places = [text.find(heading) for heading in _HEADINGS]
    assert -1 not in places, [heading for heading in _HEADINGS if heading not in text]
    assert places == sorted(places), "the headings stand in one order"
    commands = "\n".join(re.findall(r"^```\n(.*?)^```$", _without_python(text[places[-1] :]), re.DOTALL | re.MULTILINE))
    assert re.search(r"^brainfound prepare \S+ stores/\S+", commands, re.MULTILINE)
    assert len(text.splitlines()) <= 70
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", [name for name in _COHORTS if name != "phantom"])
def test_a_sheet_of_real_people_links_its_owner_and_speaks_of_models(name):
    text = (_SHEETS / f"{name}.md").read_text(encoding="utf-8")
    where, licence = text.split("**Licence.**")
    assert re.search(r"https?://", where), "the owner's page"
    assert re.search(r"models?\b", licence.split("**Size")[0], re.IGNORECASE), "what may be done with a trained model"


def test_no_images_are_kept_with_the_sheets():
    assert {path.suffix for path in _SHEETS.rglob("*") if path.is_file()} == {".md"}
