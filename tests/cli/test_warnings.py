"""Warnings of our own are notes of one line on the command line; those of others stay as they are."""

from __future__ import annotations

import subprocess
import sys

import pytest

from brainfound.cli.main import _format_user_warning

CODE = """
import sys
from pathlib import Path
from brainfound.cli import main
from brainfound.training import run_folder
from brainfound.training.process import make_accelerator

run_folder.require_same_recipe_and_data = lambda *_: None
accelerator = make_accelerator("no")
main.app = lambda **_: run_folder.find_resume_checkpoint(Path(sys.argv[1]), None, None, True, (), accelerator)
main.main()
"""


def test_a_torn_checkpoint_is_a_note_on_the_command_line(tmp_path):
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True)
    done = subprocess.run([sys.executable, "-c", CODE, tmp_path], capture_output=True, text=True, timeout=120)
    first, second = done.stderr.splitlines()
    assert first == (
        "brainfound: the checkpoint step-000003 is damaged (state.json cannot be read); the one before is used"
    )
    assert second.startswith("brainfound: ")
    assert "every checkpoint of this run is damaged" in second


def test_a_warning_of_ours_is_a_note():
    ours = _format_user_warning(UserWarning("a\n b"), UserWarning, sys.modules["brainfound.cli.main"].__file__, 7)
    assert ours == "brainfound: a b\n"


@pytest.mark.parametrize(("kind", "file"), [(UserWarning, "/elsewhere/x.py"), (DeprecationWarning, __file__)])
def test_other_warnings_say_where_they_come_from(kind, file):
    assert f"{file}:7: {kind.__name__}: a" in _format_user_warning(kind("a"), kind, file, 7)
