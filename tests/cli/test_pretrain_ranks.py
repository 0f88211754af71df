"""What a training prints on standard output is printed by the main rank only."""

from __future__ import annotations

from pathlib import Path

import pytest

from brainfound.cli.finetune import finetune
from brainfound.cli.pretrain import pretrain


class Rank:
    is_main_process = True


@pytest.mark.parametrize("is_main", [True, False])
def test_one_rank_prints_the_export(monkeypatch, capsys, is_main):
    Rank.is_main_process = is_main
    monkeypatch.setattr("accelerate.PartialState", Rank)
    monkeypatch.setattr("brainfound.pretraining.pretrain.pretrain", lambda *_, **__: Path("runs/a"))
    monkeypatch.setattr("brainfound.finetuning.finetune.finetune", lambda *_, **__: Path("runs/b"))
    monkeypatch.setattr(
        "brainfound.finetuning.scoring.read_scores", lambda folder: {"part": "test", "verdict": {"text": "verdict"}}
    )
    monkeypatch.setattr("brainfound.cli.finetune.scores_line", lambda scores: "scores")
    pretrain("recipe")
    finetune("finetune-regression", Path("store"), ["model"], "target")
    expected = f"{Path('runs/a/export')}\nscores\nverdict\n{Path('runs/b/export')}\n"
    assert capsys.readouterr().out == (expected if is_main else "")
