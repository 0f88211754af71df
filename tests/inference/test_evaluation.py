"""Scores of a trained model: of subjects that it never saw, and of nobody else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.splits.training_history import subject_hash
from brainfound.data.store.prepare import prepare
from brainfound.errors import BrainFoundError, ModelError, UsageError
from brainfound.inference.evaluation import compute_drops, evaluate
from brainfound.metrics.cases import compute_headline_score
from brainfound.metrics.comparison import compare, score_intervals
from tests.tiny_runs import subjects_by_part


def subjects(result) -> set[str]:
    return set(result.cases["subject"])


def test_the_test_part_gets_the_scores_that_the_run_wrote(run, small_store):
    (result,) = evaluate(run, small_store)
    assert subjects(result) == subjects_by_part(run)["test"]
    written = json.loads((run / "scores.json").read_text())
    assert result.to_dict()["scores"] == pytest.approx(written["scores"])
    assert result.to_dict()["trivial"] == pytest.approx(written["trivial"])
    metric, value, trivial = result.headline
    assert (metric, value, trivial) == ("auroc", result.scores["auroc"], 0.5)
    (watched,) = evaluate(run, small_store, part="validation")
    assert subjects(watched) == subjects_by_part(run)["validation"]


def test_cases_of_an_evaluation_are_what_a_comparison_takes(run, small_store):
    (result,) = evaluate(run, small_store)
    found = score_intervals(result.cases, num_resamples=20).set_index("metric")["value"]
    assert found.to_dict() == pytest.approx(result.scores, nan_ok=True)
    (other,) = evaluate(run, small_store, without=[small_store.contrasts[0]])
    table = compare({"full": result.cases, "part": other.cases}, "full", num_resamples=20, num_permutations=20)
    of_part = table[table["system"] == "part"].set_index("metric")["value"]
    assert of_part.to_dict() == pytest.approx(other.scores, nan_ok=True)


def test_a_bundle_remembers_its_split_wherever_it_lies(run, small_store, tmp_path):
    moved = shutil.copytree(run / "export", tmp_path / "elsewhere")
    (result,) = evaluate(moved, small_store)
    assert subjects(result) == subjects_by_part(run)["test"]
    assert result.to_dict() == evaluate(run, small_store)[0].to_dict()


def test_a_bundle_names_no_subject(run):
    text = (run / "export" / "bundle.json").read_text()
    split = json.loads(text)["metadata"]["split"]
    for part, names in subjects_by_part(run).items():
        assert split["subjects"][part] == sorted(subject_hash(name, split["salt"], split["rounds"]) for name in names)
        assert not any(f'"{name}"' in text for name in names)
    card = (run / "export" / "README.md").read_text()
    assert not any(name in card for names in subjects_by_part(run).values() for name in names)


def test_another_cohort_never_scores_who_was_learnt_from(run, other_store, tmp_path):
    known = subjects_by_part(run)["train"] | subjects_by_part(run)["validation"]
    expected = set(other_store.sessions["subject"]) - known - {f"new-{name}" for name in known}
    assert {"other-s00", "other-s01"} <= expected
    assert subjects_by_part(run)["test"] - {"s00"} <= expected
    moved = shutil.copytree(run / "export", tmp_path / "elsewhere")
    for model in (run, moved):
        (result,) = evaluate(model, other_store)
        assert subjects(result) == expected
        num_left_out = len(other_store) - len(result.cases)
        (note,) = [note for note in result.notes if "are left out" in note]
        assert note.startswith(f"{num_left_out} of {len(other_store)} labelled sessions are left out: their subjects")
        assert note.endswith(f"({num_left_out} by image, the others by name)")
    bare = json.loads((moved / "bundle.json").read_text())
    split = bare["metadata"]["split"]
    split["subjects"]["train"] += [subject_hash(name, split["salt"], split["rounds"]) for name in expected]
    (moved / "bundle.json").write_text(json.dumps(bare))
    with pytest.raises(UsageError, match="no labelled session"):
        evaluate(moved, other_store)


def test_sessions_without_a_label_are_counted(run, other_store, tmp_path, monkeypatch):
    (before,) = evaluate(run, other_store)
    labels = other_store.sessions["diagnosis"].where(other_store.sessions["subject"] != "other-s00", None)
    monkeypatch.setitem(other_store.sessions, "diagnosis", labels)
    (scored,) = evaluate(run, other_store)
    total = len(before.cases)
    assert len(scored.cases) == total - 1
    assert f"1 of {total} sessions have no diagnosis: not scored" in scored.notes
    assert not [note for note in before.notes if "not scored" in note]


def test_partial_input_and_withheld_contrasts_exclude_each_other(run, small_store):
    with pytest.raises(UsageError, match=r"--without with --partial-input.*every subset.*got T2w.*Leave one"):
        evaluate(run, small_store, without=["T2w"], partial_input=True)


def test_partial_input_asks_about_every_subset_full_input_first(run, small_store):
    results = evaluate(run, small_store, partial_input=True)
    assert len(results) == 2**3 - 1
    assert results[0].without == ()
    assert len({result.without for result in results}) == 7
    assert [len(result.without) for result in results] == [0, 1, 1, 1, 2, 2, 2]
    single = evaluate(run, small_store, without=results[4].without)[0]
    pd.testing.assert_frame_equal(single.cases, results[4].cases)
    assert not single.cases["p(patient)"].equals(results[0].cases["p(patient)"])


def test_questions_without_an_answer(run, small_store, encoder_export):
    with pytest.raises(UsageError, match="SWI is not a contrast"):
        evaluate(run, small_store, without=["SWI"])
    with pytest.raises(UsageError, match="no session is left"):
        evaluate(run, small_store, without=small_store.contrasts)
    with pytest.raises(UsageError, match="no such part .got tset"):
        evaluate(run, small_store, part="tset")
    with pytest.raises(ModelError, match="Fine-tune it first"):
        evaluate(encoder_export, small_store)


def test_a_store_that_was_prepared_otherwise_is_refused_with_the_remedy(run, source, tmp_path):
    table = pd.read_csv(source / "manifest.tsv", sep="\t", dtype=str).query("subject == 's03'")
    for column in ("path", "mask"):
        table[column] = [str(source / name) for name in table[column]]
    table.to_csv(tmp_path / "manifest.tsv", sep="\t", index=False)
    store = prepare(tmp_path / "manifest.tsv", tmp_path / "store", Preprocessing(spacing_mm=(5, 5, 5), size=(32, 32)))
    with pytest.raises(UsageError, match="--like") as refused:
        evaluate(run, store)
    assert "spacing_mm" in str(refused.value)


def test_the_drop_is_against_full_input_on_the_same_sessions(run, small_store):
    results = evaluate(run, small_store, partial_input=True)
    lost = compute_drops(results)
    assert lost[0] == 0
    assert lost[1:] == pytest.approx([results[0].scores["auroc"] - r.scores["auroc"] for r in results[1:]], nan_ok=True)
    # A row with fewer sessions is compared with full input on those.
    few = replace(results[1], cases=results[1].cases[1:])
    full = compute_headline_score("classification", results[0].cases[1:])
    assert compute_drops([results[0], few])[1] == pytest.approx(
        full - compute_headline_score("classification", few.cases), nan_ok=True
    )


def test_other_people_with_the_same_names_need_other_names(run, source, small_store, make_cohort, tmp_path):
    make_cohort(tmp_path / "source", num_subjects=3, seed=9)
    table = pd.read_csv(tmp_path / "source" / "manifest.tsv", sep="\t", dtype=str)
    learnt = sorted(subjects_by_part(run)["train"])
    names = dict(zip(sorted(set(table["subject"])), learnt, strict=False))
    table.assign(subject=table["subject"].map(names)).to_csv(
        tmp_path / "source" / "manifest.tsv", sep="\t", index=False
    )
    other = prepare(tmp_path / "source", tmp_path / "store", small_store.preprocessing)
    with pytest.raises(UsageError, match="by name only: if they are other people.*manifest with other names"):
        evaluate(run, other)


def test_an_evaluation_leaves_a_page_that_names_nobody(run, small_store, tmp_path):
    results = evaluate(run, small_store, partial_input=True, out=tmp_path / "page", command="brainfound evaluate run")
    page = (tmp_path / "page" / "report.md").read_text()
    assert page.startswith("# diagnosis: every subset of the contrasts of run on the test part of its own store")
    for result in results:
        assert f"| {result.scores['auroc']:.3f} |" in page
    assert (tmp_path / "page" / "report.png").is_file()
    cases = pd.read_csv(tmp_path / "page" / "cases.tsv", sep="\t")
    assert cases["row"].tolist() == results[0].cases["row"].tolist()
    text = "".join(file.read_text() for file in (tmp_path / "page").iterdir() if file.suffix != ".png")
    assert not any(f"{name}" in text for name in small_store.sessions["subject"])
    assert str(tmp_path) not in text
    (whole,) = evaluate(run, small_store, out=tmp_path / "page")  # replaces its own
    page = (tmp_path / "page" / "report.md").read_text()
    assert f"**{whole.verdict['text']}**" in page.split("## Scores")[0]
    assert "![scores in a picture](report.png)" in page
    (tmp_path / "page" / "summary.json").write_text('{"kind": ')
    with pytest.raises(BrainFoundError, match=r"summary\.json: not valid JSON.*another --out"):
        evaluate(run, small_store, out=tmp_path / "page")
    (tmp_path / "page" / "summary.json").unlink()
    with pytest.raises(UsageError, match="holds something else"):
        evaluate(run, small_store, out=tmp_path / "page")
