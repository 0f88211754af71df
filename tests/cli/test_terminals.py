"""The encoding of a terminal, pipe or locale changes signs of the output, never an exit code."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from brainfound.cli.main import main

ENCODINGS = ("ascii", "latin-1", "cp1252", "cp437", "koi8-r", "utf-16", "utf-8")
STARTS = {
    "module": ["-m", "brainfound"],
    "function": ["-c", "from brainfound.cli.main import main; main()"],
    "script": ["-c", "import runpy; runpy.run_module('brainfound', run_name='__main__', alter_sys=True)"],
}
LOCALES = {
    "pipe": {"PYTHONIOENCODING": "ascii"},
    "strict": {"PYTHONIOENCODING": "ascii:strict"},
    "POSIX": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.fixture
def run(monkeypatch):
    """Call the command line with standard streams of an encoding: (exit code, decoded output, decoded errors)."""

    def call(encoding, *arguments):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
        monkeypatch.setattr("sys.argv", ["brainfound", *map(str, arguments)])
        monkeypatch.setattr("sys.stdout", streams[0])
        monkeypatch.setattr("sys.stderr", streams[1])
        with pytest.raises(SystemExit) as end:
            main()
        monkeypatch.undo()
        for stream in streams:
            stream.flush()
        return end.value.code, *(stream.buffer.getvalue().decode(encoding) for stream in streams)

    return call


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_has_the_same_exit_codes(run, make_cohort, small_store, tmp_path, encoding):
    cohort = make_cohort(tmp_path / "cohort", num_subjects=3)
    settings = ["--set", "spacing_mm=[8,8,8]", "--set", "size=[16,16]", "--contrasts", "T1w"]
    code, out, _ = run(encoding, "prepare", cohort, tmp_path / "store", *settings)
    assert code == 0
    assert ("16x16" if encoding in ("ascii", "koi8-r", "cp437") else "16×16") in out
    code, out, _ = run(encoding, "list", "cohort", cohort)
    assert code == 0
    code, out, _ = run(encoding, "check", cohort, "--contrasts", "T1w")
    assert code in (0, 3)
    assert ("✓" if encoding.startswith("utf") else "ok") in out
    assert run(encoding, "split", small_store.path, tmp_path / "split.json")[0] == 0
    assert run(encoding, "show", small_store.path)[0] == 0
    code, _, err = run(encoding, "show", tmp_path / "ночь")  # an error that names a file of another alphabet
    assert code in (1, 2)
    assert err.startswith("brainfound: ")


def start(way, environment, *arguments, **options):
    keep = {name: value for name, value in os.environ.items() if name not in ("LANG", "LC_ALL", "PYTHONIOENCODING")}
    command = [sys.executable, *STARTS[way], *map(str, arguments)]
    return subprocess.run(command, env=keep | environment, capture_output=True, timeout=300, **options)


def test_a_posix_locale_changes_signs_only(make_cohort, tmp_path):
    cohort = make_cohort(tmp_path / "cohort", num_subjects=2)
    done = start("module", LOCALES["POSIX"], "list", "cohort", cohort)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.slow
@pytest.mark.parametrize("way", STARTS)
@pytest.mark.parametrize("locale", LOCALES)
def test_ways_to_start_under_locales(make_cohort, tmp_path, way, locale):
    cohort = make_cohort(tmp_path / "cohort", num_subjects=2)
    small = ["--set", "spacing_mm=[8,8,8]", "--set", "size=[16,16]", "--contrasts", "T1w"]
    for arguments in (
        ["list", "cohort", cohort],
        ["prepare", cohort, tmp_path / "store", *small],
        ["check", cohort, "--contrasts", "T1w"],
        ["show", tmp_path / "store"],
    ):
        done = start(way, LOCALES[locale], *arguments)
        assert done.returncode in (0, 3), (arguments, done.stderr)
        assert b"UnicodeEncodeError" not in done.stderr


def test_a_closed_output_is_no_failure(make_cohort, tmp_path):
    cohort = make_cohort(tmp_path / "cohort", num_subjects=2)
    command = [sys.executable, "-m", "brainfound", "list", "cohort", str(cohort)]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    assert subprocess.run(closed, stderr=subprocess.PIPE, timeout=120).returncode == 0
