"""Experiments from the command line: one command, one page."""

from __future__ import annotations

from brainfound.cli.terminal import typed_command

TINY = (
    *("--set", "engine.steps=1", "--set", "engine.batch_size=2", "--set", "num_slices=3", "--set", "head_fit_passes=0"),
    *("--set", "evaluate_every=0", "--set", "cached_embeddings=true"),
)


def test_two_adapters_are_compared_and_the_page_is_written_again(
    cli, small_store, tiny_backbone, tmp_path, monkeypatch
):
    monkeypatch.setattr("brainfound.train.run_files.plot_curves", lambda folder: folder)
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
    assert typed_command() == (
        "brainfound x --model ours=vits14/export '--data=st ore' --model facebook/dinov2-small --set a.b=c"
    )
