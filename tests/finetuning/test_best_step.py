"""The exported step is the best on the validation part, from step 0 on, also after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from brainfound.adapters import load_bundle
from brainfound.errors import TrainingError
from brainfound.finetuning.best_step import BestStep
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.training_task import FinetuneTask
from brainfound.recipes import validate
from tests.tiny_runs import log_lines, tiny_finetuning


def follow(scores: dict[int, float], metric: str = "mae", patience: int = 0, min_gain: float = 0.0) -> BestStep:
    """A model whose only weight is the step, with these validation scores; it stops where the best step ends it."""
    model = nn.Linear(1, 1, bias=False)
    best = BestStep(model, metric, patience, min_gain)
    for step, score in scores.items():
        with torch.no_grad():
            model.weight.fill_(step)
        best.add(step, score)
        if best.is_finished:
            break
    best.restore()
    assert best.step is None or model.weight.item() == best.step
    return best


@pytest.mark.parametrize(
    ("metric", "scores", "step"),
    [
        ("mae", {0: 4.2, 5: 6.0, 10: 7.1}, 0),
        ("mae", {0: 9.0, 5: 4.0, 10: 5.0}, 5),
        ("log_loss", {0: 0.7, 5: 0.6, 10: 0.5}, 10),
        ("dice", {0: 0.1, 5: 0.8, 10: 0.7}, 5),
        ("mae", {0: 5.0, 5: 5.0}, 0),  # equal is no gain
    ],
)
def test_the_best_step_is_the_best_by_the_direction_of_its_metric(metric, scores, step):
    assert follow(scores, metric).step == step


@pytest.mark.parametrize(("min_gain", "step"), [(0.0, 10), (0.02, 5), (0.2, 0)])
def test_a_gain_smaller_than_the_least_one_does_not_count(min_gain, step):
    assert follow({0: 10.0, 5: 9.0, 10: 8.9}, min_gain=min_gain).step == step


def test_training_ends_after_evaluations_without_gain():
    scores = dict(zip(range(0, 70, 10), [5, 4, 4.5, 4.4, 4.3, 1, 1], strict=True))
    assert max(follow(scores, patience=3).scores) == 40
    assert follow(scores, patience=3).step == 10
    assert follow(scores, patience=0).step == 50


def test_the_line_names_the_exported_step_and_both_ends():
    assert follow({0: 4.16, 25: 7.07}).describe() == "step 0 of 25: validation mae 4.160 (7.070 at step 25)"
    assert (
        follow({0: 4, 5: 3, 9: 5}).describe() == "step 5 of 9: validation mae 3.000 (4.000 at step 0, 5.000 at step 9)"
    )
    assert follow({}).describe() == "the last step: there was no validation score to choose by"
    assert follow({0: 4.0, 25: 6.0}).worsening == pytest.approx(0.5)
    assert follow({0: 0.8, 25: 0.6}, "dice").worsening == pytest.approx(0.25)
    assert follow({}).worsening == 0


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    """Give the validation scores of a run, and record its trained weights at each of these steps."""
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def script(scores: dict[int, float]) -> dict[int, dict[str, torch.Tensor]]:
        def evaluate(self, step):
            weights[step] = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
            return {"validation/mae": scores[step]}

        monkeypatch.setattr(FinetuneTask, "evaluate", evaluate)
        return weights

    return script


def recipe(**changes) -> FinetuneRecipe:
    content = tiny_finetuning({"steps": 6, "checkpoint_every": 3}, frozen_baseline=False, evaluate_every=2, **changes)
    return validate(FinetuneRecipe, content)


def exported(run: Path) -> dict[str, torch.Tensor]:
    """The weights of a bundle, without the unused copies that PEFT keeps of modules that are trained whole."""
    weights = load_bundle(run / "export").model.named_parameters()
    return {name: weight for name, weight in weights if ".original_module." not in name}


def test_the_best_step_is_exported_and_named(small_store, tiny_backbone, tmp_path, scripted):
    weights = scripted({0: 9.0, 2: 4.0, 4: 6.0, 6: 8.0})
    run = finetune(recipe(), small_store, tiny_backbone, "age_years", tmp_path / "run", quiet=True)
    found = exported(run)
    assert weights[2]
    assert all(torch.equal(found[name], weight) for name, weight in weights[2].items())
    assert not all(torch.equal(found[name], weight) for name, weight in weights[6].items())
    scores, facts = (json.loads((run / file).read_text()) for file in ("scores.json", "run.json"))
    assert (scores["step"], scores["last_step"]) == (facts["exported_step"], facts["step"]) == (2, 6)
    assert scores["validation"] == {"metric": "mae", "step": 2, "scores": {"0": 9.0, "2": 4.0, "4": 6.0, "6": 8.0}}
    card = (run / "export" / "README.md").read_text()
    assert "2 of 6; chosen on the validation part" in card
    assert scores["verdict"]["text"] in card
    assert "an earlier step is exported: step 2 of 6: validation mae 4.000" in scores["verdict"]["text"]


def test_an_interruption_does_not_change_what_is_exported(small_store, tiny_backbone, tmp_path, scripted, monkeypatch):
    scores = {0: 9.0, 2: 4.0, 4: 6.0, 6: 8.0}
    scripted(scores)
    whole = finetune(recipe(), small_store, tiny_backbone, "age_years", tmp_path / "whole", quiet=True)

    def broken(self, step, taken):
        if step == 3:  # after the checkpoint of step 3, which holds the weights of step 2
            raise TrainingError("pulled the plug")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTask, "after_step", broken)
        with pytest.raises(TrainingError, match="plug"):
            finetune(recipe(), small_store, tiny_backbone, "age_years", run, quiet=True)
    finetune(recipe(), small_store, tiny_backbone, "age_years", run, resume=True, quiet=True)
    first, second = exported(whole), exported(run)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert (run / "scores.json").read_text() == (whole / "scores.json").read_text()


def test_a_run_that_ended_early_is_finished(small_store, tiny_backbone, tmp_path, scripted, capsys):
    scripted({0: 4.0, 2: 5.0, 4: 6.0, 6: 1.0})
    run = finetune(recipe(patience=2), small_store, tiny_backbone, "age_years", tmp_path / "run")
    assert "exported: step 0 of 4: validation mae 4.000 (6.000 at step 4)" in capsys.readouterr().err
    assert max(line["step"] for line in log_lines(run, "loss")) == 4
    before = (run / "scores.json").read_text()
    finetune(recipe(patience=2), small_store, tiny_backbone, "age_years", run, resume=True)
    assert "this run is finished" in capsys.readouterr().err
    assert (run / "scores.json").read_text() == before


def test_without_evaluations_the_last_step_is_exported(small_store, tiny_backbone, tmp_path):
    content = recipe().model_copy(update={"evaluate_every": 0})
    run = finetune(content, small_store, tiny_backbone, "age_years", tmp_path / "run", quiet=True)
    scores = json.loads((run / "scores.json").read_text())
    assert (scores["step"], scores["last_step"]) == (6, 6)
    assert "validation" not in scores
