"""A new source is one module and one line: carried out on a copy of the package."""

from __future__ import annotations

SOURCE = '''
"""Folders with an ``index.txt`` of lines ``SUBJECT CONTRAST FILE``."""

from pathlib import Path

import pandas as pd

from brainfound.data.sources.tables import SourceLayout, SourceTable
from brainfound.errors import CohortError

def can_read(path: Path) -> bool:
    return (path / "index.txt").is_file()


def read(path: Path, work: Path | None = None) -> SourceTable:
    rows = [line.split() for line in (path / "index.txt").read_text().splitlines()]
    if bad := [row for row in rows if len(row) != 3]:
        raise CohortError("not SUBJECT CONTRAST FILE", where="index.txt", got=" ".join(bad[0]))
    table = pd.DataFrame(
        {"subject": subject, "session": "1", "contrast": contrast, "path": path / file}
        for subject, contrast, file in rows
    )
    return SourceTable(table, path, source=LAYOUT.name)


LAYOUT = SourceLayout("index", "a folder with an index.txt", can_read, read)
'''
RUN = """
import sys
from brainfound.cli.main import main
sys.argv = ["brainfound", "list", "cohort", sys.argv[1]]
main()
"""


def test_one_module_and_one_line_make_a_source(package_copy, run_on_copy, tmp_path):
    sources = package_copy / "data" / "sources"
    (sources / "index_file.py").write_text(SOURCE)
    registry = (sources / "__init__.py").read_text()
    line = "    manifest.LAYOUT,\n"
    assert line in registry
    registry = registry.replace(line, f"{line}    index_file.LAYOUT,\n").replace(" manifest,", " index_file, manifest,")
    (sources / "__init__.py").write_text(registry)
    cohort = tmp_path / "cohort"
    cohort.mkdir()
    (cohort / "index.txt").write_text("a T1w a.nii.gz\nb FLAIR b.nii.gz\n")
    for name in ("a.nii.gz", "b.nii.gz"):
        (cohort / name).touch()
    done = run_on_copy(RUN, cohort)
    assert done.returncode == 0, done.stderr
    assert "layout            index" in done.stdout
    assert "2, in 2 sessions with 2 scans" in done.stdout
    (cohort / "index.txt").write_text("a T1w\n")
    refused = run_on_copy(RUN, cohort)
    assert refused.returncode == 1
    assert refused.stderr == "brainfound: index.txt: not SUBJECT CONTRAST FILE (got a T1w)\n"
