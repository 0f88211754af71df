"""``brainfound compare``: what it reads, what it says, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from brainfound.experiments.page import write_experiment_page
from brainfound.finetuning.scoring import SessionScores, write_scores
from brainfound.metrics import mae
from brainfound.metrics.comparison import compare

NUM = 30


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr("brainfound.metrics.statistics.NUM_RESAMPLES", 40)
    monkeypatch.setattr("brainfound.cli.compare.NUM_PERMUTATIONS", 100)


def aged(error: float, seed: int, rows=range(NUM)) -> pd.DataFrame:
    """Two sessions of each subject; the truth is the same whatever the seed."""
    rows = np.array(rows)
    age = 20 + 2.0 * rows
    guess = age + np.random.default_rng(seed).normal(0, error, NUM)[rows]
    return pd.DataFrame({"row": rows, "subject_row": rows // 2 * 2, "truth": age, "prediction": guess})


def classification_cases(strength: float, seed: int) -> pd.DataFrame:
    rows = np.arange(NUM)
    ill = rows % 2
    share = 1 / (1 + np.exp(-strength * (ill - 0.5) - np.random.default_rng(seed).normal(size=NUM)))
    table = pd.DataFrame({"row": rows, "subject_row": rows, "truth": np.where(ill, "ill", "well")})
    return table.assign(**{"p(ill)": share, "p(well)": 1 - share})


def make_run(folder, cases: pd.DataFrame, task="regression", column="age_years", data="store", kind="finetune"):
    folder.mkdir(parents=True)
    facts = {"kind": kind, "data_hash": data, "target": {"task": task, "column": column}}
    (folder / "run.json").write_text(json.dumps(facts))
    cases.to_csv(folder / "cases.tsv", sep="\t", index=False)
    return folder


@pytest.fixture
def three(tmp_path):
    return [make_run(tmp_path / name, aged(error, k)) for k, (name, error) in enumerate([("a", 9), ("b", 3), ("c", 3)])]


def as_json(answer):
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"kind": ', "not valid JSON"),
        ("[]", "the file has other content"),
        ("{}", "the facts of this run are damaged"),
        ('{"data_hash": "store", "kind": "finetune", "target": 3}', "the facts of this run are damaged"),
    ],
)
def test_facts_that_cannot_be_read_are_one_line(cli, three, content, fault):
    (three[1] / "run.json").write_text(content)
    answer = cli("compare", *three, quiet=False)
    assert answer.code == 1
    assert f"run.json: {fault}" in answer.line
    assert "Put back the run.json that the run wrote" in answer.line


def test_the_table_says_what_was_compared_and_how(cli, three):
    answer = cli("compare", *three[:2], quiet=False)
    assert answer.code == 0
    assert "regression of age_years: 30 sessions of 15 subjects" in answer.out
    assert "mae (lower is better)" in answer.out
    assert "p (Holm)" in answer.out
    assert "DeLong" not in answer.out
    assert "bootstrap over 15 subjects" in answer.out
    assert "fewer than 20 are too few" in answer.out
    assert "corrected over 1 comparison of a score" in answer.out
    value = mae(*(pd.read_csv(three[1] / "cases.tsv", sep="\t")[name] for name in ("truth", "prediction")))
    assert f"{value:.3f} [" in answer.out


def test_the_numbers_are_those_of_the_comparison(cli, three):
    found = as_json(cli("compare", *three, "--json", "--metrics", "mae,rmse", quiet=False))
    tables = {str(run): pd.read_csv(run / "cases.tsv", sep="\t") for run in three}
    tables = {name: table.assign(subject=table["subject_row"]) for name, table in tables.items()}
    expected = compare(tables, str(three[0]), ["mae", "rmse"], num_resamples=40, num_permutations=100)
    rows = pd.DataFrame(found["scores"])
    assert rows["system"].tolist() == expected["system"].tolist()
    for column in ("value", "low", "high", "difference", "difference_low", "p", "p_holm"):
        np.testing.assert_allclose(rows[column].astype(float), expected[column], rtol=1e-9)
    assert found["against"] == str(three[0])
    assert (found["num_resamples"], found["num_permutations"]) == (40, 100)


def test_all_pairs_are_corrected_together(cli, three):
    found = as_json(cli("compare", *three, "--all-pairs", "--metrics", "mae", "--json", quiet=False))
    pairs = pd.DataFrame(found["pairs"])
    names = [str(run) for run in three]
    assert list(zip(pairs["against"], pairs["system"], strict=True)) == [
        (names[0], names[1]),
        (names[0], names[2]),
        (names[1], names[2]),
    ]
    smallest = pairs["p"].idxmin()
    assert pairs.loc[smallest, "p_holm"] == pytest.approx(3 * pairs["p"].min())
    assert [row["system"] for row in found["scores"]] == names
    answer = cli("compare", *three, "--all-pairs", quiet=False)
    assert "corrected over 3 comparisons of a score" in answer.out


def test_two_classes_have_delongs_test(cli, tmp_path):
    runs = [
        make_run(tmp_path / name, classification_cases(strength, k), "classification", "diagnosis")
        for k, (name, strength) in enumerate({"weak": 0.5, "strong": 4.0}.items())
    ]
    answer = cli("compare", *runs, quiet=False)
    assert "DeLong (Holm)" in answer.out
    found = as_json(cli("compare", *runs, "--json", quiet=False))["scores"]
    of_auroc = next(row for row in found if row["metric"] == "auroc" and row["system"].endswith("strong"))
    assert 0 < of_auroc["p_delong"] < 0.05
    assert next(row for row in found if row["metric"] == "balanced_accuracy")["p_delong"] is None


def many(folder, error: float, seeds=(0, 1), folds=3, first=0):
    """A cross-validation with seeds, as finetune leaves it."""
    table = []
    for seed in seeds:
        for fold in range(folds):
            run = f"fold-{fold + 1}/seed-{seed}"
            make_run(folder / run, aged(error, first + seed, range(fold * NUM // folds, (fold + 1) * NUM // folds)))
            table.append({"group": "all folds", "fold": f"fold-{fold + 1}", "seed": seed, "run": run})
    pd.DataFrame(table).to_csv(folder / "scores.tsv", sep="\t", index=False)
    # What the folder of many runs may have beside them is no run.
    aged(1, 0).to_csv(folder / "cases.tsv", sep="\t", index=False)
    return folder


def test_folds_are_put_together_and_seeds_are_averaged(cli, tmp_path):
    first, second = many(tmp_path / "first", 9), many(tmp_path / "second", 3, first=5)
    found = as_json(cli("compare", first, second, "--json", "--metrics", "mae", quiet=False))
    expected = np.mean([np.abs(aged(9, seed)["prediction"] - aged(9, seed)["truth"]).mean() for seed in (0, 1)])
    row = found["scores"][0]
    assert row["value"] == pytest.approx(expected)
    assert (row["num_cases"], row["num_subjects"]) == (NUM, NUM // 2)
    assert set(found["num_seeds"].values()) == {2}
    assert found["scores"][1]["p"] < 0.05
    # One fold of a folder is its seeds; a run without seeds counts as if each had given it.
    fold = as_json(cli("compare", first / "fold-1", second / "fold-1", "--json", quiet=False))
    assert fold["scores"][0]["num_cases"] == NUM // 3
    single = make_run(tmp_path / "single", aged(3, 8))
    mixed = as_json(cli("compare", first, single, "--json", "--metrics", "mae", quiet=False))
    assert mixed["scores"][1]["value"] == pytest.approx(np.abs(aged(3, 8).eval("prediction - truth")).mean())
    three_seeds = many(tmp_path / "three", 3, seeds=(0, 1, 2))
    assert "different numbers of seeds" in cli("compare", first, three_seeds, quiet=False).line


def test_systems_of_one_folder_and_the_frozen_baseline(cli, tmp_path):
    folder = tmp_path / "all"
    table = []
    for name, error in {"lora": 3, "full": 4}.items():
        run = make_run(folder / name / "single" / "seed-0", aged(error, 1))
        aged(12, 2).to_csv(run / "frozen-cases.tsv", sep="\t", index=False)
        table.append(
            {"system": name, "group": "all folds", "fold": "single", "seed": 0, "run": f"{name}/single/seed-0"}
        )
    pd.DataFrame(table).to_csv(folder / "scores.tsv", sep="\t", index=False)
    found = as_json(cli("compare", folder, "--json", quiet=False))
    assert list(found["num_seeds"]) == [f"{folder}: lora", f"{folder}: full"]
    beside = as_json(cli("compare", folder / "lora" / "single", "--frozen", "--json", "--metrics", "mae", quiet=False))
    assert beside["against"] == f"{folder / 'lora' / 'single'}, frozen"
    assert beside["scores"][1]["difference"] < 0


def test_runs_of_two_stores_are_compared_by_name(cli, tmp_path):
    named = aged(3, 1).assign(subject=lambda t: "s" + t["subject_row"].astype(str), session=lambda t: t["row"] % 2)
    turned = named.iloc[::-1].reset_index(drop=True).assign(row=range(NUM))
    runs = [make_run(tmp_path / "a", named), make_run(tmp_path / "b", turned, data="other")]
    found = as_json(cli("compare", *runs, "--json", quiet=False))
    assert found["scores"][1]["difference"] == pytest.approx(0)
    bare = make_run(tmp_path / "c", aged(3, 2), data="third")
    assert "--keep-ids" in cli("compare", runs[0], bare, quiet=False).line


def test_what_cannot_be_compared_is_one_line(cli, three, tmp_path, small_store):
    a, b = three[:2]
    lines = {
        "no run to compare with": (a,),
        "same runs twice": (a, b, tmp_path / "b"),
        "no such file or folder": (a, tmp_path / "nowhere"),
        "not the cases of": (a, make_run(tmp_path / "fewer", aged(3, 1).iloc[:-2])),
        "not the truth of": (a, make_run(tmp_path / "older", aged(3, 1).assign(truth=lambda t: t["truth"] + 1))),
        "another task than": (
            a,
            make_run(tmp_path / "classes", classification_cases(1, 0), "classification", "diagnosis"),
        ),
        "another target than": (a, make_run(tmp_path / "height", aged(3, 1), column="height_cm")),
        "not a run of fine-tuning": (a, make_run(tmp_path / "pretraining", aged(3, 1), kind="pretrain")),
        "no metric 'auroc' of a regression": (a, b, "--metrics", "auroc"),
        "no frozen baseline": (a, "--frozen"),
    }
    for line, arguments in lines.items():
        answer = cli("compare", *arguments, quiet=False)
        assert answer.code == 2, line
        assert line in answer.line
        assert answer.out == ""


def test_a_real_run_against_its_frozen_baseline_and_the_intervals_of_an_evaluation(cli, classifier, small_store):
    found = as_json(cli("compare", classifier, "--frozen", "--json", quiet=False))
    scores = json.loads((classifier / "scores.json").read_text())
    values = {(row["metric"], row["system"].endswith("frozen")): row["value"] for row in found["scores"]}
    for metric in ("auroc", "balanced_accuracy"):
        assert values[metric, True] == pytest.approx(scores["frozen"][metric])
        assert values[metric, False] == pytest.approx(scores["scores"][metric])
    table = cli("evaluate", classifier, "--data", small_store.path)
    assert "no 95% interval of 3 subjects: it needs 10 or more" in table.out
    assert "[0." not in table.out
    answered = json.loads(cli("evaluate", classifier, "--data", small_store.path, "--json").out)[0]
    assert answered["intervals"] == scores["intervals"]
    assert scores["intervals"]["scores"]["auroc"] == {"low": None, "high": None, "num_subjects": 3}
    assert scores["intervals"]["missing"] == "no 95% interval of 3 subjects: it needs 10 or more"


def test_a_run_and_a_comparison_have_the_same_intervals(cli, tmp_path, monkeypatch):
    """The run knows the subjects by name, in an order of its own; a comparison knows their rows."""
    monkeypatch.setattr("brainfound.finetuning.scoring.NUM_RESAMPLES", 40)
    cases = aged(4, 6).iloc[::-1]
    scores = {"mae": mae(cases["truth"], cases["prediction"])}
    named = cases.assign(session=cases["row"] % 2, subject="p" + (31 - cases["subject_row"]).astype(str))
    run, other = (make_run(tmp_path / name, aged(4, k)) for k, name in ((6, "run"), (7, "other")))
    of_run = write_scores(run, SessionScores("regression", scores, scores, named).with_intervals())["intervals"]
    found = as_json(cli("compare", run, other, "--json", "--metrics", "mae", quiet=False))
    assert [of_run[name] for name in ("num_resamples", "confidence")] == [found["num_resamples"], found["confidence"]]
    for end in ("low", "high"):
        assert of_run["scores"]["mae"][end] == pytest.approx(found["scores"][0][end], rel=1e-12)


def test_a_comparison_of_few_subjects_has_no_intervals_and_says_why(cli, tmp_path):
    runs = [make_run(tmp_path / name, aged(error, 1, range(8))) for name, error in (("a", 3), ("b", 5))]
    answer = cli("compare", *runs, quiet=False)
    assert "no 95% interval of 4 subjects: it needs 10 or more" in answer.out
    assert "[" not in answer.out
    found = as_json(cli("compare", *runs, "--json", quiet=False))["scores"]
    assert {row[end] for row in found for end in ("low", "high", "difference_low", "difference_high")} == {None}
    assert found[1]["p"] is not None


def test_the_folder_of_an_evaluation_is_compared_like_a_run(cli, classifier, small_store, tmp_path):
    out = tmp_path / "evaluated"
    assert cli("evaluate", classifier, "--data", small_store.path, "--out", out).code == 0
    found = as_json(cli("compare", classifier, out, "--json", "--metrics", "auroc", quiet=False))["scores"]
    assert [row["system"] for row in found] == [str(classifier), str(out)]
    assert found[1]["difference"] == 0
    summary = json.loads((out / "summary.json").read_text())
    page = (out / "report.md").read_text()
    assert "| 95% interval |" in page
    assert "–: no 95% interval of 3 subjects: it needs 10 or more." in page
    scores = [row | {"interval": {"low": 0.41, "high": 0.93, "num_subjects": 12}} for row in summary["scores"]]
    (out / "summary.json").write_text(json.dumps(summary | {"scores": scores}))
    page = write_experiment_page(out).read_text()
    assert "0.410 to 0.930" in page
    assert "no 95% interval" not in page
    (out / "summary.json").write_text(json.dumps(summary | {"target": "sex"}))
    assert "another target than" in cli("compare", classifier, out, quiet=False).line
