"""The command line answers without torch and other imports that take seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("arguments", [["--help"], ["list", "recipes"], ["list", "contrasts"]], ids=" ".join)
def test_needs_no_torch(arguments):
    code = (
        "import sys\n"
        "from brainfound.cli.main import main\n"
        f"sys.argv = ['brainfound', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'nibabel', 'pandas', 'matplotlib', 'scipy', 'sklearn', 'peft'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "brainfound", "prdict"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "brainfound: No such command 'prdict'. Did you mean 'predict'? Try: brainfound --help"
    ]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["pretrain", "pretrain-demo", "--data", "no-store", "--out", "run"], "already holds a run"),
        (
            ["finetune", "finetune-regression", "--data", "s", "--model", "m", "--target", "t", "--out", "run"],
            "--resume",
        ),
        (["pretrain", "pretrain-demo", "--data", "no-store", "--out", "file"], "in the way"),
        (["predict", "no-model", "brain.nii.gz", "--out", "answers"], "an answer of this name"),
        (["embed", "no-model", "T1w=brain.nii.gz", "--out", "answers"], "an answer of this name"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_taken_folder_is_refused_before_torch_is_imported(cli, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    for file in ("run/recipe.yaml", "answers/brain.json", "file", "brain.nii.gz"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    for heavy in ("accelerate", "brainfound.inference.loading", "brainfound.experiments.systems"):
        monkeypatch.setitem(sys.modules, heavy, None)  # importing it fails
    answer = cli(*arguments)
    assert (answer.code, word in answer.line) == (2, True), answer.err
