"""``brainfound check``: the table, its remedies, JSON, the picture, exit codes, and who is named."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from brainfound.data.checking.contract import InputContract


@pytest.fixture
def cohort(tmp_path, make_cohort):
    return make_cohort(tmp_path / "cohort", num_subjects=3)


def test_a_cohort_like_the_model_s_own(cli, cohort, classifier):
    answer = cli("check", cohort, "--model", classifier)
    assert answer.code == 0, answer.out + answer.err
    assert "9 scans of 3 sessions: 9 ✓, 0 !, 0 ✗" in answer.out
    assert not any(f"s0{n}" in answer.out for n in range(3)), "nobody is named"


def test_the_contract_of_a_fine_tuned_model_is_that_of_its_training_part(classifier, small_store):
    contract = InputContract.load(classifier / "export")
    assert contract.contrasts == small_store.contrasts
    assert 0 < contract.num_sessions < len(small_store)
    ages = small_store.sessions["age_years"]
    assert ages.min() <= contract.age_years[0] <= contract.age_years[1] <= ages.max()


def test_a_broken_scan_ends_with_3_and_a_remedy(cli, cohort, classifier):
    file = next(cohort.glob("s01*FLAIR*"))
    file.write_bytes(file.read_bytes()[:3000])
    answer = cli("check", cohort, "--model", classifier)
    assert answer.code == 3
    assert "8 ✓, 0 !, 1 ✗" in answer.out
    (line,) = [line for line in answer.out.splitlines() if line.startswith("✗")]
    assert line.startswith("✗ read: ")
    assert "s01" not in answer.out
    assert ["✗" in line for line in answer.out.splitlines() if "FLAIR" in line] == [False, True, False]
    assert file.name in cli("check", cohort, "--model", classifier, "--keep-ids").out


def test_equal_problems_are_one_line(cli, cohort, small_store, tmp_path):
    heads = dict.fromkeys(small_store.contrasts, "head")
    InputContract.of(small_store).model_copy(update={"skull": heads}).save(tmp_path)
    small_store.preprocessing.save(tmp_path)
    answer = cli("check", cohort, "--model", tmp_path)
    lines = [line for line in answer.out.splitlines() if line.startswith("✗")]
    assert answer.code == 3
    assert len(lines) == 1
    assert "skull (9 times, the first)" in lines[0]
    assert "before skull-stripping" in lines[0]


def test_json(cli, cohort, classifier):
    answer = cli("check", cohort, "--model", classifier, "--json")
    content = json.loads(answer.out)
    assert content["level"] == "ok"
    assert content["has_contract"] is True
    assert content["contract"]["contrasts"] == ["T1w", "T2w", "FLAIR"]
    scan = content["sessions"][2]["scans"][1]
    assert (content["sessions"][2]["row"], scan["contrast"], scan["level"]) == (2, "T2w", "ok")
    assert scan["checks"]["orientation"] == scan["checks"]["intensity"] == "ok"
    assert scan["foreground_ml"] > 100
    assert "subject" not in content["sessions"][0]
    assert "s00" not in answer.out
    named = json.loads(cli("check", cohort, "--model", classifier, "--json", "--keep-ids").out)
    assert named["sessions"][1]["subject"] == "s01"
    assert named["sessions"][1]["scans"][0]["file"].startswith("s01")


def test_files_of_one_session_are_shown_by_name(cli, write_scan):
    t1, odd = write_scan("x_T1w.nii.gz"), write_scan("odd.nii.gz")
    answer = cli("check", t1, f"FLAIR={odd}", "--set-nothing", quiet=False)
    assert answer.code == 2
    answer = cli("check", t1, f"FLAIR={odd}")
    assert answer.code == 0, answer.out
    assert "x_T1w.nii.gz" in answer.out
    assert "2 scans of 1 session" in answer.out
    assert cli("check", odd).code == 2
    assert cli("check", odd, "--contrasts", "T2w").code == 0


def test_the_picture_shows_what_the_model_will_see(cli, cohort, classifier, tmp_path):
    answer = cli("check", cohort, "--model", classifier, "--png", tmp_path / "new" / "seen.png")
    assert answer.code == 0
    page = np.asarray(Image.open(tmp_path / "new" / "seen.png"))
    assert ((page[..., 0] > 100) & (page[..., 0] == page[..., 1])).mean() > 0.1
    orange = (np.abs(page.astype(int) - (255, 157, 46)).max(axis=-1) == 0).sum()
    assert orange == 0
    file = next(cohort.glob("s01*FLAIR*"))
    file.write_bytes(b"broken")
    cli("check", cohort, "--model", classifier, "--png", tmp_path / "new" / "seen.png")
    page = np.asarray(Image.open(tmp_path / "new" / "seen.png"))
    assert (np.abs(page.astype(int) - (255, 157, 46)).max(axis=-1) == 0).sum() > 50


def test_a_model_without_an_input_contract_is_reported(cli, cohort, tmp_path, small_store):
    small_store.preprocessing.save(tmp_path)
    answer = cli("check", cohort, "--model", tmp_path)
    assert answer.code == 0
    assert "carries no input contract" in answer.line


def test_a_store_can_be_what_others_are_compared_with(cli, cohort, small_store):
    assert cli("check", cohort, "--model", small_store.path).code == 0


def test_wrong_usage(cli, cohort, classifier, tmp_path):
    assert cli("check", cohort, "--model", classifier, "--contrasts", "T1w").code == 2
    assert cli("check", cohort, "--contrasts", "T9w").code == 2
    assert cli("check", cohort, "--model", tmp_path / "gone").code == 2
    assert cli("check", tmp_path / "gone").code == 2


def test_no_picture_of_nothing(cli, tmp_path):
    (tmp_path / "T1w.nii.gz").write_bytes(b"broken")
    answer = cli("check", tmp_path / "T1w.nii.gz", "--png", tmp_path / "a.png")
    assert answer.code == 3
    assert (tmp_path / "a.png").is_file()


def test_a_head_is_seen_in_a_file_on_a_turned_grid(cli, tmp_path, head, centred):
    linear = np.array([[0, 0, -3.0], [-3, 0, 0], [0, 3, 0]])
    affine = centred((40, 48, 36), linear)
    nib.save(nib.Nifti1Image(head.image((40, 48, 36), affine), affine), tmp_path / "a_T1w.nii")
    content = json.loads(cli("check", tmp_path / "a_T1w.nii", "--json").out)
    assert content["sessions"][0]["scans"][0]["orientation"] == "PSL"


def test_no_more_cards_are_kept_than_the_picture_has_room_for(cli, make_cohort, tmp_path, monkeypatch):
    from brainfound.cli import check as module

    kept, draw = [], module._Report.write_picture

    def count(report, *arguments):
        kept.append(sorted(report.cards))
        draw(report, *arguments)

    monkeypatch.setattr(module._Report, "write_picture", count)
    monkeypatch.setattr(module, "MAX_CARDS", 2)
    cohort = make_cohort(tmp_path / "seven", num_subjects=7, contrasts=("T1w", "FLAIR"))
    for file in cohort.glob("*FLAIR*"):
        file.write_bytes(b"broken")
    answer = cli("check", cohort, "--contrasts", "T1w,FLAIR", "--png", tmp_path / "seen.png")
    assert answer.code == 3
    assert "of 7 sessions" in answer.out
    # The first two that want a look, and two evenly spread for the case that nothing does.
    assert kept == [[0, 1, 5]]


def test_files_are_read_as_by_predict(cli, cohort, tmp_path):
    silent = tmp_path / "scan.NII.GZ"
    silent.write_bytes(next(cohort.glob("s01*FLAIR*")).read_bytes())
    t1 = next(cohort.glob("s01*T1w*"))
    answer = cli("check", f"T1w={t1}", silent, "--contrasts", "T1w,FLAIR")
    assert answer.code in (0, 3)
    assert "scan.NII.GZ was read as FLAIR: the file name does not state the contrast" in answer.err
    answer = cli("check", f"T1w={t1}", f"flair={t1}", "--contrasts", "T1w,FLAIR")
    assert answer.code == 2
    assert "the same file is given as T1w and as FLAIR" in answer.line
