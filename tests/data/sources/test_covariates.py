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
    ("values", "noted"),
    [
        (("27", "-999", "24"), "line 3 '-999'"),
        (("27", "24", "9999"), "line 4 '9999'"),
        (("-1.5", "2", "-9"), "line 4 '-9'"),
        (("3100", "999", "4200"), "line 3 '999'"),
        (("mild", "-99", "none"), "line 3 '-99'"),
        (("700", "999", "1800"), ""),
        (("-20", "-9", "4"), ""),
        (("27", "24", "n/a"), ""),
    ],
)
def test_numbers_that_may_be_codes_are_kept_and_noted(tmp_path, values, noted):
    found, notes = read_column(tmp_path, "score", *values)
    assert [str(value).removesuffix(".0") for value in found[:2]] == list(values[:2])
    assert noted in notes
    assert bool(noted) == ("'score' holds 1 × a number that may be a code" in notes)


@pytest.mark.parametrize(
    "code", ["-9", "-77", "-88", "-99", "-777", "-888", "-999", "-9999", "-99999", "999", "9999", "99999"]
)
def test_each_code_of_other_programs_is_noted(tmp_path, code):
    _, notes = read_column(tmp_path, "score", "27", code, "24")
    assert "'score' holds 1 × a number that may be a code" in notes
