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
