"""The benchmarks run and say what they should; their figures are not tested."""

from __future__ import annotations

import gzip
import importlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from brainfound.errors import UsageError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = shlex.split(
    "--subjects 3 --rounds 1 --shape 40 40 32 --spacing-mm 6 "
    "--sessions 4 12 --slices-per-session 10 --reads 70 --worker-shape 32 32 24"
)


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux only")
def test_reading_and_memory_at_tiny_size(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, str(BENCHMARKS / "data.py"), "--only", "reading,memory", "--out", str(out), *TINY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result.keys() == {"machine", "settings", "memory", "reading", "minutes"}
    assert result["reading"]["slice_shape"] == [3, 224, 224]
    assert result["reading"]["slices_per_second"].keys() == {"store", "nifti, whole volumes", "nifti, only the slice"}
    assert all(value > 0 for value in result["reading"]["slices_per_second"].values())
    stages = result["memory"]["store"]["stages"]
    assert list(stages) == ["imports", "opened", "random slices read", "sampler's tables"]
    assert stages["random slices read"]["anonymous_mib"].keys() == {"4", "12", "ratio"}
    (case,) = result["memory"]["worker"].values()
    assert case["peak_mib"] >= case["before_mib"] > 50
    assert "| random slices from the store, per second |" in done.stdout
    assert "anonymous memory with 12 sessions over 4" in done.stdout


def test_tools_take_turns_after_one_round_to_warm_up(module):
    calls: list[str] = []
    tools = {name: (lambda name=name: calls.append(name)) for name in "AB"}
    seconds = module("rounds").interleave(tools, rounds=2)
    assert "".join(calls) == "AB" + "ABAB"
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_a_ratio_is_the_median_within_rounds(module):
    # The whole machine is ten times slower in the second round; the ratio of the medians would be 2.
    ratios = module("rounds").ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0])
    assert ratios == {"median": 2.0, "min": 2.0, "max": 4.0}


def test_agreement_finds_a_shift_and_refuses_other_work(module):
    rng = np.random.default_rng(0)
    ours = rng.integers(1, 255, (12, 2, 30, 28), dtype=np.uint8)
    agreement = module("peers").agreement
    found = agreement(ours, np.roll(ours, (1, -2), axis=(0, 3)))
    assert found["shift_voxels"] == (1, 0, -2)
    assert min(found["correlation_per_contrast"]) > 0.999
    other = agreement(ours, rng.integers(1, 255, ours.shape, dtype=np.uint8))
    assert max(other["correlation_per_contrast"]) < 0.5


def test_the_table_says_whether_a_target_is_met(module):
    data = module("data")
    reading = {
        "slices_per_second": {"store": 9_999.0},
        "store_over": {"nifti, whole volumes": {"median": 100.0}, "nifti, only the slice": {"median": 7.0}},
    }
    lines = data.table({"reading": reading}).splitlines()
    assert lines[2].endswith("| no |")
    assert lines[3].endswith("| ≥ 100 | yes |")
    assert lines[4].endswith("| 7.0 |  |  |")


def test_the_breakdown_adds_up_and_names_the_work(module, write_scan):
    file = write_scan("scan.nii.gz")
    seconds_by_kind = module("breakdown").seconds_by_kind
    scan = importlib.import_module("brainfound.data.reading.scan")

    def run() -> None:
        scan.load_scan(file)
        gzip.decompress(file.read_bytes())

    started = time.perf_counter()
    seconds = seconds_by_kind(run)
    whole = time.perf_counter() - started
    assert {"reading", "gunzip"} <= seconds.keys()
    assert 0 < sum(seconds.values()) <= whole


@pytest.mark.slow
def test_pretraining_at_tiny_size_without_the_peer(tmp_path):
    out = tmp_path / "results.json"
    sizes = shlex.split(
        "--only steps,wait,breakdown,gpu --device cpu --precision fp32 --threads 1 --rounds 1 --wait-steps 3 "
        "--model tiny --batch 2 --global-size 56 --local-size 28 --num-local 2 "
        "--prototypes 256 --hidden 64 --bottleneck 32 --subjects 2 --spacing-mm 5"
    )
    command = [sys.executable, str(BENCHMARKS / "pretrain.py"), "--out", str(out), *sizes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {"alone", "wait", "breakdown", "gpu"} <= result.keys()
    assert "steps" not in result
    alone = result["alone"]
    assert alone["mfu"]["median"] > 0
    assert alone["images_per_second"].keys() == {"BrainFound", "BrainFound, views from uint8"}
    assert alone["facts"]["BrainFound"]["recipe"]["objective"]["anchor_gram_weight"] == 0
    assert 0 <= result["wait"]["data_wait"] <= 1
    assert "matrix products" in result["breakdown"]["BrainFound"]["share_by_kind"]
    assert "| images/s over LightlyTrain, same FLOPs | not measured: no --peer-python | ≥ 1.5 |  |" in done.stdout


def test_counted_products_are_those_of_the_flop_counter(module):
    torch = importlib.import_module("torch")
    flop_counter = importlib.import_module("torch.utils.flop_counter")
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Flatten(), torch.nn.Linear(8 * 9, 5))
    images = torch.randn(2, 3, 12, 12)

    def run() -> None:
        (layers(images) @ torch.ones(5, 7)).square().sum().backward()

    run()
    with flop_counter.FlopCounterMode(display=False) as counter:
        run()
    with module("matrix_products").StepProducts() as recorded:
        run()
    assert recorded.flops == counter.get_total_flops() > 0
    assert module("matrix_products").Replay(recorded.products).seconds(lambda: None) > 0


def test_fused_attention_counts_as_the_products_it_stands_for(module):
    torch = importlib.import_module("torch")
    functional = importlib.import_module("torch.nn.functional")
    products = module("matrix_products").StepProducts

    def attention(query, key, value):
        return functional.softmax(query @ key.mT, dim=-1) @ value

    flops = []
    for attend in (attention, functional.scaled_dot_product_attention):
        query, key, value = torch.randn(3, 2, 3, 17, 8, requires_grad=True).unbind(0)
        with products() as recorded:
            attend(query, key, value).sum().backward()
        flops.append(recorded.flops)
    assert flops[0] == flops[1] == 6 * 2 * (2 * 3) * 17 * 17 * 8


def test_a_step_is_broken_down_by_kind_of_work(module):
    torch = importlib.import_module("torch")
    breakdown = module("step_breakdown")
    width, prototypes = 32, 300
    weight = torch.randn(prototypes, width, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    rows = torch.randn(8, width)
    started = time.perf_counter()
    with breakdown.StepProfile(prototypes) as profile:
        with torch.profiler.record_function(breakdown.VIEWS):
            rows = rows.sin()

        def closure():
            with torch.profiler.record_function(breakdown.MODEL):
                loss = (rows @ weight.T).logsumexp(dim=1).sum()
                loss.backward()
            return loss

        optimizer.step(closure)
    whole = time.perf_counter() - started
    by_kind = profile.shares(whole)["by_kind"]
    waiting = by_kind.pop("Python and waiting")
    assert by_kind.keys() >= {"views", "matrix products", "prototype losses", "optimiser, clipping and teacher"}
    assert 0 < sum(by_kind.values()) < whole
    assert waiting == pytest.approx(whole - sum(by_kind.values()))
    assert profile.shares(2 * whole)["by_kind"]["Python and waiting"] == pytest.approx(waiting + whole)
    assert profile.shares(0.0)["by_kind"]["Python and waiting"] == 0
    kinds = {entry["operator"]: entry["kind"] for entry in profile.shares(whole)["operators"]}
    assert kinds["aten::mm"] == "matrix products"
    assert kinds["aten::sin"] == "views"


def test_the_pretraining_table_holds_targets_against_the_right_side(module):
    ratios = {"BrainFound": {"median": 1.6}, "BrainFound, views from uint8": {"median": 1.4}}
    steps = {
        "rate_over_peer": ratios | {"BrainFound, depth 0.3": {"median": 1.9}},
        "images_per_second": {"BrainFound": 2.0},
        "flops_over_peer": 1.0,
        "memory_over_peer": 0.7,
        "peak_memory_gib": {"BrainFound": 4.0},
        "mfu": {"median": 0.61},
    }
    depth = {"drop_path": 0.3, "rate_over_peer": {"median": 2.1}, "flops_over_peer": 1.0, "memory_over_peer": 0.5}
    wait = {"data_wait": 0.04}
    text = module("pretrain").table({"steps": steps, "depth": depth, "wait": wait})
    assert "| images/s over LightlyTrain, same FLOPs | 1.6 | ≥ 1.5 | yes |" in text
    assert "| peak memory over LightlyTrain | 0.7 | ≤ 0.6 | no |" in text
    assert "over LightlyTrain with the same | 2.1 | ≥ 2 | yes |" in text
    assert "over LightlyTrain without | 1.9 | ≥ 2 | no |" in text
    assert "| data wait, share of step time | 0.04 | ≤ 0.03 | no |" in text


@pytest.fixture
def continued(module, monkeypatch):
    """The benchmark's main, in this process; it sets environment variables and PyTorch's threads."""
    torch = importlib.import_module("torch")
    rounds, threads = module("rounds"), torch.get_num_threads()
    for name in (*rounds.THREAD_VARIABLES, "HF_HUB_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    yield module("continued").main
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_guard_elsewhere_at_tiny_size(continued, module, tmp_path, capsys, monkeypatch):
    sizes = shlex.split(
        "--sessions 6 --spacing-mm 8 --slice-mm 20 --leaves 4 3 --patches 4 4 2 --width 16 "
        "--layers 1 --heads 1 --num-local 1 --prototypes 16 --batch 4 --start-batch 4 "
        "--start-steps 2 --steps 4 --unsafe-steps 4 --looks 2 --seeds 0 --unsafe-seeds 0 1 --workers 1"
    )
    monkeypatch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: None)
    out = tmp_path / "results.json"
    module("guard_elsewhere").main(["--work", str(tmp_path / "work"), "--out", str(out), *sizes])
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert {kind: len(of_kind) for kind, of_kind in runs.items()} == {
        "settings of dinov2#204": 2, "masked autoencoding, high rate": 2, "safe ladder": 1,
    }  # fmt: skip
    rates = [of_kind[0]["effective_lr"] for of_kind in runs.values()]
    assert rates[1] == pytest.approx(50 * rates[2])
    assert rates[0] > 10 * rates[2]
    assert len(capsys.readouterr().out.splitlines()) == 2 + 5, "two lines of header, a line per run"
    assert str(tmp_path) not in out.read_text(encoding="utf-8")


@pytest.mark.slow
def test_continued_pretraining_at_tiny_size_and_once_more(continued, tmp_path, capsys, monkeypatch):
    sizes = shlex.split(
        "--sessions 6 --test-sessions 8 --spacing-mm 8 --slice-mm 20 --leaves 4 3 --patches 4 4 2 --width 16 "
        "--layers 1 --heads 1 --num-local 1 --prototypes 16 --batch 4 --start-batch 4 "
        "--start-steps 2 --steps 6 --unsafe-steps 6 --looks 3 "
        "--seeds 0 --unsafe-seeds 0 --workers 1 --probe-target slice_position"
    )
    out, work = tmp_path / "results.json", tmp_path / "work"
    # Each run's own curves take longer to draw than such a run takes.
    monkeypatch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: None)
    monkeypatch.setattr("frozen_probes.REPEATS", 1)
    continued(["--work", str(work), "--out", str(out), *sizes])
    printed = capsys.readouterr()
    assert "painted on label maps is left out" in printed.err
    result = json.loads(out.read_text(encoding="utf-8"))
    found = result["cohorts"]["the phantom's own geometry"]
    assert found["data"]["pretraining"]["sites"].keys() <= {"site-1", "site-2"}
    assert found["data"]["test"]["sites"] == {"site-3": 8}
    assert list(found["scores"]) == [
        "trivial", "random weights", "start", "continued, safe ladder", "continued, settings of dinov2#204",
    ]  # fmt: skip
    assert len(found["scores"]["continued, safe ladder"]["age MAE, years"]["runs"]) == 1
    (unsafe,) = found["runs"]["unsafe"]
    (safe,) = found["runs"]["ladder"]
    assert unsafe["effective_lr"] > 10 * safe["effective_lr"]
    assert safe["probe"]["steps"][0] == 0
    assert len(safe["probe"]["linear"]) > 2
    for probe in safe["retention"].values():
        assert len(probe["scores"]) == len(probe["standard_error"]) == len(safe["probe"]["steps"])
    assert {"slice_position_knn", "patch_texture", "kept_patches"} <= safe["retention"].keys()
    assert "  - " in printed.out
    assert "| gain of continued, safe ladder over start | " in printed.out
    assert (work / "probes.png").stat().st_size > 1000
    assert str(tmp_path) not in out.read_text(encoding="utf-8")

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("made again")

    for name in ("shifted_cohorts.write_subject", "continued_runs.pretrain", "frozen_probes.FrozenProbes.run"):
        monkeypatch.setattr(name, refuse)
    continued(["--work", str(work), "--out", str(out), *sizes])
    assert json.loads(out.read_text(encoding="utf-8"))["cohorts"] == result["cohorts"]


def test_no_part_of_the_shifted_cohorts_shares_a_site_or_a_label_map(module):
    parts = module("shifted_cohorts").PARTS
    sites = [site for part in parts for site in part.sites]
    assert len(set(sites)) == len(sites)
    for count in range(5, 15):
        maps = [map_ for part in parts for map_ in part.maps([Path(str(i)) for i in range(count)])]
        assert len(set(maps)) == len(maps)
    with pytest.raises(importlib.import_module("brainfound.errors").UsageError, match="too few label maps"):
        [part.maps([Path("only")]) for part in parts]


def test_paired_outcomes_find_a_gain_a_loss_and_nothing(module):
    paired, outcome = module("paired_outcomes"), module("frozen_probes").Outcome
    rng = np.random.default_rng(0)
    ill = rng.integers(0, 2, 60)
    before = outcome(rng.uniform(5, 15, 60), rng.random(60), rng.uniform(0.4, 0.6, 60))
    runs = [
        outcome(before.age_error_years - 2 + rng.normal(0, 1, 60), before.diagnosis_score + 0.8 * ill,
                before.patch_accuracy - 0.1)
        for _ in range(2)
    ]  # fmt: skip
    found = paired.compare(runs, [before], ill, permutations=200)
    assert found["age MAE, years"]["gain"] == pytest.approx(2, abs=0.4)
    assert found["diagnosis AUROC"]["gain"] > 0.2
    assert found["tissue patch accuracy"]["gain"] == pytest.approx(-0.1)
    assert all(of["p"] < 0.02 and of["interval"][0] * of["interval"][1] > 0 for of in found.values())
    same = paired.compare([before], [before], ill, permutations=200)
    assert all(of["gain"] == 0 and of["p"] == 1 for of in same.values())


def test_several_runs_are_scored_one_by_one_and_not_as_an_ensemble(module):
    paired, outcome = module("paired_outcomes"), module("frozen_probes").Outcome
    ill, nothing = np.array([0, 0, 1, 1]), np.zeros(4)
    # Each run is wrong about one pair of four; their mean would be right about all.
    runs = [outcome(nothing, np.array(scores), nothing) for scores in ([0.0, 0.6, 0.5, 0.9], [0.6, 0.0, 0.9, 0.5])]
    assert paired.score(runs, ill)["diagnosis AUROC"]["mean"] == 0.75


def augmentation_answers(rng: np.random.Generator, strong_gains: bool) -> dict:
    """Made answers of 40 subjects and two runs of each preset; "strong" is better at one task and worse at another."""
    truth, labels = rng.uniform(20, 90, 40), rng.choice(["a", "b", "c"], 40)
    of_task: dict = {"segmentation": {}, "regression": {}, "classification": {}}
    for preset, shift in (("none", 0.0), ("strong", 1.0 if strong_gains else 0.0)):
        for task, runs in of_task.items():
            runs[preset] = []
            for _ in range(2):
                dice = 0.6 + 0.1 * shift + rng.normal(0, 0.02, 40)
                error = (8 + 4 * shift + rng.normal(0, 1, 40)) * rng.choice([-1, 1], 40)
                scores = {k: (labels == k) * (1 + shift) + rng.normal(0, 1, 40) for k in "abc"}
                cases = {
                    "segmentation": {"dice": dice, "reference_pixels": np.ones(40)},
                    "regression": {"truth": truth, "prediction": truth + error},
                    "classification": {"truth": labels} | {f"p({k})": value for k, value in scores.items()},
                }[task]
                runs[preset].append({"trivial": 0.5, "cases": {name: list(of) for name, of in cases.items()}})
    return of_task


def test_a_comparison_of_ways_finds_gains_and_losses_task_by_task(module):
    shifted_runs = module("shifted_runs")
    found = shifted_runs.judge(augmentation_answers(np.random.default_rng(0), True), permutations=150, resamples=60)
    gains = {task: of["gains"]["strong over none"] for task, of in found.items()}
    assert gains["segmentation"]["gain"] == pytest.approx(0.1, abs=0.02)
    assert gains["regression"]["gain"] == pytest.approx(-4, abs=0.7)  # a larger error is a loss
    assert gains["classification"]["gain"] > 0.05
    for of in gains.values():
        assert of["p"] <= of["p_holm"] < 0.05
        assert of["interval"][0] <= of["gain"] <= of["interval"][1]
    assert gains["segmentation"]["p_holm"] == pytest.approx(3 * gains["segmentation"]["p"], rel=1e-3)
    # Each run alone, not their mean.
    assert len(found["classification"]["scores"]["none"]["runs"]) == 2
    printed = shifted_runs.table({"tasks": found})
    assert "| tissue, Dice: strong over none | +0.1" in printed
    same = shifted_runs.judge(augmentation_answers(np.random.default_rng(1), False), permutations=150, resamples=60)
    assert all(of["gains"]["strong over none"]["p_holm"] > 0.05 for of in same.values())


def test_ways_differ_in_what_they_are_about_alone(module):
    shifted_runs, augmentation, precision = module("shifted_runs"), module("augmentation"), module("precision")
    partial_input = module("partial_input")
    parser = shifted_runs.shared_options("Nothing.")
    options = parser.parse_args(["--work", "nowhere", "--steps", "50"])
    for task in shifted_runs.TASKS:
        recipes = [shifted_runs.recipe_of(task, 1, options, preset=preset) for preset in augmentation.PRESETS]
        assert len({recipe.augmentation.model_dump_json() for recipe in recipes}) == 3
        assert {recipe.augmentation.contrast_dropout for recipe in recipes} == {0.2}
        assert len({recipe.model_dump_json(exclude={"augmentation"}) for recipe in recipes}) == 1
        recipes = [way(task, 1) for way in precision.ways(options).values()]
        assert [recipe.engine.precision for recipe in recipes] == ["no", "bf16"]
        assert len({recipe.model_dump_json(exclude={"engine": {"precision"}}) for recipe in recipes}) == 1
        options.dropout = 0.4
        recipes = [way(task, 1) for way in partial_input.ways(options).values()]
        assert [recipe.augmentation.contrast_dropout for recipe in recipes] == [0.4, 0.0]
        assert len({recipe.model_dump_json(exclude={"augmentation": {"contrast_dropout"}}) for recipe in recipes}) == 1


def test_partial_input_is_judged_over_the_subsets_that_lack_a_contrast(module):
    """Dropout that helps with T1w alone, by 2 years, and costs 1 with both, gains 2: full input is not counted."""
    partial_input, rng = module("partial_input"), np.random.default_rng(0)
    truth = rng.uniform(20, 90, 40)

    def answers(errors: dict) -> dict:
        made = {}
        for subset, error in errors.items():
            sign = rng.choice([-1, 1], 40)
            cases = {"truth": list(truth), "prediction": list(truth + sign * (error + rng.normal(0, 0.5, 40)))}
            made[subset] = {"trivial": 15.0, "cases": cases}
        return made

    with_dropout = [answers({"T1w+T2w": 8.0, "T1w": 9.0, "T2w": 12.0}) for _ in range(2)]
    without = [answers({"T1w+T2w": 7.0, "T1w": 13.0, "T2w": 12.0}) for _ in range(2)]
    found = partial_input.judge(
        {"regression": {partial_input.WITH: with_dropout, partial_input.WITHOUT: without}}, 200, 60
    )["regression"]
    gain = found[partial_input.GAIN]
    assert gain["gain"] == pytest.approx(2, abs=0.3)
    assert gain["interval"][0] > 0
    assert gain["p_holm"] < 0.05
    over_trivial = found["scores"]["T1w"][partial_input.WITHOUT]["gain_over_trivial"]
    assert over_trivial[0] == pytest.approx(2, abs=0.4)
    assert over_trivial[1] < over_trivial[0] < over_trivial[2]
    printed = partial_input.table({"tasks": {"regression": found}})
    assert "\n| T1w | " in printed
    assert f"lack a contrast: {gain['gain']:+.3g} (" in printed


def test_tissues_of_real_brains_share_no_code(module):
    codes = [code for members in module("real_brains").TISSUES.values() for code in members]
    assert len(codes) == len(set(codes))
    assert 0 not in codes


def test_volumes_that_a_segmentation_measures_tell_an_age(module, small_store, monkeypatch):
    volumes = module("regional_volumes")

    def of(preprocessing, num_codes=11):
        target = SimpleNamespace(codes=tuple(range(num_codes)))
        return SimpleNamespace(model=None, preprocessing=preprocessing, target=target)

    def found(model, stack):
        return SimpleNamespace(classes=np.repeat([0, 2, 4, 8], [50, int(stack.covariates["age_years"]), 100, 30]))

    monkeypatch.setattr("brainfound.load", lambda folder: of(small_store.preprocessing))
    monkeypatch.setattr("brainfound.models.stack_prediction.infer", found)
    shares = volumes.measured_shares(small_store, Path("run"))
    assert shares.shape == (12, 7)
    assert shares.sum(axis=1) == pytest.approx(1)
    parts = {"train": np.arange(0, 12, 2), "test": np.arange(1, 12, 2)}
    errors = [way(small_store, *given, parts)["age"] for way, given in (
        (volumes.regional_ridge, [shares]), (volumes.mean_age, []))]  # fmt: skip
    assert np.mean(errors[0]) < np.mean(errors[1]) / 3
    other = small_store.preprocessing.model_copy(update={"size": (40, 40)})
    for wrong in (of(other), of(small_store.preprocessing, num_codes=3)):
        monkeypatch.setattr("brainfound.load", lambda folder, wrong=wrong: wrong)
        with pytest.raises(UsageError, match="segmentation of simulated tissue"):
            volumes.measured_shares(small_store, Path("run"))


def test_ways_on_real_brains_are_compared_with_the_first_subject_by_subject(module):
    real_brains, rng = module("real_brains"), np.random.default_rng(0)
    options = real_brains.parse(["--cohort", ".", "--model", "m", "--work", "w", "--seeds", "0", "1"])
    options.permutations = 200
    cells = [(fold, seed) for seed in options.seeds for fold in ("fold-1", "fold-2")]
    hard = rng.uniform(0, 10, 20)
    answers = {}
    for way, more in ((real_brains.LORA, 2.0), (real_brains.UNET, 4.0), (real_brains.MEAN, 2.0)):
        for fold, seed in cells:
            rows = np.arange(0, 20, 2) + (fold == "fold-2")
            errors = hard[rows] + more + rng.normal(0, 0.1, 10)
            answers[way, fold, seed] = {"rows": rows.tolist(), "age": errors.tolist(), "seconds": 5.0, "steps": 7}
    found = real_brains.judge("regression", answers, cells, 20, options)
    gains = {way: of.get("gain of the first") for way, of in found["scores"].items()}
    assert gains[real_brains.LORA] is None
    assert gains[real_brains.UNET]["mean"] == pytest.approx(2, abs=0.1)
    assert gains[real_brains.UNET]["p_holm"] < 0.05 < gains[real_brains.MEAN]["p_holm"]
    assert found["scores"][real_brains.LORA]["age"]["mean"] == pytest.approx(hard.mean() + 2, abs=0.1)
    assert found["unet_steps"] == [7, 7]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "ways"),
    [("augmentation", ["none", "mild", "strong"]), ("precision", ["float32", "bfloat16"]), ("partial_input", [])],
)
def test_ways_at_another_site_at_tiny_size_and_once_more(module, tmp_path, monkeypatch, capsys, script, ways):
    torch = importlib.import_module("torch")
    threads = torch.get_num_threads()
    for name in (*module("rounds").THREAD_VARIABLES, "HF_HUB_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: folder)
    sizes = shlex.split(
        "--sessions 24 --test-sessions 8 --spacing-mm 8 --slice-mm 20 --patches 4 --start-steps 2 --steps 2 "
        "--segmentation-steps 2 --slices 3 --seeds 0 --permutations 50 --workers 1 --set head_fit_passes=1"
    )
    work, out = tmp_path / "work", tmp_path / "results.json"
    main = module(script).main
    try:
        main(["--work", str(work), "--out", str(out), *sizes])
        result = json.loads(out.read_text(encoding="utf-8"))
        assert result["data"]["scored"]["sites"] == {"site-3": 8}
        assert "site-3" not in result["data"]["learnt from"]["sites"]
        for of_task in result["tasks"].values():
            if ways:
                assert list(of_task["scores"]) == ways
                pairs = [f"{after} over {before}" for at, after in enumerate(ways) for before in ways[:at]]
                assert sorted(of_task["gains"]) == sorted(pairs)
            else:
                assert len(of_task["scores"]) == 7, "every subset of three contrasts"
        assert f"| age, MAE in years{': ' if ways else ' '}" in capsys.readouterr().out
        assert str(tmp_path) not in out.read_text(encoding="utf-8")
        monkeypatch.setattr("brainfound.finetuning.finetune.finetune", None)  # nothing is trained again
        main(["--work", str(work), "--out", str(out), *sizes])
        assert json.loads(out.read_text(encoding="utf-8"))["tasks"] == result["tasks"]
    finally:
        torch.set_num_threads(threads)


def test_dead_leaves_cover_the_image_and_depend_on_their_seed_alone(module):
    image_of = module("dead_leaves").dead_leaves_image
    first, again, other = (image_of(np.random.default_rng(seed), 48) for seed in (1, 1, 2))
    assert first.shape == (3, 48, 48)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)
    assert first.min() >= 0.15
    # Flat leaves with sharp edges over texture: most neighbours are alike, some are not.
    steps = np.abs(np.diff(first, axis=2))
    assert np.median(steps) < 0.1 < np.quantile(steps, 0.99)


@pytest.mark.slow
def test_adaptation_at_tiny_size(tmp_path, module):
    out = tmp_path / "results.json"
    tiny = "--rounds 1 --threads 1 --model tiny --predict-model tiny --slices 4 --image 56 --spacing-mm 6"
    command = [sys.executable, str(BENCHMARKS / "adapt.py"), "--out", str(out), *tiny.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    full = result["lora"]["facts"]["full"]
    assert 0.99 * full["encoder"] < full["trained_in_encoder"] <= full["encoder"]
    assert 0 < result["lora"]["trained_share"] < 1
    assert len(result["cache"]["seconds"]["kept"]) == len(result["cache"]["seconds"]["encoding"]) == 1
    assert result["cache"]["rate_over_encoding"]["median"] > 0
    assert result["predict"]["num_slices"] > 4
    module_adapt = module("adapt")
    lines = module_adapt.table(result).splitlines()
    assert [line.split(":")[0] for line in lines[2:]] == ["| lora"] * 3 + ["| cache", "| predict"]
    assert done.stdout.splitlines() == lines
