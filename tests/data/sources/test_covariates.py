"""What the values of a table mean: ages, words for the sexes, and codes for missing values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from brainfound.data.cohort import Cohort


def read_column(folder: Path, column: str, *values: str, sidecar: dict | None = None) -> tuple[list, str]:
    """A column of a manifest with one subject per value, as the cohort has it, and the notes as one text."""
    rows = [f"p{number:02d},T1w,{number}.nii,{value}" for number, value in enumerate(values)]
    (folder / "manifest.csv").write_text("\n".join([f"subject,contrast,path,{column}", *rows]), encoding="utf-8")
    if sidecar is not None:
        (folder / "manifest.json").write_text(json.dumps(sidecar), encoding="utf-8")
    cohort = Cohort.read(folder)
    name = {"age": "age_years", "Gender": "sex"}.get(column, column)
    return [session.covariates[name] for session in cohort.sessions()], "\n".join(cohort.notes)


@pytest.mark.parametrize(
    ("text", "years"),
    [
        *[("47.25", 47.25), (" 47 ", 47), ("85+", 85), ("85 +", 85), (">85", 85), (">= 85", 85), ("≥85", 85)],
        *[("047Y", 47), ("018M", 1.5), ("026W", 26 * 7 / 365.25), ("47y", 47), ("47 years", 47), ("18 months", 1.5)],
        *[("0", 0), ("n/a", None), ("", None)],
    ],
)
def test_ages_that_are_understood(tmp_path, text, years):
    (age, _), notes = read_column(tmp_path, "age", text, "33")
    assert notes == ""
    assert (age is None) if years is None else math.isclose(age, years)


@pytest.mark.parametrize("text", ["40-44", "40 to 44", "<18", "adult", "Unknown", "None", "7M", "33M", "inf", "47;5"])
def test_an_age_that_is_not_a_number_is_missing_and_noted(tmp_path, text):
    (known, age), notes = read_column(tmp_path, "age", "52", text)
    assert (known, age) == (52, None)
    assert f"manifest.csv: 1 × an age that is not a number, now missing: line 3 {text!r}" in notes


@pytest.mark.parametrize("text", ["-3", "-9", "-99", "-999", "999", "9999", "212"])
def test_an_age_that_cannot_be_one_is_missing_and_noted(tmp_path, text):
    ages, notes = read_column(tmp_path, "age", "52", "61", text)
    assert ages == [52, 61, None]
    assert f"now missing: line 4 '{text}'" in notes


def test_ages_from_110_years_on_are_kept_and_noted(tmp_path):
    ages, notes = read_column(tmp_path, "age", "109", "110", "124")
    assert ages == [109, 110, 124]
    assert "2 × an age of 110 years or more, kept: line 3 '110', line 4 '124'. If these are months" in notes


def test_lines_are_those_of_the_file_and_dates_of_birth_are_not_repeated(tmp_path):
    _, notes = read_column(tmp_path, "age", "52\n", "1961-04-30", *["old"] * 5)
    assert "6 × an age" in notes
    assert "line 4 a date or a long number, line 5 'old'" in notes
    assert notes.count("'old'") == 4
    assert "and 1 more" in notes
    assert "1961" not in notes


def test_an_age_in_a_unit_of_its_own_outranks_the_sidecar(tmp_path):
    ages, notes = read_column(tmp_path, "age", "30", "003Y", "999", sidecar={"age": {"Units": "months"}})
    assert ages == [2.5, 3, None]
    assert "given in months" in notes


@pytest.mark.parametrize(
    ("header", "row", "described", "years"),
    [
        ("Age_Years,AGE", "34,408", "AGE", 34),
        ("age,age_years", "408,34", "age", 34),
        ("age_years,age", "408,34", "age_years", 34),
        ("age_at_scan,age", "408,34", "age_at_scan", 34),
        ("Alter", "408", "alter", 34),
    ],
)
def test_a_unit_belongs_to_its_column(tmp_path, header, row, described, years):
    (tmp_path / "manifest.csv").write_text(f"subject,contrast,path,{header}\np1,T1w,a.nii,{row}\n")
    (tmp_path / "manifest.json").write_text(json.dumps({described: {"Units": "months"}}))
    (session,) = Cohort.read(tmp_path).sessions()
    assert session.covariates["age_years"] == years


def test_levels_belong_to_their_column(tmp_path):
    (tmp_path / "manifest.csv").write_text("subject,contrast,path,sex,gender\n1,T1w,a.nii,1,1\n2,T1w,b.nii,,1\n")
    levels = {"sex": {"0": "male", "1": "female"}, "gender": {"1": "man", "2": "woman"}}
    (tmp_path / "manifest.json").write_text(json.dumps({name: {"Levels": each} for name, each in levels.items()}))
    assert [session.covariates["sex"] for session in Cohort.read(tmp_path).sessions()] == ["F", "M"]


@pytest.mark.parametrize("column", ["sex", "Gender"])
def test_words_for_the_sexes_are_one(tmp_path, column):
    words = ("F", "f", "Female", "woman", "W", "weiblich", "M", "male", "Man", "männlich", "other", "n/a")
    sexes, notes = read_column(tmp_path, column, *words)
    assert sexes == ["F"] * 6 + ["M"] * 4 + ["other", None]
    assert notes == ""


def test_a_sex_that_is_not_known_is_missing_with_a_note(tmp_path):
    sexes, notes = read_column(tmp_path, "sex", "F", "unknown", "Unbekannt", "?")
    assert sexes == ["F", None, None, None]
    assert notes == "manifest.csv: 3 × a sex that is not known, now missing"


def test_columns_of_other_languages_are_ages_and_sexes(tmp_path):
    (tmp_path / "manifest.csv").write_text("subject,contrast,path,Alter,Geschlecht\np1,T1w,a.nii,51,weiblich\n")
    (session,) = Cohort.read(tmp_path).sessions()
    assert (session.covariates["age_years"], session.covariates["sex"]) == (51, "F")


def test_numbers_for_the_sexes_are_not_guessed(tmp_path):
    sexes, notes = read_column(tmp_path, "sex", "1", "2")
    assert sexes == [1, 2]
    assert "the sexes are numbers (1, 2), kept as they are" in notes
    levels = {"1": {"Description": "Male"}, "2": "female"}
    sexes, notes = read_column(tmp_path, "sex", "1", "2", sidecar={"sex": {"Levels": levels}})
    assert (sexes, notes) == (["M", "F"], "")


def test_gender_fills_an_empty_sex_only(tmp_path):
    rows = "1,T1w,a.nii,Man,\n2,T1w,b.nii,Woman,male\n"
    (tmp_path / "manifest.csv").write_text(f"subject,contrast,path,gender,Sex\n{rows}")
    cohort = Cohort.read(tmp_path)
    assert [s.covariates["sex"] for s in cohort.sessions()] == ["M", "M"]
    assert any("1 × a sex from the column 'gender'" in note for note in cohort.notes)


@pytest.mark.parametrize(
    ("values", "is_code"),
    [
        (("27", "24", "-999"), True),
        (("27", "24", "9999"), True),
        (("27", "24", "888"), True),
        (("-1.5", "2", "-9"), True),
        (("3100", "4200", "999"), True),
        (("mild", "none", "-99"), True),
        (("0", "1", "-9"), True),
        (("-20", "4", "-999"), True),
        (("700", "1800", "999"), False),
        (("-20", "4", "-9"), False),
        (("27", "24", "n/a"), False),
    ],
)
@pytest.mark.parametrize("column", ["score", "diagnosis", "site"])
def test_a_code_is_missing_unless_the_column_has_such_values(tmp_path, column, values, is_code):
    found, notes = read_column(tmp_path, column, *values)
    assert [str(value).removesuffix(".0") for value in found[:2]] == list(values[:2])
    assert (found[2] is None) == (is_code or values[2] == "n/a")
    noted = f"column '{column}' holds 1 × a code for a missing value, now missing: line 4 '{values[2]}'"
    assert (noted in notes) == is_code
    assert bool(notes) == is_code


@pytest.mark.parametrize("values", [("850", "920", "999"), ("-8", "-3", "-9"), ("600", "1100", "-3", "-99")])
def test_a_number_that_may_be_a_value_or_a_code_is_kept_and_noted(tmp_path, values):
    found, notes = read_column(tmp_path, "score", *values)
    assert found == [float(value) for value in values]
    assert "'score' holds 1 × a number that may be a code for a missing value, kept" in notes


def test_the_sidecar_says_which_values_a_column_has(tmp_path):
    found, notes = read_column(tmp_path, "depth", "5", "12", "-99", sidecar={"depth": {"Minimum": -100}})
    assert (found, notes) == ([5, 12, -99], "")


@pytest.mark.parametrize("code", ["-9", "-66", "-77", "-88", "-99", "-777", "-888", "-9999", "-99999", "777", "99999"])
def test_each_code_of_other_programs_is_missing(tmp_path, code):
    found, notes = read_column(tmp_path, "score", "27", code, "24")
    assert found == [27, None, 24]
    assert "1 × a code for a missing value, now missing" in notes


def test_a_code_is_no_sex(tmp_path):
    sexes, notes = read_column(tmp_path, "sex", "F", "-9", "M")
    assert sexes == ["F", None, "M"]
    assert "numbers" not in notes


def write_visits(folder: Path, *rows: str) -> str:
    (folder / "manifest.csv").write_text("\n".join(["subject,session,contrast,path,age,sex", *rows]), encoding="utf-8")
    return "\n".join(Cohort.read(folder).notes)


def test_visits_that_contradict_each_other_in_sex_are_counted_and_named(tmp_path):
    notes = write_visits(
        tmp_path,
        *("ada,v1,T1w,a.nii,30,F", "ada,v1,T2w,b.nii,30,F", "ada,v2,T1w,c.nii,31,M"),
        *("ben,v1,T1w,d.nii,40,male", "ben,v2,T1w,e.nii,41,M", "cy,v1,T1w,f.nii,50,F", "cy,v2,T1w,g.nii,51,"),
    )
    assert "manifest.csv: 1 × a subject whose sexes differ between visits: ada (line 2 'F', line 4 'M')." in notes


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        *[("v1", "v2"), ("v2", "v10"), ("baseline", "m06"), ("m06", "m12"), ("2019-03-04", "2020-05-06"), ("1", "2")],
        *[("20190304", "20200506"), ("06.05.2019", "04.03.2020"), ("a", "b"), ("pre", "followup2"), ("12m", "24m")],
    ],
)
def test_an_age_that_falls_from_visit_to_visit_is_noted(tmp_path, earlier, later):
    notes = write_visits(tmp_path, f"ada,{later},T1w,a.nii,60,F", f"ada,{earlier},T1w,b.nii,61.5,F")
    assert "1 × a subject whose age falls between visits: ada (line 3 '61.5', line 2 '60')." in notes
    assert "falls" not in write_visits(tmp_path, f"ada,{later},T1w,a.nii,61.5,F", f"ada,{earlier},T1w,b.nii,60,F")


def test_visits_without_a_known_order_say_nothing_of_falling_ages(tmp_path):
    assert write_visits(tmp_path, "ada,rest,T1w,a.nii,60,F", "ada,task,T1w,b.nii,61,F") == ""


def test_tables_of_bids_are_compared_over_visits(layout):
    scans = [f"sub-7/ses-{n}/anat/sub-7_ses-{n}_T1w.nii.gz" for n in (1, 2)]
    text = "session_id\tage\tsex\nses-1\t33\tF\nses-2\t32\tM\n"
    notes = "\n".join(Cohort.read(layout(*scans, content={"sub-7/sub-7_sessions.tsv": text})).notes)
    assert "a subject whose sexes differ between visits: sub-7 (line 2 'F', line 3 'M')" in notes
    assert "a subject whose age falls between visits: sub-7 (line 2 '33', line 3 '32')" in notes


def test_the_sex_of_a_visit_is_compared_with_that_of_the_person(layout):
    scans = [f"sub-7/ses-{n}/anat/sub-7_ses-{n}_T1w.nii.gz" for n in (1, 2)]
    tables = {
        "participants.tsv": "participant_id\tsex\nsub-7\tF\n",
        "sub-7/sub-7_sessions.tsv": "session_id\tsex\nses-1\tn/a\nses-2\tM\n",
    }
    notes = "\n".join(Cohort.read(layout(*scans, content=tables)).notes)
    assert "sub-*_sessions.tsv and participants.tsv: 1 × a subject whose sexes differ" in notes
    assert "sub-7 ('F', 'M')" in notes
