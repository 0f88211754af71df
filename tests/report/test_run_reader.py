"""Reading run folders, whole and damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from brainfound.errors import BrainFoundError, UsageError
from brainfound.report.run_reader import RunFolder


def _write(folder, lines, end="\n"):
    (folder / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + end)
    return folder


def test_reads_recipe_facts_and_series(tmp_path):
    first = {"step": 1, "loss": 2.0, "note": "x", "frozen": True}
    _write(tmp_path, [first, {"step": 2, "probe": 0.5}, {"step": 3, "loss": 1}])
    (tmp_path / "recipe.yaml").write_text("name: tiny\noptim: {lr: 0.1}\n")
    (tmp_path / "run.json").write_text('{"seed": 7}')
    run = RunFolder.read(tmp_path)
    assert run.recipe["optim"] == {"lr": 0.1}
    assert run.facts == {"seed": 7}
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
    with pytest.raises(UsageError, match="no such run folder"):
        RunFolder.read(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"log\.jsonl"):
        RunFolder.read(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("recipe.yaml", "a: [1"), ("run.json", "{"), ("run.json", "[1]")])
def test_a_damaged_file_is_named(tmp_path, name, content):
    _write(tmp_path, [{"step": 1}])
    (tmp_path / name).write_text(content)
    with pytest.raises(BrainFoundError, match=name.replace(".", r"\.")) as error:
        RunFolder.read(tmp_path)
    assert "\n" not in str(error.value)


def test_steps_that_a_resumed_run_did_again_are_replaced(tmp_path):
    first = [{"step": s, "loss": 100.0 + s} for s in (5, 10, 15)]
    # Probes share the step of the line before them; that is no resumption.
    resumed = [{"step": 11, "loss": 1.0}, {"step": 11, "probe": 0.5}, {"step": 12, "loss": 2.0}]
    run = RunFolder.read(_write(tmp_path, first + resumed))
    steps, values = run.series("loss")
    np.testing.assert_array_equal(steps, [5, 10, 11, 12])
    np.testing.assert_array_equal(values, [105, 110, 1, 2])
    assert run.series("probe")[1].tolist() == [0.5]


def test_each_fold_counts_its_own_steps(tmp_path):
    lines = [{"step": s, "fold": fold, "loss": 10.0 * fold + s} for fold in (0, 1) for s in (1, 2, 3)]
    run = RunFolder.read(_write(tmp_path, lines))
    assert run.folds() == [0, 1]
    assert run.series("loss", fold=0)[1].tolist() == [1, 2, 3]
    assert run.series("loss", fold=1)[1].tolist() == [11, 12, 13]


def test_a_rollback_is_told_apart_from_what_was_measured(tmp_path):
    event = {"step": 2, "rollback": 1, "rolled_back_from": 4, "reason": "the probe fell", "lr_scale": 0.3}
    _write(tmp_path, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, event, {"step": 3, "loss": 1.0}])
    run = RunFolder.read(tmp_path)
    assert run.rollbacks == (event,)
    assert run.numeric_keys() == ["loss"]
    np.testing.assert_array_equal(run.series("loss")[0], [1, 2, 3])


@pytest.mark.parametrize("word", ["null", "NaN", "Infinity"])
def test_a_number_that_was_not_finite_is_one_of_the_series(tmp_path, word):
    """null as logs say today, and the words of older ones."""
    (tmp_path / "log.jsonl").write_text(
        f'{{"step": 1, "fold": null, "loss": {word}, "rank": {word}}}\n{{"step": 2, "loss": 1.0}}\n'
    )
    run = RunFolder.read(tmp_path)
    assert run.folds() == [None]
    steps, values = run.series("loss")
    np.testing.assert_array_equal(steps, [1, 2])
    np.testing.assert_array_equal(np.isfinite(values), [False, True])
    assert run.numeric_keys() == ["loss", "rank"]  # never finite, and yet a curve to be told of
