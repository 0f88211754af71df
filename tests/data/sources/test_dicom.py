"""DICOM folders: converted once, nothing lost, nobody named."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfound.data.cohort import Cohort
from brainfound.data.sources.dicom import contrast_from_sidecar
from brainfound.data.sources.dicom_series import (
    Series,
    _age_years,
    _assign_subjects,
    _contains_patient_name,
    _require_distinct_patient_ids,
    _short_hash,
    find_series,
    max_folders_per_patient,
)
from brainfound.errors import CohortError, UsageError

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("dcm2niix")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, generate_uid  # noqa: E402


def write_series(folder: Path, *, study: str | None = None, pixels: bool = True, **header) -> str:
    """Six slices of one series; returns the study."""
    folder.mkdir(parents=True, exist_ok=True)
    study, series = study or generate_uid(), generate_uid()
    facts = {
        "Modality": "MR",
        "PatientID": "MRN4711",
        "PatientName": "DOE^JANE",
        "PatientAge": "045Y",
        "PatientSex": "F",
        "PatientBirthDate": "19750101",
        "InstitutionName": "Secret Hospital",
        "StudyDate": "20200102",
        "StudyTime": "101010",
        "SeriesDescription": "t1_mprage_sag",
        "Manufacturer": "SIEMENS",
        "ManufacturerModelName": "Prisma",
        "MagneticFieldStrength": 3,
        "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND"],
        "ScanningSequence": "GR",
        "EchoTime": 2.5,
        "RepetitionTime": 2300,
        **header,
    }
    for number in range(6):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
        for key, value in facts.items():
            setattr(data, key, value)
        data.StudyInstanceUID, data.SeriesInstanceUID = study, series
        data.SeriesNumber, data.InstanceNumber, data.AcquisitionNumber = 3, number + 1, 1
        data.ImagePositionPatient = [-8, -8, 2.0 * number]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [1, 1], 2
        data.Rows = data.Columns = 16
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 15, 0, 1
        data.PhotometricInterpretation = "MONOCHROME2"
        if pixels:
            data.PixelData = np.random.default_rng(number).integers(0, 500, (16, 16)).astype("<u2").tobytes()
        data.save_as(folder / f"im{number}", enforce_file_format=True)
    return study


def code(meaning: str) -> Dataset:
    """An item of a sequence of codes."""
    item = Dataset()
    item.CodeMeaning = meaning
    return item


def usage(administered: str) -> Dataset:
    """A functional group that states whether a contrast agent was given."""
    group, item = Dataset(), Dataset()
    item.ContrastBolusAgentAdministered = administered
    group.ContrastBolusUsageSequence = [item]
    return group


def text_of(folder: Path) -> str:
    """All that is written below a folder, names and contents."""
    names = " ".join(str(file.relative_to(folder)) for file in folder.rglob("*"))
    contents = b" ".join(file.read_bytes() for file in folder.rglob("*.json"))
    headers = b" ".join(bytes(nib.load(file).header.binaryblock) for file in folder.rglob("*.nii.gz"))
    return (names + contents.decode() + headers.decode("latin-1")).lower()


def test_series_become_scans_and_nobody_is_named(tmp_path):
    source, work = tmp_path / "in", tmp_path / "work"
    study = write_series(source / "JaneDoe" / "s1")
    write_series(source / "JaneDoe" / "s2", study=study, SeriesDescription="t2_tirm_dark-fluid")
    write_series(source / "JaneDoe" / "later", StudyDate="20210101")
    write_series(source / "case2" / "s1", PatientID="MRN4712", PatientName="ROE^RICK", PatientAge="")
    with pytest.raises(CohortError, match=r"must be converted first.*work="):
        Cohort.read(source)
    cohort = Cohort.read(source, work=work)
    assert cohort.source == "DICOM"
    sessions = list(cohort.sessions())
    assert [sorted(session.scans) for session in sessions] == [["T1w"], ["FLAIR", "T1w"], ["T1w"]]
    assert sessions[0].subject == "case2"
    assert sessions[1].subject == sessions[2].subject != "JaneDoe"
    assert [session.session for session in sessions] == ["1", "1", "2"]
    assert sessions[1].covariates["age_years"] == 45
    assert sessions[0].covariates["age_years"] is None
    assert sessions[1].covariates["field_strength_t"] == 3
    assert nib.load(sessions[0].scans["T1w"]).shape == (16, 16, 6)
    written = text_of(work)
    for word in ("doe", "jane", "rick", "mrn47", "secret", "19750101", "20200102", "10:10"):
        assert word not in written, word


def test_one_person_in_several_folders_is_one_subject(tmp_path):
    write_series(tmp_path / "in" / "first", StudyDate="20200101")
    write_series(tmp_path / "in" / "second", StudyDate="20210101")
    cohort = Cohort.read(tmp_path / "in", work=tmp_path / "work")
    assert cohort.table["subject"].nunique() == 1
    assert list(cohort.table["session"]) == ["1", "2"]
    assert cohort.table["subject"][0].startswith("sub-")
    assert "4711" not in cohort.table["subject"][0]


def test_the_series_of_one_person_may_lie_in_many_folders(tmp_path):
    study = write_series(tmp_path / "in" / "s1")
    for number in range(2, 6):
        write_series(tmp_path / "in" / f"s{number}", study=study)
    cohort = Cohort.read(tmp_path / "in", work=tmp_path / "work")
    assert cohort.table["subject"].nunique() == 1


def test_one_patient_id_for_everybody_does_not_make_them_one_person(tmp_path):
    for number in range(3):
        write_series(tmp_path / "in" / f"case{number}", PatientID="STUDYX", PatientName="STUDYX")
    with pytest.raises(
        CohortError, match=r"anonymiser's placeholder for everybody \(got 3 of 3 folders\).*manifest"
    ) as caught:
        Cohort.read(tmp_path / "in", work=tmp_path / "work")
    assert "STUDYX" not in str(caught.value)


@pytest.mark.parametrize("word", ["REMOVED", "DEIDENTIFIED", "000000", "XXXX", "Anonymous", ""])
def test_known_words_of_anonymisers_are_no_patient(tmp_path, word):
    for number in range(3):
        write_series(tmp_path / "in" / f"case{number}", PatientID=word, PatientName=word)
    cohort = Cohort.read(tmp_path / "in", work=tmp_path / "work")
    assert list(cohort.table["subject"]) == ["case0", "case1", "case2"]


def series_of(folder: str, patient: str | None, study: str, named: tuple[str, ...] = (), when: str = "") -> Series:
    return Series(f"{folder}{study}", study, 1, patient, frozenset(named), when, folder, None, None)


def test_a_person_with_many_visits_among_many_others_is_believed():
    series = [series_of(f"f{number}", f"id{number}", f"study{number}") for number in range(60)]
    series += [series_of(f"g{number}", "often", f"other{number}") for number in range(5)]
    _require_distinct_patient_ids(series)
    assert max_folders_per_patient(series) == 5
    with pytest.raises(CohortError, match="got 5 of 15 folders"):
        _require_distinct_patient_ids(series[50:])


def test_a_folder_with_the_name_becomes_a_hash_that_the_name_does_not_give():
    for patient in ("MRN1", None):
        series = [
            series_of("LI_WU", patient, "1.2.3", ("li", "wu"), "20200101"),
            series_of("LI_WU", patient, "1.2.4", (), "20210101"),
            series_of("clinic", "MRN2", "1.2.5", ("li",)),
        ]
        _assign_subjects(series)
        assert series[0].subject == series[1].subject == f"sub-{_short_hash(patient or '1.2.3')}"
        assert series[2].subject == "clinic"


@pytest.mark.parametrize(
    ("folder", "found"),
    [("LI_WU", True), ("LiWu01", True), ("wu-2020", True), ("clinic", False), ("xDOEx", True), ("case7", False)],
)
def test_names_in_folders(folder, found):
    assert _contains_patient_name(folder, frozenset({"li", "wu", "doe"})) is found


def test_links_to_nothing_and_names_in_another_encoding(tmp_path):
    write_series(tmp_path / "in" / "a", PatientName="")
    os.rename(tmp_path / "in" / "a" / "im0", os.fsencode(tmp_path / "in" / "a") + b"/im\xfc")
    write_series(tmp_path / "in" / "b", PatientID="B", PatientName="")
    os.rename(tmp_path / "in" / "b", os.fsencode(tmp_path / "in") + b"/b\xfc")
    (tmp_path / "in" / "a" / "gone.dcm").symlink_to(tmp_path / "nowhere")
    (Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xfcber.dcm"))).write_bytes(b"x" * 200)
    cohort = Cohort.read(tmp_path / "in", work=tmp_path / "work")
    assert list(cohort.table["subject"]) == ["a", "bü"]
    reasons = {file.name: reason for file, reason in cohort.unused}
    assert reasons["gone.dcm"].startswith("a link whose target is not there")
    assert "über.dcm" in reasons


@pytest.mark.filterwarnings("error")
def test_no_warning_tells_values_of_the_header(tmp_path):
    with pydicom.config.disable_value_validation():
        write_series(tmp_path / "in", study="DOE JANE", PatientID="J" * 100 + "1", PatientAge="JANE DOE 45")
    cohort = Cohort.read(tmp_path / "in", work=tmp_path / "work")
    assert len(cohort) == 1
    assert cohort.table["age_years"].isna().all()


def test_two_persons_in_one_folder_are_two_subjects(tmp_path):
    write_series(tmp_path / "in" / "all", PatientID="A")
    write_series(tmp_path / "in" / "all2", PatientID="B")
    for number, file in enumerate(sorted((tmp_path / "in" / "all2").iterdir())):
        file.rename(tmp_path / "in" / "all" / f"other{number}")
    (tmp_path / "in" / "all2").rmdir()
    assert Cohort.read(tmp_path / "in", work=tmp_path / "work").table["subject"].nunique() == 2


def test_a_faulty_series_is_listed_and_the_others_go_on(tmp_path):
    write_series(tmp_path / "in" / "good")
    write_series(tmp_path / "in" / "empty", pixels=False, StudyDate="20200103")
    write_series(tmp_path / "in" / "ct", Modality="CT")
    (tmp_path / "in" / "rubbish.dcm").write_bytes(b"x" * 200)
    (tmp_path / "in" / "cut").write_bytes((tmp_path / "in" / "good" / "im0").read_bytes()[:140])
    cohort = Cohort.read(tmp_path / "in", work=tmp_path / "work")
    assert list(cohort.table["contrast"]) == ["T1w"]
    reasons = [reason for _, reason in cohort.unused]
    assert sum("dcm2niix: " in reason for reason in reasons) == 1
    assert sum("modality CT" in reason for reason in reasons) == 6
    assert {file.name for file, _ in cohort.unused} >= {"rubbish.dcm", "cut"}


def test_a_finished_conversion_is_a_no_op_and_an_unfinished_one_goes_on(tmp_path, monkeypatch):
    source, work = tmp_path / "in", tmp_path / "work"
    study = write_series(source / "a", SeriesDescription="t1_mprage")
    write_series(source / "b", SeriesDescription="t2_tse", StudyDate="20200103")
    expected = Cohort.read(source, work=work).table
    runs = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: runs.append(a) or run(*a, **k))
    assert Cohort.read(source, work=work).table.equals(expected)
    assert runs == []
    (work / "conversion.json").unlink()
    victim = next(work.rglob("series.json")).parent
    for file in victim.iterdir():
        file.unlink()
    victim.rmdir()
    (work / ".converting-x").mkdir()
    (work / ".converting-x" / "scan.nii.gz").touch()
    assert Cohort.read(source, work=work).table.equals(expected)
    assert len(runs) == 1
    write_series(source / "c", SeriesDescription="t2_flair", study=study)
    assert len(Cohort.read(source, work=work).table) == 3
    assert len(runs) == 2


def test_a_work_folder_of_something_else_is_not_touched(tmp_path):
    write_series(tmp_path / "in")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(CohortError, match="not empty"):
        Cohort.read(tmp_path / "in", work=tmp_path / "work")


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    write_series(tmp_path / "in")
    monkeypatch.setitem(__import__("sys").modules, "dcm2niix", None)
    with pytest.raises(UsageError, match=r'pip install "brainfound\[dicom\]"'):
        Cohort.read(tmp_path / "in", work=tmp_path / "work")


def test_listing_converts_for_the_moment_only(tmp_path):
    from typer.testing import CliRunner

    from brainfound.cli.main import app

    write_series(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["list", "cohort", str(tmp_path / "in")])
    assert result.exit_code == 0
    assert "DICOM" in result.output
    assert "T1w 1" in result.output
    assert "4711" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_but_faulty_series_is_one_clear_line(tmp_path):
    write_series(tmp_path / "in", Modality="CT")
    with pytest.raises(CohortError, match=r"no series could be converted \(got im0: modality CT"):
        Cohort.read(tmp_path / "in", work=tmp_path / "work")


GR, SE = {"ScanningSequence": "GR"}, {"ScanningSequence": "SE"}


@pytest.mark.parametrize(
    ("sidecar", "contrast"),
    [
        ({"SeriesDescription": "t1_mprage_sag_p2"}, "T1w"),
        ({"SeriesDescription": "Ax T1 FSPGR +C"}, "T1ce"),
        ({"SeriesDescription": "t1_space_post gd"}, "T1ce"),
        ({"SeriesDescription": "T1 pre contrast"}, "T1w"),
        ({"SeriesDescription": "T1 w/o contrast"}, "T1w"),
        ({"SeriesDescription": "Sag T1 FLAIR"}, "T1w"),
        ({"SeriesDescription": "t2_space_dark-fluid"}, "FLAIR"),
        ({"SeriesDescription": "AX T2 FLAIR"}, "FLAIR"),
        ({"SeriesDescription": "t2_tse_tra"}, "T2w"),
        ({"SeriesDescription": "T2* GRE"}, "T2starw"),
        ({"SeriesDescription": "SWI_Images", "ProtocolName": "t2_swi3d"}, "SWI"),
        ({"SeriesDescription": "ep2d_diff_b1000"}, "DWI"),
        ({"SeriesDescription": "ep2d_diff_ADC"}, "ADC"),
        ({"SeriesDescription": "x", "ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]}, "ADC"),
        ({"SeriesDescription": "x", "ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "TRACEW"]}, "DWI"),
        ({"SeriesDescription": "ep2d_diff", "ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "FA"]}, "unknown"),
        ({"SeriesDescription": "TOF_3D"}, "MRA"),
        ({"SeriesDescription": "TOF", "ImageType": ["DERIVED", "SECONDARY", "MIP"]}, "unknown"),
        ({"SeriesDescription": "localizer t1"}, "unknown"),
        ({"SeriesDescription": "ep2d_bold_rest"}, "unknown"),
        ({"SeriesDescription": "PD and T2"}, "unknown"),
        ({"SeriesDescription": "T1 map"}, "unknown"),
        ({"SeriesDescription": "series 4", "ProtocolName": "t2_tse"}, "T2w"),
        ({**GR, "EchoTime": 0.003, "RepetitionTime": 2.3, "InversionTime": 0.9}, "T1w"),
        ({**GR, "EchoTime": 0.003}, "unknown"),
        ({**SE, "SeriesDescription": "Ax T2 FLAIR", "EchoTime": 0.12, "RepetitionTime": 9}, "FLAIR"),
        ({"SeriesDescription": "TOF", "ImageType": ["DERIVED", "PRIMARY", "MAX_IP"]}, "unknown"),
        ({**SE, "EchoTime": 0.1, "RepetitionTime": 4}, "T2w"),
        ({**SE, "EchoTime": 0.1, "RepetitionTime": 9, "InversionTime": 2.5}, "FLAIR"),
        ({"ScanningSequence": "EP_SE", "EchoTime": 0.1, "RepetitionTime": 4}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_contrasts_of_series(sidecar, contrast):
    assert contrast_from_sidecar(json.loads(json.dumps(sidecar))) == contrast


@pytest.mark.parametrize(
    ("header", "contrast"),
    [
        ({"ContrastBolusAgent": "Gadovist 7 ml"}, "T1ce"),
        ({"ContrastBolusIngredient": "GADOLINIUM"}, "T1ce"),
        ({"ContrastBolusAgentSequence": [code("Gadoteric acid")]}, "T1ce"),
        ({"ContrastBolusAgent": "DOTAREM", "SeriesDescription": "T1 pre contrast"}, "T1w"),
        ({"ContrastBolusAgent": "Gadavist", "SeriesDescription": "t2_tse_tra"}, "T2w"),
        ({"ContrastBolusAgent": "NO CONTRAST"}, "T1w"),
        ({"ContrastBolusAgent": "", "ContrastBolusIngredient": "NONE"}, "T1w"),
        ({"ContrastBolusAgent": "0 ml"}, "T1w"),
        ({"ContrastBolusAgentSequence": []}, "T1w"),
        ({"ContrastBolusAgent": "Gadovist", "SharedFunctionalGroupsSequence": [usage("NO")]}, "T1w"),
        ({"ContrastBolusAgent": "Gadovist", "SharedFunctionalGroupsSequence": [usage("YES")]}, "T1ce"),
    ],
)
def test_an_agent_in_the_header_makes_a_t1w_a_t1ce(tmp_path, header, contrast):
    write_series(tmp_path / "in" / "p1", **header)
    (session,) = Cohort.read(tmp_path / "in", work=tmp_path / "work").sessions()
    assert list(session.scans) == [contrast]
    assert "gado" not in text_of(tmp_path / "work")


def series_in(folder: Path, *headers: dict[str, str]) -> list[Series]:
    """The series of files that hold only a header, each in a study of its own below one folder."""
    for number, header in enumerate(headers):
        write_series(folder / "top" / f"scan{number}", pixels=False, **{"StudyDate": f"20{10 + number}0305", **header})
    return find_series(folder, sorted(file for file in folder.rglob("im*")), [])


def person(name: str = "", birth: str = "", age: str = "", sex: str = "", **header: str) -> dict[str, str]:
    facts = {
        "SpecificCharacterSet": "ISO_IR 192",
        "PatientName": name,
        "PatientBirthDate": birth,
        "PatientAge": age,
        "PatientSex": sex,
    }
    return {"PatientID": "lab7", **facts, **header}


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ((person("KLEE^PAUL"), person("ARP^JEAN")), "different names"),
        ((person("K^K"), person("A^A")), "different names"),
        ((person("case17"), person("case18")), "different names"),
        ((person("KLEE^ANNI"), person("ALBERS^ANNI")), "different names"),
        ((person("KLEE^ANNI", "19600203"), person("KLEE^ANNI", "19610203")), "different birth dates"),
        ((person(age="061Y"), person(age="034Y")), "ages"),
        ((person(age="047Y"), person(age="046Y")), "ages"),
        ((person(age="029Y"), person(age="047Y")), "ages"),
        ((person(age="010M"), person(age="002M")), "ages"),
        ((person(age="061Y", StudyDate="20200101"), person(age="034Y", StudyDate="20200101")), "ages"),
        ((person(sex="M"), person(sex="F")), "both sexes"),
        ((person("KLEE^PAUL", PatientID="x1"), person("KLEE^PAUL", PatientID="X1")), "capital letters"),
    ],
)
def test_one_patient_id_with_two_persons_is_refused_at_any_depth(tmp_path, headers, why):
    with pytest.raises(CohortError, match=why) as caught:
        series_in(tmp_path, *headers)
    assert "manifest" in str(caught.value)
    assert not any(word in str(caught.value).lower() for word in ("klee", "anni", "lab7", "case1"))


@pytest.mark.parametrize(
    "headers",
    [
        (person("KLEE^PAUL"), person("Klee^Paul^E")),
        (person("KLEE^PAUL^^Dr"), person("paul klee"), person("")),
        (person("MÜLLER^EVA"), person("Mu\u0308ller^Eva^Maria")),
        (person("KLEE^ANNI", "19600203"), person("ALBERS^ANNI", "19600203")),
        (person("P5_v1"), person("P5_v2")),
        (person("ANONYMOUS", "19000101"), person("KLEE^PAUL", "18791218")),
        (person(birth="19600101"), person(birth="19600704")),
        (person(age="047Y"), person(age="000Y"), person(age="049Y")),
        (person(age="013M"), person(age="001Y"), person(age="002Y")),
        (person(age="045Y"), person(age="045Y")),
        (person(age="045Y", StudyDate=""), person(age="040Y", StudyDate="")),
    ],
)
def test_one_person_written_in_two_ways_is_one_subject(tmp_path, headers):
    assert len({series.subject for series in series_in(tmp_path, *headers)}) == 1


def test_two_persons_in_one_series_number_are_not_mixed(tmp_path):
    write_series(tmp_path / "a", pixels=False, PatientID="a")
    write_series(tmp_path / "b", pixels=False, PatientID="b")
    for file in tmp_path.rglob("im*"):
        header = pydicom.dcmread(file)
        header.SeriesInstanceUID = "1.2.3"
        header.save_as(file)
    series = find_series(tmp_path, sorted(tmp_path.rglob("im*")), [])
    assert [len(one.files) for one in series] == [6, 6]
    assert len({one.subject for one in series}) == 2


@pytest.mark.parametrize(
    ("text", "years"),
    [("045Y", 45), ("006M", 0.5), ("000Y", None), ("000D", None), ("999Y", None), ("110Y", None), ("", None)],
)
def test_placeholders_are_no_age(text, years):
    assert _age_years(text) == years
