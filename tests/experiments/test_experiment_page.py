"""The page of an experiment: made of the files of a folder, and nothing that they do not say."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from brainfound.errors import BrainFoundError, UsageError
from brainfound.experiments.folder import SCHEMA, summarise_runs, to_json_records
from brainfound.experiments.page import write_experiment_page
from brainfound.metrics import compare


def runs(systems=("",), folds=("fold-1", "fold-2", "fold-3"), seeds=(0, 1), groups=None) -> pd.DataFrame:
    """A table of runs whose error falls with the place of the system and of the fold."""
    rng = np.random.default_rng(0)
    rows = []
    for f, fold in enumerate(folds):
        for seed in seeds:
            for s, system in enumerate(systems):
                mae = 7.0 - s - f + rng.normal(0, 0.3)
                rows.append(
                    {
                        **({"system": system} if system else {}),
                        "group": "all folds" if groups is None else groups[f],
                        "fold": fold, "seed": seed, "num_train": 20 * (f + 1), "num_test": 10,
                        "mae": mae, "r2": 0.1, "trivial mae": 7.0, "trivial r2": 0.0, "frozen mae": 6.5, "frozen r2": 0,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def write(folder, table, kind="repeated", split_kind="k-fold", **more):
    names = list(dict.fromkeys(table["system"])) if "system" in table else [""]
    summary = {
        "schema": SCHEMA, "kind": kind, "target": "age_years", "task": "regression", "headline": "mae",
        "command": "brainfound finetune x", "recipe": {"name": "tiny", "steps": 5, "decoder": None},
        "systems": [
            {"name": name, "model": "vits14", "adapter": "full", "overrides": [], "contrasts": None} for name in names
        ],
        "seeds": sorted(set(table["seed"].tolist())),
        "data": {"data_hash": "ab" * 32, "num_sessions": 40, "num_subjects": 38, "contrasts": {"T1w": 40, "FLAIR": 31}},
        "split": {"kind": split_kind, "sha256": "cd" * 32, "num_folds": table["fold"].nunique(), "seed": 0},
        "num_planned": len(table), "num_runs": len(table), "versions": {"brainfound": "0.1"},
        "baselines": ["trivial", "frozen"], "scores": to_json_records(summarise_runs(table)),
    } | more  # fmt: skip
    folder.mkdir(exist_ok=True)
    table.to_csv(folder / "scores.tsv", sep="\t", index=False)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def cells(page: str, first: str) -> list[str]:
    """The cells of the first table row that begins with a word."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_says_what_the_files_say(tmp_path):
    table = runs()
    page = write_experiment_page(write(tmp_path / "cv", table)).read_text()
    assert page.startswith("# age_years: 3-fold cross-validation")
    row = cells(page, "all folds")
    assert row[:2] == ["all folds", "mae"]
    assert float(row[2]) == pytest.approx(table["mae"].mean(), abs=5e-4)
    assert float(row[3]) == pytest.approx(table.groupby("fold")["mae"].mean().std(), abs=5e-4)
    assert row[6:] == ["7.000", "6.500", "40", "10"]  # each baseline, sessions learnt from and tested on
    for said in (
        "40 sessions of 38 subjects",
        "T1w 40, FLAIR 31",
        "- steps: 5",
        "brainfound finetune x",
        "seeds: 0, 1",
    ):
        assert said in page
    assert "Tested on 10 sessions" in page
    assert "decoder" not in page
    assert imread(tmp_path / "cv" / "report.png").shape[2] in (3, 4)
    assert "](report.png)" in page


def test_who_is_not_better_than_trivial_is_named(tmp_path):
    table = runs(systems=("good", "bad"))
    table.loc[table["system"] == "bad", "mae"] += 5
    page = write_experiment_page(write(tmp_path / "grid", table, kind="comparison")).read_text()
    assert "Not better than the trivial baseline: bad, all folds." in page
    assert "no cases that can be compared" in page


def test_the_verdicts_stand_above_the_scores(tmp_path):
    table = runs().assign(verdict=["better"] * 4 + ["collapsed"] * 2)
    page = write_experiment_page(write(tmp_path / "cv", table)).read_text()
    top = page.split("## Scores")[0]
    assert "Better than the trivial baseline, on average." in top  # 6.0 against 7.0 and 6.5
    assert "Better than the frozen baseline, on average." in top
    assert "Verdict of each run (`scores.json`), of 6: better in 4, collapsed in 2." in top
    table["mae"] += 0.75
    page = write_experiment_page(write(tmp_path / "cv", table)).read_text()
    assert "Better than the trivial" in page
    assert "**Not better than the frozen baseline.**" in page


def test_a_cut_off_experiment_says_how_far_it_is(tmp_path):
    page = write_experiment_page(write(tmp_path / "cv", runs(seeds=(0,)), num_planned=5)).read_text()
    assert "Not finished: 3 of 5 runs are done." in page
    assert "One seed" in page
    assert cells(page, "all folds")[4] == "–"


def test_a_few_shot_curve_is_drawn_over_the_sessions_learnt_from(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("brainfound.experiments.page._curve", lambda axes, rows, of: drawn.append(rows))
    table = runs(folds=("shots-1", "shots-5"), groups=("shots-1", "shots-5"))
    page = write_experiment_page(write(tmp_path / "few", table, split_kind="few shots per class")).read_text()
    assert "few-shot curve" in page
    assert drawn[0]["num_train"].tolist() == [20, 40]
    assert cells(page, "shots-5")[-2:] == ["40", "10"]


def test_absence_in_training_stands_next_to_absence_in_the_test(tmp_path):
    def row(contrasts, absence, mean, drop, trained):
        found = {"contrasts": contrasts, "absence": absence, "score": "mae", "mean": mean, "std_folds": 0.5}
        found |= {"std_seeds": None, "lowest": mean, "highest": mean, "trivial": 7.0, "frozen": 6.0, "num_folds": 2}
        return found | {
            "num_seeds": 1, "drop": drop, "std_drop": 0.2, "num_train": trained, "num_test": 40, "num_left_out": 3,
        }  # fmt: skip

    rows = [
        row("T1w, FLAIR", "none", 5.0, 0.0, 20),
        row("T1w", "test", 7.5, 2.5, 20),
        row("T1w", "training", 5.5, 0.5, 18),
    ]
    table = runs(systems=("T1w+FLAIR", "T1w"))
    page = write_experiment_page(write(tmp_path / "p", table, kind="partial input", partial_input=rows)).read_text()
    assert cells(page, "T1w, FLAIR")[1:3] == ["nothing", "5.000"]
    lines = [line for line in page.splitlines() if line.startswith("| T1w |")]
    assert "| in the test only | 7.500 | 0.500 | – | +2.500 | 0.200 | 7.000 | 6.000 | 20 | 40 |" in lines[0]
    assert "+0.500" in lines[1]
    assert "Not better than the trivial baseline: T1w (absent in the test)." in page
    assert "Up to 3 test sessions per fold" in page


def test_systems_are_compared_over_the_runs_that_all_of_them_have(tmp_path):
    table = runs(systems=("a", "b"), folds=("fold-1", "fold-2"), seeds=(0,))
    folder = write(tmp_path / "grid", table, kind="comparison")
    rng = np.random.default_rng(1)
    rows = []
    for fold, first in (("fold-1", 0), ("fold-2", 20)):
        for system, error in (("a", 6.0), ("b", 1.0)):
            if (system, fold) == ("b", "fold-2"):
                continue  # cut off before
            for n in range(first, first + 20):
                truth = 50.0 + n
                where = {"system": system, "group": "all folds", "fold": fold, "seed": 0, "subject": n, "row": n}
                rows.append(where | {"truth": truth, "prediction": truth + error * rng.normal()})
    pd.DataFrame(rows).to_csv(folder / "cases.tsv", sep="\t", index=False)
    page = write_experiment_page(folder).read_text()
    found = pd.read_csv(folder / "comparison.tsv", sep="\t").set_index("system")
    assert found["num_cases"].tolist() == [20, 20]
    assert found.loc["b", "difference"] < -2
    assert found.loc["b", "p_holm"] < 0.05
    compared = page[page.index("## Against a, by mae") :]
    assert cells(compared, "b")[-2:] == ["20", "20"]


def test_a_comparison_of_few_subjects_says_why_it_has_no_intervals(tmp_path):
    folder = write(tmp_path / "grid", runs(systems=("a", "b"), folds=("fold-1",), seeds=(0,)), kind="comparison")
    where = {"group": "all folds", "fold": "fold-1", "seed": 0}
    rows = [
        where | {"system": name, "subject": n // 2, "row": n, "truth": 50.0 + n, "prediction": 52.0 + n * slope}
        for name, slope in (("a", 1.5), ("b", 1.1))
        for n in range(4)
    ]
    pd.DataFrame(rows).to_csv(folder / "cases.tsv", sep="\t", index=False)
    page = write_experiment_page(folder).read_text()
    compared = page[page.index("## Against a, by mae") :]
    assert cells(compared, "b")[2::2][:1] == ["–"]
    assert "nan" not in compared
    assert "bootstraps over subjects; no 95% interval of 2 subjects: it needs 10 or more; p is of" in compared


@pytest.fixture
def few_permutations(monkeypatch):
    """`compare` with fewer drawings, as the page asks for it and as the test does."""
    fewer = partial(compare, num_resamples=100, num_permutations=300)
    monkeypatch.setattr("brainfound.experiments.folder.compare", fewer)
    return fewer


@pytest.mark.usefixtures("few_permutations")
def test_systems_that_answer_several_labels_are_compared_by_their_mean(tmp_path):
    table = runs(systems=("base", "better"), seeds=(0,)).rename(columns=lambda name: name.replace("mae", "auroc"))
    folder = write(tmp_path / "grid", table, kind="comparison", task="classification", headline="auroc")
    rng, rows = np.random.default_rng(0), []
    for system, strength in (("base", 0.2), ("better", 3.0)):
        for case in range(60):
            row = {"system": system, "group": "all folds", "fold": f"fold-{case % 3 + 1}", "seed": 0, "row": case,
                   "subject": case}  # fmt: skip
            for k, name in enumerate(("edema", "lesion")):
                truth = case // (k + 1) % 2
                row |= {f"truth({name})": truth, f"p({name})": 1 / (1 + np.exp(-strength * truth - rng.normal()))}
            rows.append(row)
    pd.DataFrame(rows).to_csv(folder / "cases.tsv", sep="\t", index=False)
    page = write_experiment_page(folder).read_text()
    found = pd.read_csv(folder / "comparison.tsv", sep="\t").set_index("system")
    assert found.loc["better", "p_holm"] < 0.05
    assert found.loc["better", "num_cases"] == 60
    assert "## Against base, by auroc" in page


def test_the_page_and_a_comparison_of_seeds_say_the_same(tmp_path, few_permutations):
    """The seeds of a system are scored one by one; put together, scores on scales of their own would be ranked."""
    table = runs(systems=("a", "b"), folds=("fold-1",), seeds=(0, 1)).rename(
        columns=lambda name: name.replace("mae", "auroc")
    )
    folder = write(tmp_path / "grid", table, kind="comparison", task="classification", headline="auroc")
    rng, rows, tables = np.random.default_rng(0), [], {"a": [], "b": []}
    for system, strength in (("a", 0.1), ("b", 0.3)):
        for seed, offset in ((0, 0.0), (1, 0.5)):
            of_seed = []
            for case in range(40):
                share = float(np.clip(0.25 + offset + strength * (case % 2 - 0.5) + 0.1 * rng.normal(), 0, 1))
                of_seed.append(
                    {"row": case, "subject": case, "truth": "xy"[case % 2], "p(x)": 1 - share, "p(y)": share}
                )
            where = {"system": system, "group": "all folds", "fold": "fold-1", "seed": seed}
            rows += [where | case for case in of_seed]
            tables[system].append(pd.DataFrame(of_seed))
    pd.DataFrame(rows).to_csv(folder / "cases.tsv", sep="\t", index=False)
    write_experiment_page(folder)
    found = pd.read_csv(folder / "comparison.tsv", sep="\t").set_index("system")
    expected = few_permutations(tables, "a", ["auroc"]).set_index("system")
    for name in ("value", "difference", "p", "num_cases"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


def test_what_is_no_experiment_is_refused_in_a_line(tmp_path):
    with pytest.raises(UsageError, match="not the folder of an experiment"):
        write_experiment_page(tmp_path)
    (tmp_path / "summary.json").write_text('{"task": "regression"}')
    with pytest.raises(UsageError, match="another version"):
        write_experiment_page(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(BrainFoundError, match="cannot be read"):
        write_experiment_page(tmp_path)
    assert not (tmp_path / "report.md").exists()
