"""``brainfound finetune auto``, and what the other verbs make of its run."""

import json
import re

import pytest

LINEAR = [
    "--set",
    "trained={}",
    "--set",
    "inner_folds=3",
    "--set",
    "inner_repeats=1",
    "--set",
    "linear.methods=[penalised]",
]
LINEAR += ["--set", "linear.pooling=[mean]", "--set", "linear.features=[cls, layers]"]


@pytest.fixture(scope="module")
def auto_run(small_store, tiny_backbone, tmp_path_factory):
    from brainfound.finetuning.auto.run import finetune_auto

    out = tmp_path_factory.mktemp("auto") / "run"
    return finetune_auto(
        small_store, tiny_backbone, "age_years", out, overrides=LINEAR[1::2], keep_ids=True, quiet=True
    )


def test_the_winner_is_named(cli, small_store, tiny_backbone, tmp_path):
    place = ["--data", small_store.path, "--model", tiny_backbone, "--target", "age_years", "--out", tmp_path / "run"]
    answer = cli("finetune", "auto", *place, *LINEAR, "--minutes", "5")
    assert answer.code == 0, answer.err
    (line,) = [line for line in answer.out.splitlines() if line.startswith("winner: ")]
    assert "on 9 left-out subjects" in line
    assert "minutes: 5" in (tmp_path / "run" / "recipe.yaml").read_text()
    again = cli("finetune", "auto", *place, *LINEAR, "--minutes", "7", "--resume")
    assert again.code == 0, again.err
    assert line in again.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--minutes", "0"], "no time.*--minutes|--minutes.*no time"),
        (["--minutes", "nan"], "no time"),
        (["--folds", "3"], "--folds.*one run"),
        (["--adapter", "full"], "--adapter.*one run"),
        (["--model", "other"], "one model"),
    ],
)
def test_wrong_options_are_one_line(cli, small_store, tiny_backbone, tmp_path, options, expected):
    place = ["--data", small_store.path, "--model", tiny_backbone, "--out", tmp_path / "run"]
    answer = cli("finetune", "auto", *place, "--target", "age_years", *options)
    assert answer.code == 2
    assert re.search(expected, answer.line), answer.line


def test_no_candidate_and_a_time_limit_without_auto_are_one_line(cli, small_store, tiny_backbone, tmp_path):
    place = ["--data", small_store.path, "--model", tiny_backbone, "--out", tmp_path / "run"]
    answer = cli("finetune", "auto", *place, "--target", "mask", "--set", "trained={}")
    assert answer.code == 2
    assert "there is no candidate" in answer.line
    answer = cli("finetune", "finetune-regression", *place, "--target", "age_years", "--minutes", "5")
    assert answer.code == 2
    assert "only the recipe auto" in answer.line
    assert not (tmp_path / "run").exists()


def test_every_verb_reads_the_run(cli, auto_run, small_store, source, tmp_path):
    scan = next(source.rglob("*T1w.nii.gz"))
    for arguments in (
        ["show", auto_run],
        ["show", auto_run / "export"],
        ["predict", auto_run, f"T1w={scan}", "--out", tmp_path / "answers"],
        ["evaluate", auto_run, "--data", small_store.path, "--out", tmp_path / "evaluated"],
        ["compare", auto_run, "--frozen"],
        ["report", auto_run],
    ):
        answer = cli(*arguments, quiet=False)
        assert answer.code == 0, (arguments, answer.err)
    card = (auto_run / "export" / "README.md").read_text()
    assert "linear model of frozen features" in card
    assert json.loads((auto_run / "export" / "bundle.json").read_text())["metadata"]["frozen_encoder"]
