"""Manifests as people and Excel write them."""

from __future__ import annotations

import pandas as pd
import pytest

from brainfound.data.cohort import Cohort
from brainfound.errors import CohortError

ROWS = "subject{0}contrast{0}path{0}age_years\n007{0}T1w{0}a.nii{0}45.5\n"


@pytest.mark.parametrize(
    ("name", "separator", "encoding"),
    [
        ("manifest.csv", ",", "utf-8"),
        ("manifest.csv", ";", "utf-8-sig"),
        ("manifest.csv", "\t", "utf-8"),
        ("manifest.tsv", "\t", "utf-8-sig"),
        ("manifest.tsv", "\t", "utf-16"),
        ("manifest.tsv", ",", "utf-8"),
        ("other.CSV", ";", "utf-8"),
    ],
)
def test_tables_of_excel_are_understood(tmp_path, name, separator, encoding):
    (tmp_path / name).write_bytes(ROWS.format(separator).encode(encoding))
    cohort = Cohort.read(tmp_path / name)
    (session,) = cohort.sessions()
    assert session.subject == "007"
    assert session.covariates["age_years"] == 45.5
    assert session.scans["T1w"] == tmp_path / "a.nii"
    usual = "\t" if name.endswith("tsv") else ","
    assert bool(cohort.notes) == (separator != usual)


@pytest.mark.parametrize(
    ("encoding", "inferred"),
    [
        *[("utf-8", ""), ("utf-8-sig", ""), ("utf-16", ""), ("utf-32", "")],
        *[("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"), ("latin-1", "Latin-1"), ("cp1252", "Latin-1")],
    ],
)
def test_an_encoding_is_recognised_and_an_inferred_one_is_noted(tmp_path, encoding, inferred):
    text = "subject,contrast,path,age,ward\nZoë,T1w,a.nii,31.5,Jülich\n"
    (tmp_path / "manifest.csv").write_bytes(text.encode(encoding))
    cohort = Cohort.read(tmp_path)
    (session,) = cohort.sessions()
    assert (session.subject, session.covariates["age_years"], session.covariates["ward"]) == ("Zoë", 31.5, "Jülich")
    assert bool(cohort.notes) == bool(inferred)
    assert all(inferred in note for note in cohort.notes)


@pytest.mark.parametrize(
    "content", [b"subject,contrast,path\n\x81\x8d,T1w,a.nii\n", b"subject,contrast,path\n\0,T1w,a\n"]
)
def test_an_encoding_that_cannot_be_recognised_is_one_clear_line(tmp_path, content):
    (tmp_path / "manifest.csv").write_bytes(content)
    with pytest.raises(CohortError, match="encoding .* not recognised.*CSV UTF-8"):
        Cohort.read(tmp_path)


def test_a_comma_in_an_age_says_what_to_write(tmp_path):
    (tmp_path / "manifest.csv").write_text("subject;contrast;path;age\n1;T1w;a.nii;45,5\n")
    cohort = Cohort.read(tmp_path)
    assert cohort.table["age_years"].isna().all()
    assert any("line 2 '45,5'. Write years with a point (45.5) or n/a" in note for note in cohort.notes)


def test_a_row_with_too_many_fields_is_refused_and_not_cut(tmp_path):
    (tmp_path / "manifest.csv").write_text("subject,contrast,path,age\n1,T1w,a.nii,45\n2,T1w,b.nii,45,5\n")
    with pytest.raises(CohortError, match=r"line 3: a row has more fields .*got 5 fields, expected 4"):
        Cohort.read(tmp_path)
    (tmp_path / "manifest.csv").write_text("subject,contrast,path,age\n1,T1w,a.nii,45,,\n")
    assert Cohort.read(tmp_path).table["age_years"][0] == 45


@pytest.mark.parametrize("values", [[7, 8], [7.0, 8.0], ["7", "8"]])
def test_identifiers_of_parquet_are_text(tmp_path, values):
    table = pd.DataFrame({"subject": values, "session": [1.0, None], "contrast": "T1w", "path": ["a.nii", "b.nii"]})
    table.to_parquet(tmp_path / "manifest.parquet")
    assert [(s.subject, s.session) for s in Cohort.read(tmp_path).sessions()] == [("7", "1"), ("8", "1")]


def test_leading_zeros_of_text_stay(tmp_path):
    table = pd.DataFrame({"subject": ["007", "7"], "contrast": "T1w", "path": ["a.nii", "b.nii"]})
    for name, write in (("m.parquet", table.to_parquet), ("m.csv", lambda file: table.to_csv(file, index=False))):
        write(tmp_path / name)
        assert len(Cohort.read(tmp_path / name)) == 2


def test_columns_of_several_kinds_become_text(tmp_path):
    (tmp_path / "manifest.csv").write_text("subject,contrast,path,score\n1,T1w,a.nii,3\n2,T1w,b.nii,high\n")
    assert [s.covariates["score"] for s in Cohort.read(tmp_path).sessions()] == ["3", "high"]
    table = pd.DataFrame({"subject": ["1", "2"], "contrast": "T1w", "path": ["a.nii", "b.nii"]})
    table["when"] = pd.to_datetime(["2020-01-02", None])
    table["lists"] = [[1, 2], [3]]
    table.to_parquet(tmp_path / "m.parquet")
    cohort = Cohort.read(tmp_path / "m.parquet")
    (first, second) = cohort.sessions()
    assert first.covariates["when"].startswith("2020-01-02")
    assert second.covariates["when"] is None
    assert isinstance(first.covariates["lists"], str)
    assert any("'lists'" in note for note in cohort.notes)


def test_an_empty_cell_is_filled_from_another_row_of_its_session(tmp_path):
    rows = "1\tT1w\ta.nii\tx\t\tmale\n1\tFLAIR\tb.nii\tx\t61\tM\n1\tT1w\tc.nii\ty\t\t\n"
    (tmp_path / "manifest.tsv").write_text(f"subject\tcontrast\tpath\tsession\tage\tsex\n{rows}")
    table = Cohort.read(tmp_path).table
    assert list(table["age_years"][:2]) == [61, 61]
    assert list(table["sex"][:2]) == ["M", "M"]
    assert table["age_years"].isna()[2]  # another visit


@pytest.mark.parametrize(
    ("column", "values"), [("age", ("61", "62")), ("gender", ("w", "male")), ("relapse", ("0", "1")), ("site", "ab")]
)
def test_rows_of_a_session_that_contradict_each_other_are_refused(tmp_path, column, values):
    rows = f"1\tT1w\ta.nii\t\n\n1\tFLAIR\tb.nii\t{values[0]}\n1\tT2w\tc.nii\t{values[1]}\n"
    (tmp_path / "manifest.tsv").write_text(f"subject\tcontrast\tpath\t{column}\n{rows}")
    with pytest.raises(CohortError, match=r"manifest.tsv, line 5, column '\w+': rows of one session .* in line 4\)"):
        Cohort.read(tmp_path)


def test_columns_on_scans_may_differ_and_a_further_mask_is_not_lost_in_silence(tmp_path):
    rows = "1\tT1w\ta.nii\t2.9\tm.nii\n1\tFLAIR\tb.nii\t87\tn.nii\n"
    (tmp_path / "manifest.tsv").write_text(f"subject\tcontrast\tpath\techo_ms\tmask\n{rows}")
    cohort = Cohort.read(tmp_path)
    assert any("'echo_ms'" in note for note in cohort.notes)
    assert list(cohort.unused) == [(tmp_path / "n.nii", "a further label map (mask) of its session")]


def test_repeated_rows_are_dropped_and_shared_files_are_noted(tmp_path):
    row = "1\tT1w\ta.nii\n"
    (tmp_path / "manifest.tsv").write_text(f"subject\tcontrast\tpath\n{row}{row}1\tT1w\tb.nii\n2\tT1w\ta.nii\n")
    cohort = Cohort.read(tmp_path)
    assert len(cohort.table) == 3
    assert any("1 rows repeat" in note for note in cohort.notes)
    assert any("1 files are listed for more than one subject" in note for note in cohort.notes)


def test_subjects_that_are_spelled_alike_are_noted(tmp_path):
    (tmp_path / "manifest.tsv").write_text("subject\tcontrast\tpath\np1\tT1w\ta.nii\nP01\tT1w\tb.nii\n")
    cohort = Cohort.read(tmp_path)
    assert cohort.notes == ["P01 and p1 are spelled alike; they count as different people"]
    assert cohort.table["subject"].tolist() == ["p1", "P01"]


def test_names_of_columns_are_found_in_any_case(tmp_path):
    (tmp_path / "manifest.csv").write_text("Participant_ID, Session_ID,Contrast,Path,Age,Sex\n1,a,t1,a.nii,40,F\n")
    (session,) = Cohort.read(tmp_path).sessions()
    assert (session.subject, session.session) == ("1", "a")
    assert session.covariates["age_years"] == 40
    assert session.covariates["sex"] == "F"


def test_a_manifest_may_lead_anywhere(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "manifest.tsv").write_text("subject\tcontrast\tpath\n1\tT1w\t../a.nii\n2\tT1w\t/b.nii\n")
    paths = [str(s.scans["T1w"]) for s in Cohort.read(tmp_path / "here").sessions()]
    assert paths == [str(tmp_path / "here" / ".." / "a.nii"), "/b.nii"]


@pytest.mark.parametrize("content", ["", "\n", "\x00\x01", "subject\n"])
def test_rubbish_is_one_clear_line(tmp_path, content):
    (tmp_path / "manifest.tsv").write_text(content)
    with pytest.raises(CohortError, match=r"manifest.tsv: [^\n]*$"):
        Cohort.read(tmp_path)


def test_a_blank_cell_is_empty(tmp_path):
    (tmp_path / "manifest.tsv").write_text("subject\tcontrast\tpath\n1\tT1w\ta.nii\n  \tT1w\tb.nii\n")
    with pytest.raises(CohortError, match="line 3: column 'subject' is empty"):
        Cohort.read(tmp_path)


def test_blank_lines_before_the_header_are_passed_over(tmp_path):
    (tmp_path / "manifest.csv").write_text("\n \r\nsubject,contrast,path,age\n1,T1w,a.nii,45\n2,T1w,b.nii,45,5\n")
    with pytest.raises(CohortError, match="line 5: a row has more fields"):
        Cohort.read(tmp_path)
    (tmp_path / "manifest.csv").write_text("\n\nsubject,contrast,path,age\n1,T1w,a.nii,45\n")
    assert Cohort.read(tmp_path).table["age_years"][0] == 45


def test_the_word_none_is_a_label_and_not_a_missing_one(tmp_path):
    rows = "".join(f"{n}\tT1w\t{n}.nii\t{word}\n" for n, word in enumerate(("None", "mild", "n/a", "", "NA"), start=1))
    (tmp_path / "manifest.tsv").write_text(f"subject\tcontrast\tpath\tlabel\n{rows}")
    assert [s.covariates["label"] for s in Cohort.read(tmp_path).sessions()] == ["None", "mild", None, None, None]


def test_a_foreign_manifest_says_to_rename_it(tmp_path):
    (tmp_path / "manifest.csv").write_text("file,md5\na,b\n")
    with pytest.raises(CohortError, match="rename the file if it is not a manifest"):
        Cohort.read(tmp_path)


def test_tissue_maps_of_a_manifest_are_label_maps(tmp_path):
    (tmp_path / "manifest.tsv").write_text("subject\tcontrast\tpath\tdseg\n1\tT1w\ta.nii\tb.nii\n")
    cohort = Cohort.read(tmp_path)
    (session,) = cohort.sessions()
    assert session.masks == {"dseg": tmp_path / "b.nii"}
    assert "dseg" not in session.covariates
