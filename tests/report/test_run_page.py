"""The page of a single run, and the picture of its answers."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from brainfound.errors import BrainFoundError
from brainfound.report.run_page import plot_cases, write_run_page

RNG = np.random.default_rng(0)
CLASSES = np.array(["NA", "b", "c"])[np.arange(12) % 3]
SHARES = RNG.dirichlet([1, 1, 1], 12)
TABLES = {
    "regression": {"truth": np.linspace(20, 70, 12), "prediction": np.linspace(30, 60, 12)},
    "two classes": {"truth": CLASSES[CLASSES != "c"], "p(NA)": np.linspace(0, 1, 8), "p(b)": np.linspace(1, 0, 8)},
    "three classes": {"truth": CLASSES, **{f"p({name})": SHARES[:, k] for k, name in enumerate(("NA", "b", "c"))}},
    "one structure": {"reference_pixels": 5, "dice": [0.5, np.nan, 0.7]},
    "many structures": {"dice": [0.5, 0.6], **{f"dice(part {k})": [0.5, 0.9] for k in range(30)}},
}


@pytest.mark.parametrize("name", TABLES)
def test_answers_of_every_kind_are_drawn(tmp_path, name):
    cases = pd.DataFrame(TABLES[name])
    picture = imread(plot_cases(cases, path=tmp_path / "a.png"))
    assert picture.shape[2] in (3, 4)
    changed = cases.iloc[::2]
    other = imread(plot_cases(changed, path=tmp_path / "b.png"))
    assert picture.shape == other.shape
    assert not np.array_equal(picture, other)


def test_what_cannot_be_drawn_has_no_picture(tmp_path):
    several = pd.DataFrame({"truth(a)": [0, 1], "p(a)": [0.2, 0.7]})
    for cases in (several, pd.DataFrame({"truth": []}), pd.DataFrame({"other": [1]})):
        assert plot_cases(cases, path=tmp_path / "a.png") is None
    assert not (tmp_path / "a.png").exists()


@pytest.fixture
def run(tmp_path):
    scores = {
        "task": "regression", "num_sessions": 12, "part": "test", "step": 5, "last_step": 20,
        "scores": {"mae": 5.25, "r2": None, "rmse": 6.0}, "trivial": {"mae": 9.5, "r2": 0.0}, "frozen": {"mae": 6.0},
        "intervals": {"scores": {"mae": {"low": 4.0, "high": 7.5}}, "missing": "no interval of 2 subjects"},
        "verdict": {"label": "better", "text": "Clearly better than its baselines: yes."}, "notes": ["a note"],
    }  # fmt: skip
    facts = {"target": {"column": "age_years"}, "model": "vits14", "num_sessions": 40, "data_hash": "ab" * 32}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "run.json").write_text(json.dumps({**facts, "seed": 3, "device": "cpu"}))
    pd.DataFrame(TABLES["regression"]).to_csv(tmp_path / "cases.tsv", sep="\t", index=False)
    return tmp_path


def test_the_page_has_verdict_scores_picture_and_facts(run):
    page = write_run_page(run).read_text()
    assert page.startswith(f"# age_years: regression, {run.name}\n\n**Clearly better than its baselines: yes.**")
    assert "| mae | 5.250 | 4.000 to 7.500 | 9.500 | 6.000 | lower |" in page
    assert "| r2 | – | – | 0.000 | – | higher |" in page
    assert "rmse" not in page
    assert "12 sessions, test." in page
    assert "no interval of 2 subjects" in page
    assert "![answers of each case](report.png)" in page
    for line in ("starts from: vits14", "exported step: 5 of 20", "40 sessions (hash abababababab)", "- a note"):
        assert line in page
    assert "Candidates" not in page
    assert "curves.png" not in page


def test_what_an_automatic_run_tried_is_on_its_page(run):
    table = pd.DataFrame({"candidate": ["average", "trivial"], "mae": [5.12345, 9.5], "winner": [True, False]})
    table.to_csv(run / "tried.tsv", sep="\t", index=False)
    (run / "curves.png").write_bytes(b"")
    page = write_run_page(run).read_text()
    assert "| average | 5.123 | True |" in page
    assert "![curves](curves.png)" in page


def test_an_unfinished_run_has_no_page(run):
    (run / "scores.json").unlink()
    with pytest.raises(BrainFoundError, match="--resume"):
        write_run_page(run)
