"""Experiments from the command line: one command, one page."""

from __future__ import annotations

import json

from brainfound.cli.terminal import get_command_line

TINY = (
    *("--set", "engine.steps=1", "--set", "engine.batch_size=2", "--set", "num_slices=3", "--set", "head_fit_passes=0"),
    *("--set", "evaluate_every=0", "--set", "cached_embeddings=true"),
)


def test_two_adapters_are_compared_and_the_page_is_written_again(
    cli, small_store, tiny_backbone, tmp_path, monkeypatch
):
    monkeypatch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: folder)
    out = tmp_path / "grid"
    adapters = ("--adapter", "head-only", "--adapter", "fast=head-only,optim.head_lr=0.1")
    answer = cli(
        *("finetune", "finetune-regression", "--data", small_store.path, "--model", tiny_backbone),
        *("--target", "age_years", *adapters, *TINY, "--out", out),
    )
    assert answer.code == 0, answer.err
    assert "fast" in answer.out
    assert answer.out.strip().endswith("report.md")
    page = (out / "report.md").read_text()
    assert "brainfound finetune finetune-regression --data store --model dinov2-tiny" in page
    assert str(tmp_path) not in page + (out / "summary.json").read_text()
    (out / "report.md").unlink()
    again = cli("report", out, quiet=False)
    assert (again.code, (out / "report.md").read_text()) == (0, page)


def test_a_single_run_has_a_page_that_is_written_again(cli, segmenter):
    page = (segmenter / "report.md").read_text()
    assert "## Scores" in page
    (segmenter / "report.md").unlink()
    answer = cli("report", segmenter, quiet=False)
    assert (answer.code, answer.out.strip()) == (0, str(segmenter / "report.md"))
    assert (segmenter / "report.md").read_text().split("![")[0] == page.split("![")[0]
    assert (segmenter / "report.png").is_file()


def test_an_evaluation_shows_what_was_requested(cli, segmenter, small_store):
    asked = ("--surface-mm", "2", "--empty", "one", "--no-frozen")
    plain, full = (
        json.loads(cli("evaluate", segmenter, "--data", small_store.path, "--json", *options).out)[0]
        for options in ((), asked)
    )
    surfaces = {"surface_dice", "hd95_mm", "lesion_f1", "volume_error_mm3"}
    assert surfaces <= full["scores"].keys()
    assert not surfaces & plain["scores"].keys()
    answer = cli("evaluate", segmenter, "--data", small_store.path, *asked, quiet=False)
    assert answer.code == 0, answer.err
    assert "surface_dice" in answer.out
    for option, value, words in (("--surface-mm", "-1", "surface_mm"), ("--empty", "on", "empty")):
        refused = cli("evaluate", segmenter, "--data", small_store.path, option, value)
        assert refused.code == 2
        assert words in refused.line


def test_the_frozen_baseline_stands_next_to_an_evaluation(cli, small_store, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: folder)
    run = tmp_path / "run"
    made = cli(
        *("finetune", "finetune-regression", "--data", small_store.path, "--model", tiny_backbone, "--adapter"),
        *("head-only", "--target", "age_years", *TINY, "--out", run),
    )
    assert made.code == 0, made.err
    for options in ((), ("--partial-input",)):
        answer = cli("evaluate", run, "--data", small_store.path, *options, "--out", tmp_path / f"page{len(options)}")
        assert answer.code == 0, answer.err
        table = "".join(answer.out.split())
        assert ("trivialmae" in table and "frozenmae" in table) if options else "(trivial;frozen)" in table
        assert "frozen" in (tmp_path / f"page{len(options)}" / "report.md").read_text()
    alone = cli("evaluate", run, "--data", small_store.path, "--no-frozen")
    assert "mae(trivial)" in "".join(alone.out.split())


def test_partial_input_goes_with_one_model(cli, tmp_path):
    answer = cli(
        *("finetune", "finetune-regression", "--data", tmp_path, "--model", "a/x", "--model", "b/y"),
        *("--target", "age_years", "--partial-input"),
    )
    assert answer.code == 2
    assert "one --model and one --adapter" in answer.line


def test_a_folder_without_an_experiment_has_no_page(cli, tmp_path):
    answer = cli("report", tmp_path, quiet=False)
    assert answer.code == 2
    assert "not the folder of an experiment" in answer.line


def test_a_typed_command_names_no_folders(monkeypatch, tmp_path):
    typed = ["brainfound", "x", "--model", f"ours={tmp_path}/runs/vits14/export", f"--data={tmp_path}/st ore"]
    monkeypatch.setattr("sys.argv", [*typed, "--model", "facebook/dinov2-small", "--set", "a.b=c"])
    assert get_command_line() == (
        "brainfound x --model ours=vits14/export '--data=st ore' --model facebook/dinov2-small --set a.b=c"
    )
