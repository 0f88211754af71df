"""Automatic runs: the choice by inner cross-validation, and the one bundle that comes out."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from brainfound.adapters import load_bundle
from brainfound.errors import RecipeError, UsageError
from brainfound.finetuning.auto import run as auto_run
from brainfound.finetuning.auto.features import LinearModel, choose_blocks, fold, volume_features
from brainfound.finetuning.auto.judge import TRIVIAL, Choice, Judge, make_judge
from brainfound.finetuning.auto.linear import fit_candidate, losses, trivial_scores
from brainfound.finetuning.auto.recipe import AutoRecipe, LinearCandidate, LinearRecipe
from brainfound.finetuning.auto.run import finetune_auto
from brainfound.finetuning.embedding_cache import EmbeddingCache
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.tasks import Classification, Regression, TargetColumn, resolve
from brainfound.models import BrainFoundForRegression, BrainFoundModel
from brainfound.models.stack_prediction import infer
from brainfound.recipes import validate
from brainfound.training.run_folder import read_facts

TINY = {
    "inner_folds": 3,
    "inner_repeats": 2,
    "linear": {"methods": ["penalised"], "features": ["cls", "layers"], "pooling": ["mean", "mean_std"]},
    "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
    "engine": {"precision": "no"},
}


def auto_recipe(**changes) -> AutoRecipe:
    return validate(AutoRecipe, {**TINY, **changes})


@pytest.fixture(scope="module")
def run(store, backbone_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("auto") / "run"
    return finetune_auto(store, backbone_folder, "age_years", out, recipe=auto_recipe(), quiet=True)


def test_one_bundle_comes_out_with_the_table_of_what_was_tried(run, store):
    tried = pd.read_csv(run / "tried.tsv", sep="\t")
    assert {"trivial", "average", "penalised-cls-mean", "penalised-layers-mean-std"} <= set(tried["candidate"])
    assert tried["mae"].is_monotonic_increasing
    assert tried["winner"].sum() == 1
    assert (tried["folds"] == 6).all()
    scores = json.loads((run / "scores.json").read_text())
    assert scores["auto"]["winner"] == tried["candidate"][tried["winner"]].item()
    assert scores["calibration"]["fitted_on"] == "inner folds"
    assert {"scores", "trivial", "frozen", "verdict", "intervals"} <= set(scores)
    facts = read_facts(run)
    assert (facts["status"], facts["kind"]) == ("done", "finetune")
    assert (run / "export" / "README.md").is_file()


def answers(folder, store, sessions):
    bundle = load_bundle(folder / "export")
    return [infer(bundle.model, store[session], bundle.metadata["num_slices"]) for session in sessions]


@pytest.mark.parametrize(
    ("target", "winner"),
    [
        ("age_years", "average"),
        ("age_years", "penalised-layers-mean-std"),
        ("diagnosis", "average"),
        ("diagnosis", TRIVIAL),
    ],
)
def test_the_bundle_answers_as_the_winner(small_store, tiny_backbone, tmp_path, monkeypatch, target, winner):
    final, changes = [], {}
    if target == "diagnosis":  # logistic fits take long
        changes = {"inner_folds": 2, "inner_repeats": 1, "linear": {**TINY["linear"], "pooling": ["mean"]}}

    def choose(judge, members):
        chosen = {"average": members[:2], TRIVIAL: []}.get(winner, [winner])
        return Choice(winner, {name: 0.3 + 0.4 / len(chosen) for name in chosen}, 1.0, 0.1, 2.0)

    def build(own, model, features, accelerator, real=auto_run._Run.build):
        final.append(model)
        return real(own, model, features, accelerator)

    monkeypatch.setattr(Judge, "choose", choose)
    monkeypatch.setattr(auto_run._Run, "build", build)
    run = finetune_auto(small_store, tiny_backbone, target, tmp_path / "run", recipe=auto_recipe(**changes), quiet=True)
    fields = {"slice_features": "cls_and_patches", "feature_layers": [1, 2, 3]}
    whole = BrainFoundModel.from_backbone(tiny_backbone, small_store.contrasts, **fields)
    cache = EmbeddingCache(whole, small_store, tmp_path / "cache")
    cache.ensure_embedded(range(3))
    scores = final[0].scores(volume_features(cache, range(3)))
    got = answers(run, small_store, range(3))
    if target == "age_years":
        task = json.loads((run / "run.json").read_text())["target"]
        expected = scores[:, 0] * task["std"] + task["mean"]
        np.testing.assert_allclose([answer.value for answer in got], expected, rtol=1e-4)
    else:
        expected = torch.from_numpy(scores).softmax(dim=1)
        np.testing.assert_allclose([answer.probabilities for answer in got], expected, atol=1e-4)
    if winner == TRIVIAL:
        assert len({tuple(answer.probabilities) for answer in got}) == 1


def test_folding_leaves_out_what_is_not_read(backbone_folder):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    layers, pixels = [1, 2, 3], torch.rand(2, 4, 3, 16, 16)
    for features, pooling in [
        ("patches", "mean"),
        ("cls", "mean_max"),
        ("layers", "mean_std"),
        ("cls", "mean_std_max"),
    ]:
        chosen = choose_blocks(LinearCandidate("penalised", features, pooling), 3)
        model = LinearModel(rng.normal(size=(1, 3, 3, 2, 32)) * chosen[None, ..., None], np.ones(1))
        folded = fold(model, layers)
        small = BrainFoundForRegression.from_backbone(backbone_folder, **folded.config)
        with torch.no_grad():
            small.head.score.weight.copy_(torch.from_numpy(folded.weight))
            small.head.score.bias.copy_(torch.from_numpy(folded.bias))
            fields = {"slice_features": "cls_and_patches", "feature_layers": layers, "aggregator": "mean_std_max"}
            whole = BrainFoundModel.from_backbone(backbone_folder, **fields)(pixels).volume_embedding
            expected = model.scores(whole.double().numpy().reshape(2, 3, 3, 2, 32))[:, 0]
            np.testing.assert_allclose(small(pixels).predictions, expected, rtol=1e-4, atol=1e-4)
    assert folded.config["feature_layers"] is None
    assert folded.config["slice_features"] == "cls"


def test_labels_of_the_test_part_change_nothing_in_the_model(run, store, backbone_folder, tmp_path):
    other = copy.copy(store)
    other.sessions = store.sessions.copy()
    test = pd.read_csv(run / "cases.tsv", sep="\t")["row"].tolist()
    ages = other.sessions.columns.get_loc("age_years")
    other.sessions.iloc[test, ages] = other.sessions.iloc[test[::-1], ages].to_numpy() + 7
    split = run / "splits.json"
    again = finetune_auto(
        other, backbone_folder, "age_years", tmp_path / "run", recipe=auto_recipe(), split=split, quiet=True
    )
    first, second = (load_bundle(folder / "export").model.state_dict() for folder in (run, again))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    before, after = (pd.read_csv(folder / "cases.tsv", sep="\t") for folder in (run, again))
    assert not np.allclose(before["truth"], after["truth"])


def test_sessions_of_a_subject_and_linked_subjects_stay_in_one_inner_fold(store):
    other = copy.copy(store)
    other.sessions = store.sessions.assign(subject=[f"s{number // 2}" for number in range(len(store))])
    column, pool = TargetColumn.find(other, "age_years"), np.arange(len(other))
    judge = make_judge(auto_recipe(), other, column, pool, resolve(other, pool.tolist(), column))
    for folds in judge.repeats:
        assert sorted(np.concatenate([test for _, test in folds])) == pool.tolist()
        for train, held_out in folds:
            assert not set(judge.groups[train]) & set(judge.groups[held_out])


def judge_of(values, task, candidates, features):
    subjects = np.arange(len(values))
    folds = [[(np.setdiff1d(subjects, part), part) for part in np.array_split(subjects, 5)]]
    judge = Judge(task, values, subjects, folds)
    names = [TRIVIAL, *(candidate.name for candidate in candidates)]
    judge.results = {name: judge.new_result(len(trivial_scores(task, values))) for name in names}
    for train, test in folds[0]:
        judge.results[TRIVIAL].scores[0, test] = trivial_scores(task, values[train])
        for candidate in candidates:
            fitted = fit_candidate(candidate, features[train], values[train], subjects[train], task)
            judge.results[candidate.name].scores[0, test] = fitted.scores(features[test])
    judge.add_average(names[1:])
    return judge


def test_noise_is_answered_by_the_trivial_model_and_a_signal_is_not():
    candidates = LinearRecipe(pooling=("mean",)).candidates()
    won = {0: 0, 3: 0}
    for seed in range(6):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(30, 3, 2, 2, 6))
        for signal in won:
            values = signal * features[:, 0, -1, 0, 0] + rng.normal(size=30)
            task = Regression("score", mean=float(values.mean()), std=float(values.std()))
            judge = judge_of(values, task, candidates, features)
            won[signal] += judge.choose([candidate.name for candidate in candidates]).name == TRIVIAL
    assert won[0] >= 5
    assert won[3] == 0


def test_the_average_is_of_the_better_half_and_gives_way_to_a_clear_winner_only():
    rng = np.random.default_rng(0)
    values, task = np.arange(40.0), Regression("score", mean=20.0, std=12.0)
    judge = judge_of(values, task, [], np.zeros((40, 3, 1, 2, 2)))
    errors = {"bad": 9.0, "good": 1.0, "worse": 12.0, "fair": 2.0}
    for name, error in errors.items():
        judge.results[name] = judge.new_result(1)
        judge.results[name].scores[0, :, 0] = (values + error * rng.normal(size=40) - task.mean) / task.std
    judge.add_average(list(errors))
    both = (judge.results["good"].scores + judge.results["fair"].scores) / 2
    np.testing.assert_allclose(judge.results["average"].scores, both)
    choice = judge.choose(list(errors))
    assert (choice.name, choice.weights) == ("average", {"good": 0.5, "fair": 0.5})
    for name, gain in {"trained alike": 0.0, "trained better": 0.9}.items():
        judge.results[name] = judge.new_result(1)
        judge.results[name].scores[0] = (1 - gain) * both[0] + gain * (values[:, None] - task.mean) / task.std
        assert judge.choose(list(errors)).name == ("trained better" if gain else "average")


def test_losses_are_those_of_the_metrics():
    rng = np.random.default_rng(0)
    scores, classes = rng.normal(size=(9, 3)), rng.integers(3, size=9)
    task = Classification("stage", ("a", "b", "c"))
    found = [auto_run.as_answer(task, row) for row in scores]
    expected = task.compute_scores(classes.tolist(), found)["log_loss"]
    assert losses(task, classes, scores).mean() == pytest.approx(expected)
    ages, task = rng.normal(size=9), Regression("age", mean=50.0, std=10.0)
    found = [auto_run.as_answer(task, row) for row in scores[:, :1]]
    assert losses(task, ages, scores[:, :1]).mean() == pytest.approx(task.compute_scores(ages.tolist(), found)["mae"])


def test_a_penalised_candidate_of_one_block_is_the_frozen_baseline():
    """The fit in the space of the volumes is the fit in that of the features."""
    rng = np.random.default_rng(0)
    features, subjects = rng.normal(size=(12, 3, 2, 2, 40)), np.arange(12)
    values = features[:, 0, -1, 0, 0] + 0.1 * rng.normal(size=12)
    task = Regression("score", mean=float(values.mean()), std=float(values.std()))
    fitted = fit_candidate(LinearCandidate("penalised", "cls", "mean"), features, values, subjects, task)
    flat, *_ = auto_run.standardise([features[:, 0, -1, 0]], "")
    weight, bias = task.fit_linear(auto_run.LabelledFeatures(flat, values, subjects), None)
    np.testing.assert_allclose(fitted.scores(features), flat @ weight.T + bias, rtol=1e-6)


TRAINED = {
    "head": {
        "adapter": "head-only",
        "num_slices": 4,
        "head_fit_passes": 1,
        "evaluate_every": 1,
        "engine": {"steps": 1, "batch_size": 2, "precision": "no"},
    }
}


def test_a_trained_winner_is_exported_like_any_other(store, backbone_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Judge, "choose", lambda judge, members: Choice("head", {"head": 1.0}, 1.0, 0.1, 2.0))
    recipe = auto_recipe(trained=TRAINED)
    run = finetune_auto(store, backbone_folder, "age_years", tmp_path / "run", recipe=recipe, quiet=True)
    tried = pd.read_csv(run / "tried.tsv", sep="\t").set_index("candidate").loc["head"]
    assert tried["folds"] >= 1
    assert tried["winner"]
    scores = json.loads((run / "scores.json").read_text())
    assert scores["auto"]["winner"] == "head"
    assert {"frozen", "validation", "verdict"} <= set(scores)
    assert answers(run, store, [0])[0].value is not None
    assert not list(run.glob("candidates/*/*/export"))
    assert finetune_auto(store, backbone_folder, "age_years", run, recipe=recipe, resume=True, quiet=True) == run


def test_a_segmentation_is_chosen_among_trained_candidates(small_store, tiny_backbone, tmp_path):
    decoder = {**TRAINED["head"], "task": {"decoder_width": 8}}
    trained = {
        "linear": {**decoder, "task": {"decoder": "linear"}},
        "fpn": decoder,
        "long": {"engine": {"steps": 10**9}},
    }
    changes = {"task": {"kind": "segmentation"}, "linear": {"methods": []}, "inner_folds": 2, "trained": trained}
    recipe = auto_recipe(**changes)
    run = finetune_auto(small_store, tiny_backbone, "mask", tmp_path / "run", recipe=recipe, quiet=True)
    tried = pd.read_csv(run / "tried.tsv", sep="\t").set_index("candidate")
    assert tried["dice"].dropna().is_monotonic_decreasing
    assert tried["folds"].to_dict() == {"linear": 2, "fpn": tried["folds"]["fpn"], "long": 0}
    assert "are left" in tried["stopped"]["long"]
    scores = json.loads((run / "scores.json").read_text())
    winner = scores["auto"]["winner"]
    folds = [pd.read_csv(run / "candidates" / winner / f"fold-{k}" / "cases.tsv", sep="\t") for k in (1, 2)]
    cases = pd.concat(folds)
    # Without a lesion, nothing is to be marked.
    dice = cases["dice"].fillna(1.0 * (cases["predicted_pixels"] == 0))
    assert cases["dice"].isna().any()
    assert scores["auto"]["inner_score"] == pytest.approx(dice.mean())
    assert load_bundle(run / "export").task == "segmentation"
    assert {"frozen", "trivial", "verdict"} <= set(scores)


def test_more_minutes_go_on_where_time_ran_out(small_store, tiny_backbone, tmp_path):
    trained = {"head": TRAINED["head"]}
    changes = {"task": {"kind": "segmentation"}, "linear": {"methods": []}, "inner_folds": 2, "trained": trained}
    options = {"quiet": True, "recipe": auto_recipe(**changes)}
    place = small_store, tiny_backbone, "mask", tmp_path / "run"
    with pytest.raises(UsageError, match="no candidate could be judged.*--minutes and --resume"):
        finetune_auto(*place, minutes=1e-9, **options)
    run = finetune_auto(*place, minutes=5, resume=True, **options)
    assert pd.read_csv(run / "tried.tsv", sep="\t")["stopped"].tolist() == ["finished"]


def test_what_does_not_fit_into_the_time_is_not_begun(store, backbone_folder, tmp_path):
    long = {"head": {**TRAINED["head"], "engine": {"steps": 10**9}}}
    recipe = auto_recipe(trained=long, minutes=0.01)
    run = finetune_auto(store, backbone_folder, "age_years", tmp_path / "run", recipe=recipe, quiet=True)
    tried = pd.read_csv(run / "tried.tsv", sep="\t").set_index("candidate").loc["head"]
    assert tried["folds"] == 0
    assert "are left" in tried["stopped"]


def test_a_cached_candidate_reads_the_features_of_the_linear_ones(store, backbone_folder, tmp_path):
    trained = {"head": {**TRAINED["head"], "cached_embeddings": True}}
    recipe = auto_recipe(trained=trained)
    assert recipe.finetuning("head", (1, 2, 3)).feature_layers == (1, 2, 3)
    options = {"recipe": auto_recipe(trained={"head": {**trained["head"], "num_slices": 128}}), "quiet": True}
    run = finetune_auto(store, backbone_folder, "age_years", tmp_path / "run", **options)
    assert len(list((run / "embeddings").iterdir())) == 1
    tried = pd.read_csv(run / "tried.tsv", sep="\t").set_index("candidate").loc["head"]
    assert tried["folds"] >= 1


def test_a_hopeless_candidate_is_stopped():
    values, task = np.arange(12.0), Regression("score", mean=5.5, std=3.0)
    judge = judge_of(values, task, [], np.zeros((12, 3, 1, 2, 2)))
    for name, error in {"good": 0.1, "bad": 3.0}.items():
        judge.results[name] = judge.new_result(1)
        noise = error * np.random.default_rng(0).uniform(0.5, 1, size=12)
        judge.results[name].scores[0, :, 0] = (values + noise - task.mean) / task.std
    judge.results["bad"].scores[0, 6:] = np.nan
    assert judge.is_hopeless("bad")
    assert not judge.is_hopeless("good")
    assert "bad" not in judge.finished()


def test_a_run_that_was_cut_off_keeps_what_was_tried(run, store, backbone_folder, tmp_path, monkeypatch):
    cut = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(cut / "export")
    facts = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    state = json.loads((cut / "tried.json").read_text())
    state["candidates"] = {name: own for name, own in state["candidates"].items() if name != "penalised-cls-mean"}
    (cut / "tried.json").write_text(json.dumps({**state, "seconds": 1000.0}))
    fitted = []
    real = auto_run.fit_candidate
    monkeypatch.setattr(auto_run, "fit_candidate", lambda one, *rest: fitted.append(one.name) or real(one, *rest))
    recipe = auto_recipe(minutes=60)
    finetune_auto(store, backbone_folder, "age_years", cut, recipe=recipe, resume=True, quiet=True)
    assert fitted[:6] == ["penalised-cls-mean"] * 6
    assert json.loads((cut / "tried.json").read_text())["seconds"] > 1000
    first, second = (load_bundle(folder / "export").model.state_dict() for folder in (run, cut))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    with pytest.raises(RecipeError, match="inner_repeats"):
        finetune_auto(store, backbone_folder, "age_years", cut, recipe=auto_recipe(inner_repeats=1), resume=True)


def test_what_cannot_be_chosen_is_refused(small_store, tiny_backbone, tmp_path):
    def refused(target, match, **changes):
        with pytest.raises((UsageError, RecipeError), match=match):
            finetune_auto(
                small_store, tiny_backbone, target, tmp_path / "run", recipe=auto_recipe(**changes), quiet=True
            )

    refused("mask", "classification and regression.*auto-segmentation")
    refused("age_years", "too few subjects.*at least 20", inner_folds=10)
    refused("age_years", "one number", task={"kind": "regression", "head": "bins"})
    with pytest.raises(RecipeError, match="adaptor.*did you mean|adaptor"):
        auto_recipe(trained={"a": {"adaptor": "full"}})
    with pytest.raises(RecipeError, match="no candidate"):
        auto_recipe(linear={"methods": []})
    with pytest.raises(RecipeError, match="finetune_auto"):
        finetune("auto", small_store, tiny_backbone, "age_years", tmp_path / "run")
    assert not (tmp_path / "run").exists()
