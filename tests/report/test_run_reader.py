"""Reading run folders, whole and damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from brainfound.errors import BrainFoundError, UsageError
from brainfound.report.curves import RunFolder


def _write(folder, lines, end="\n"):
    (folder / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + end)
    return folder


def test_reads_recipe_and_series(tmp_path):
    first = {"step": 1, "loss": 2.0, "note": "x", "frozen": True}
    _write(tmp_path, [first, {"step": 2, "probe": 0.5}, {"step": 3, "loss": 1}])
    (tmp_path / "recipe.yaml").write_text("name: tiny\noptim: {lr: 0.1}\n")
    run = RunFolder.read(tmp_path)
    assert run.recipe["optim"] == {"lr": 0.1}
    assert run.numeric_keys() == ["loss", "probe"]  # text and booleans are not curves
    steps, values = run.series("loss")
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_array_equal(values, [2, 1])
    assert run.series("absent")[0].size == 0


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "name": "\xe9'.encode()[:-1], '{"st', "3"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    _write(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(torn if isinstance(torn, bytes) else torn.encode())
    run = RunFolder.read(tmp_path)
    assert [record["step"] for record in run.records] == [1, 2]


def test_a_last_line_without_its_newline_is_kept(tmp_path):
    run = RunFolder.read(_write(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], end=""))
    assert len(run.records) == 2


@pytest.mark.parametrize("bad", ["{not json}", '{"loss": 1.0}', "[1, 2]", '{"step": "1"}'])
def test_a_bad_line_before_the_last_is_an_error_that_names_it(tmp_path, bad):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n' + bad + '\n{"step": 2}\n')
    with pytest.raises(BrainFoundError, match=r"log\.jsonl:2: "):
        RunFolder.read(tmp_path)


def test_what_is_not_a_run_folder_is_refused(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match=r"log\.jsonl"):
            RunFolder.read(folder)


@pytest.mark.parametrize("content", ["a: [1", "[1]"])
def test_a_damaged_recipe_is_named(tmp_path, content):
    _write(tmp_path, [{"step": 1}])
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(BrainFoundError, match=r"recipe\.yaml") as error:
        RunFolder.read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_rollback_is_distinguished_from_what_was_measured(tmp_path):
    event = {"step": 2, "rollback": 1, "rolled_back_from": 4, "reason": "the probe fell", "lr_scale": 0.3}
    _write(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, event, {"step": 3, "loss": 1.0}])
    run = RunFolder.read(tmp_path)
    assert run.rollbacks == (event,)
    assert run.numeric_keys() == ["loss"]
    np.testing.assert_array_equal(run.series("loss")[0], [1, 2, 3])


@pytest.mark.parametrize("word", ["null", "NaN", "Infinity"])
def test_a_number_that_was_not_finite_is_one_of_the_series(tmp_path, word):
    """Written as null, or as the words NaN and Infinity."""
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "loss": {word}, "rank": {word}}}\n{{"step": 2, "loss": 1.0}}\n')
    run = RunFolder.read(tmp_path)
    steps, values = run.series("loss")
    np.testing.assert_array_equal(steps, [1, 2])
    np.testing.assert_array_equal(np.isfinite(values), [False, True])
    assert run.numeric_keys() == ["loss", "rank"]  # never finite, and yet a curve to be reported
