"""The command line answers at once, without torch."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

LIMIT_S = 0.5


def cpu_time_s(arguments: list[str]) -> float:
    """CPU time of one call. It waits for nothing, so that is its time on a machine with nothing else to do."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "brainfound", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["list", "recipes"]], ids=" ".join)
def test_answers_at_once(arguments):
    cpu_time_s(arguments)  # warms the file cache
    assert min(cpu_time_s(arguments) for _ in range(3)) < LIMIT_S


@pytest.mark.parametrize("arguments", [["--help"], ["list", "recipes"], ["list", "contrasts"]], ids=" ".join)
def test_needs_no_torch(arguments):
    code = (
        "import sys\n"
        "from brainfound.cli.main import main\n"
        f"sys.argv = ['brainfound', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'nibabel', 'pandas', 'matplotlib'} & set(sys.modules)\n"
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
