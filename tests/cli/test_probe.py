"""``brainfound probe``: what frozen embeddings know of label, site and subject."""

from __future__ import annotations

import json

import numpy as np
import pytest

from brainfound.errors import UsageError
from brainfound.finetuning.embedding_cache import slice_embeddings
from brainfound.inference.loading import load
from brainfound.inference.probing import probe
from brainfound.metrics.embedding_probes import site_probe


def test_label_and_site_stand_next_to_each_other(cli, classifier, small_store, tmp_path, monkeypatch):
    arguments = ("probe", classifier, "--data", small_store.path, "--label", "diagnosis", "--slices", 3)
    said = cli(*arguments, "--cache", tmp_path / "kept")
    assert said.code == 0, said.err
    assert "diagnosis" in said.out
    assert "site" in said.out
    assert "test and retest" not in said.out, "every subject has one session"
    # A second question is about what was kept.
    monkeypatch.setattr("brainfound.finetuning.embedding_cache.slice_embeddings", None)
    content = json.loads(cli(*arguments, "--cache", tmp_path / "kept", "--json").out)
    assert (content["num_probed"], content["num_sessions"]) == (12, 12)
    assert content["probed"]["site_chance"] == pytest.approx(1 / 3)
    assert content["probed"]["label_metric"] == "balanced_accuracy"


def test_embeddings_are_the_means_over_the_slices(classifier, small_store):
    encoder = load(classifier).model.get_base_model().brainfound
    slices = np.array([3, 10, 17])
    means = [slice_embeddings(encoder, small_store[i], slices).mean(axis=0) for i in range(12)]
    columns = [small_store.sessions[name].to_numpy() for name in ("site", "age_years", "subject")]
    expected = site_probe(np.stack(means), *columns, seed=4)
    found = probe(classifier, small_store, "age_years", num_slices=3, seed=4)
    assert len(small_store[0].pixels) == 21, "else other slices are read"
    assert found.probed == expected
    assert found.probed.label_metric == "r2"


def test_sessions_of_the_same_subject_are_found(classifier, small_store, monkeypatch):
    monkeypatch.setitem(small_store.sessions, "subject", [f"s{n // 2}" for n in range(12)])
    monkeypatch.setitem(small_store.sessions, "session", ["1", "2"] * 6)
    found = probe(classifier, small_store, num_slices=3)
    assert found.probed is None
    assert found.retest.num_subjects == 6
    assert found.to_dict()["retest"]["chance"] == pytest.approx(1 / 6)


def test_what_few_subjects_leave_undefined_is_no_number(cli, classifier, small_store, monkeypatch):
    monkeypatch.setattr("brainfound.data.store.Store.open", lambda path: small_store)
    monkeypatch.setitem(small_store.sessions, "subject", [f"s{n % 4}" for n in range(12)])
    monkeypatch.setitem(small_store.sessions, "session", [str(n // 4) for n in range(12)])
    monkeypatch.setitem(small_store.sessions, "site", ["a", "b"] * 6)
    arguments = ("probe", classifier, "--data", small_store.path, "--label", "age_years", "--slices", 3)
    answer = cli(*arguments)
    assert "no 95% interval of 4 subjects: it needs 10 or more" in answer.out
    assert "nan" not in answer.out
    found = json.loads(cli(*arguments, "--json").out, parse_constant=pytest.fail)
    assert (found["probed"]["site"]["low"], found["probed"]["site"]["num_subjects"]) == (None, 4)


def test_where_no_column_can_be_probed_the_sessions_still_can(cli, classifier, small_store, monkeypatch):
    monkeypatch.setattr("brainfound.data.store.Store.open", lambda path: small_store)
    for name, column in {
        "subject": [f"s{n // 2}" for n in range(12)],
        "session": ["1", "2"] * 6,
        "diagnosis": ["well"] * 12,
        "site": ["Oslo"] * 12,
    }.items():
        monkeypatch.setitem(small_store.sessions, name, column)
    said = cli("probe", classifier, "--data", small_store.path, "--label", "diagnosis", "--slices", 2)
    assert said.code == 0, said.err
    assert [line.split()[1] for line in said.err.splitlines()] == ["diagnosis", "site"]
    assert "test and retest" in said.out
    assert "accuracy" not in said.out


def test_sessions_without_a_label_are_not_probed(classifier, small_store, monkeypatch):
    ages = small_store.sessions["age_years"].where(np.arange(12) != 5)
    monkeypatch.setitem(small_store.sessions, "age_years", ages)
    found = probe(classifier, small_store, "age_years", num_slices=3)
    assert (found.num_probed, found.num_sessions) == (11, 12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to probe", "Give --label COLUMN"]),
        (["--label", "diagnosi"], ["no column 'diagnosi'", "Did you mean diagnosis?"]),
        (["--label", "diagnosis", "--site", "scaner"], ["no column 'scaner'"]),
    ],
)
def test_what_cannot_be_requested_is_one_line(cli, classifier, small_store, arguments, words):
    said = cli("probe", classifier, "--data", small_store.path, *arguments)
    assert said.code == 2
    assert all(word in said.line for word in words)


def test_what_answers_no_request_is_refused_before_the_model_is_read(cli, classifier, small_store, monkeypatch):
    monkeypatch.setattr("brainfound.inference.probing.load_encoder", None)
    monkeypatch.setattr(
        "brainfound.data.store.Store.covariate", lambda self, name: self.sessions["sex"].str[:0] + "one"
    )
    said = cli("probe", classifier, "--data", small_store.path, "--label", "diagnosis")
    assert said.code == 2
    assert said.line.count("is not probed: a single class cannot be predicted (got only one)") == 2


_LONELY = "Bergen has a single subject"


@pytest.mark.parametrize(
    ("changed", "left_out", "reason", "num_probed"),
    [
        ({"site": ["Oslo"] * 12}, "site", "a single class cannot be predicted (got only Oslo)", 12),
        ({"site": ["Bergen"] + ["Oslo", "Voss", "Oslo"] * 3 + ["Voss", "Oslo"]}, "site", _LONELY, 12),
        ({"site": [None] * 12}, "site", "no session has a value", 12),
        ({"site": ["Oslo"] * 6 + ["Voss"] * 6, "age_years": [30] * 3 + [40] * 3 + [None] * 6}, "site", "among", 6),
        ({"age_years": [40.0] * 12}, "age_years", "a single class cannot be predicted (got only 40)", 12),
        ({"age_years": [None] * 12}, "age_years", "no session has a value", 12),
    ],
)
def test_a_column_that_cannot_be_probed_is_left_out(
    classifier, small_store, monkeypatch, changed, left_out, reason, num_probed
):
    ages = [age for age in (20, 30, 40, 50) for _ in range(3)]
    for name, column in {"age_years": ages, **changed}.items():
        monkeypatch.setitem(small_store.sessions, name, column)
    heard, embedded = [], []
    listen = {"notify": heard.append, "progress": lambda *_: embedded.append(len(heard))}
    found = probe(classifier, small_store, "age_years", num_slices=2, **listen)
    assert len(found.notes) == 1
    assert found.notes[0].startswith(f"{left_out} is not probed: {reason}")
    assert tuple(heard) == found.notes
    assert set(embedded) == {1}, "the note comes before any embedding"
    assert (found.probed.site is None) == (left_out == "site")
    assert (found.probed.label is None) == (left_out == "age_years")
    assert found.num_probed == num_probed
    content = json.loads(json.dumps(found.to_dict()))
    assert content["notes"] == list(found.notes)


def test_the_table_of_a_store_without_sites_has_the_label_alone(cli, classifier, small_store, monkeypatch):
    monkeypatch.setattr(
        "brainfound.data.store.Store.covariates",
        property(lambda self: [name for name in self.table.covariates if name != "site"]),
    )
    arguments = ("probe", classifier, "--data", small_store.path, "--label", "diagnosis", "--slices", 2)
    said = cli(*arguments)
    assert said.code == 0, said.err
    assert said.line == "brainfound: site is not probed: no session has a value"
    assert "diagnosis" in said.out
    assert "site" not in said.out.replace("diagnosis", "")


def test_a_segmentation_has_no_embedding(cli, segmenter, small_store):
    said = cli("probe", segmenter, "--data", small_store.path, "--label", "diagnosis")
    assert said.code == 2
    assert "makes no volume embedding" in said.line


def test_a_store_prepared_otherwise_is_refused(classifier, small_store, monkeypatch):
    other = small_store.preprocessing.model_copy(update={"spacing_mm": (3.0, 3.0, 3.0)})
    monkeypatch.setattr(small_store, "preprocessing", other)
    with pytest.raises(UsageError, match=r"prepared in another way.*--like MODEL"):
        probe(classifier, small_store, "diagnosis")
