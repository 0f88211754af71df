"""log.jsonl is JSON to the letter, whatever was measured."""

from __future__ import annotations

import json
import math

import pytest

from brainfound.errors import TrainingError
from brainfound.report.curves import RunFolder
from brainfound.training.log import TrainingLog


def refuse(word):
    pytest.fail(f"{word} is not JSON")


def strict_lines(path):
    return [json.loads(text, parse_constant=refuse) for text in path.open()]


def test_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "log.jsonl"
    line = {"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1, "target": "age"}
    with TrainingLog(path, 2, quiet=True, is_main=True) as log:
        log.write(line)
        log.write({"step": 2, "loss": -math.inf})
        assert math.isnan(line["loss"])  # what is in memory stays as it was
        log.truncate_after(1)
        log.write({"step": 2, "loss": 0.5})
    assert strict_lines(path) == [
        {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1, "target": "age"},
        {"step": 2, "loss": 0.5},
    ]
    steps, losses = RunFolder.read(tmp_path).series("loss")
    assert steps.tolist() == [1, 2]
    assert math.isnan(losses[0])
    assert losses[1] == 0.5


def test_an_event_with_a_number_that_is_not_finite_is_written_once(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    log = TrainingLog(path, 2, quiet=True, is_main=True)
    for _ in range(2):
        log.roll_back({"step": 1, "rolled_back_from": 2, "score": math.nan}, 1)
    assert len(strict_lines(path)) == 2
    assert len(RunFolder.read(tmp_path).rollbacks) == 1


@pytest.mark.parametrize("damaged", ['{"step": 2, "lo\x00', "[2]", '{"loss": 1.0}'])
def test_only_a_damaged_last_line_is_forgiven(tmp_path, damaged):
    path = tmp_path / "log.jsonl"
    whole = ['{"step": 1}', damaged, '{"step": 3}', '{"step": 4}', ""]
    path.write_text("\n".join(whole))
    log = TrainingLog(path, 9, quiet=True, is_main=True)
    before = path.read_bytes()
    for change in (lambda: log.truncate_after(9), lambda: log.roll_back({"step": 1, "rolled_back_from": 4}, 1)):
        with pytest.raises(TrainingError, match=r"log\.jsonl:2: a line of the log is damaged .*Remove this line"):
            change()
        assert path.read_bytes() == before
    for ending in ("", "\n"):
        path.write_text('{"step": 1}\n{"step": 2}\n' + damaged + ending)
        log.truncate_after(9)
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
