"""What is wrong with a recipe, in one line: the place, what came, what may stand there."""

from __future__ import annotations

import pickle

import pytest

from brainfound.errors import ModelError, RecipeError, ScanError, closest_name
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.recipes import Recipe, find, load, load_json, validate


def message(content: dict, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        validate(PretrainRecipe, content, overrides, where="mine.yaml")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("engin.steps=2", "--set engin: unknown key. Did you mean engine?"),
        ("engine.stps=2", "--set engine.stps: unknown key. Did you mean engine.steps?"),
        ("steps=2", "--set steps: unknown key. Did you mean engine.steps?"),
        ("optim.steps=2", "--set optim.steps: unknown key. Did you mean engine.steps?"),
        ("optim.lrr=2", "--set optim.lrr: unknown key. Did you mean optim.lr?"),
        ("engine={stps: 2}", "--set engine.stps: unknown key. Did you mean engine.steps?"),
        ("engine.steps=many", "--set engine.steps: the value does not fit (got 'many', expected a whole number)"),
        ("views.local_scale=[0.5, 0.1]", "--set views.local_scale: local_scale must be two increasing"),
        (
            "views.global_scale=[2, 4]",
            "--set views.global_scale: global_scale is a fraction of the slice, at most 1, got",
        ),
        (
            "views.local_scale=[0.1, 1.5]",
            "--set views.local_scale: local_scale is a fraction of the slice, at most 1, got",
        ),
        (
            "views.intensity.blur_sigma_pixels=[0.5, 3]",
            "--set views.intensity.blur_sigma_pixels: blur_sigma_pixels must be at most 1.5, got 3",
        ),
        ("objective.kind=hybird", "--set objective.kind: unknown kind 'hybird'. Did you mean hybrid?"),
    ],
)
def test_an_override_is_blamed_on_itself(override, expected):
    assert message({"seed": 3}, override).startswith(expected)


class Typed(Recipe):
    name: str = ""
    folder: str | None = None
    rate: float = 1.0
    either: str | float = ""
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        *(
            (f"name={text}", "name", text)
            for text in ("1e5", "nan", "infinity", "1_0", "007", "yes", "2024-01-01", "3")
        ),
        ("folder=1e-4", "folder", "1e-4"),
        ("folder=null", "folder", None),
        ("rate=1e-4", "rate", 1e-4),
        ("rate=+2E3", "rate", 2e3),
        ("either=1e5", "either", 1e5),
        ("names=[a, b]", "names", ("a", "b")),
    ],
)
def test_the_type_of_a_field_decides_what_its_text_means(override, field, value):
    assert getattr(validate(Typed, {}, [override]), field) == value


@pytest.mark.parametrize("text", ["ten", "1e", "e5", "1e5x"])
def test_text_is_no_number(text):
    with pytest.raises(RecipeError, match="--set rate"):
        validate(Typed, {}, [f"rate={text}"])


def test_the_file_is_blamed_for_what_is_in_the_file():
    assert message({"engin": {"steps": 2}}).startswith("mine.yaml: engin: unknown key")
    assert message({"engin": {"steps": 2}}, "seed=1").startswith("mine.yaml: engin: unknown key")
    # The file has the group already; the override is only one more key in it.
    assert message({"engin": {"steps": 2}}, "engin.steps=3").startswith("mine.yaml: engin: unknown key")
    assert message({"views": {"local_scale": [0.5, 0.1]}}, "views.shear=0").startswith("mine.yaml: views: local_scale")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"trained": {"part": "lroa"}},
            "mine.yaml: trained.part: no such choice (got 'lroa', expected one of full, last_blocks, lora). "
            "Did you mean lora?",
        ),
        (
            {"guard": {"on_failure": "rollback"}},
            "mine.yaml: guard.on_failure: no such choice (got 'rollback', expected one of stop, roll_back). "
            "Did you mean roll_back?",
        ),
        (
            {"probe": {"target": "diagnoses"}},
            "mine.yaml: probe.target: no such choice (got 'diagnoses', expected one of auto, diagnosis, age_years, sex,"
            " site, contrast, slice_position). Did you mean diagnosis?",
        ),
        (
            {"engine": {"compile": "maybe"}},
            "mine.yaml: engine.compile: no such choice (got 'maybe', expected one of auto, true, false)",
        ),
        (
            {"engine": {"gradient_checkpointing": "pointwize"}},
            "mine.yaml: engine.gradient_checkpointing: no such choice (got 'pointwize', expected one of true, false, "
            "pointwise). Did you mean pointwise?",
        ),
    ],
)
def test_choices_are_listed(content, expected):
    assert message(content) == expected


def test_errors_at_several_places_are_counted_once_each():
    content = {"trained": {"part": "x"}, "probe": {"target": "y"}, "seed": -1}
    assert message(content).startswith(
        "mine.yaml: seed: the value does not fit (and 2 more) (got -1, expected 0 or more)"
    )


def test_a_recipe_of_another_kind_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"^finetune-classification.yaml: this is a fine-tuning recipe; use `brain"):
        load(PretrainRecipe, "finetune-classification", "train")
    with pytest.raises(RecipeError, match=r"^pretrain-demo.yaml: this is a pretraining recipe; use `brainfound pre"):
        load(FinetuneRecipe, "pretrain-demo", "train", ["engine.steps=2"])
    # A slip in a recipe of the right kind stays a slip.
    (tmp_path / "mine.yaml").write_text(find("pretrain-demo", "train").read_text() + "\nsede: 1\n")
    with pytest.raises(RecipeError, match=r"^mine.yaml: sede: unknown key. Did you mean seed"):
        load(PretrainRecipe, tmp_path / "mine.yaml", "train")
    with pytest.raises(RecipeError, match=r"^--set task: unknown key"):
        load(PretrainRecipe, "pretrain-demo", "train", ["task=regression"])


def test_nothing_near_is_nothing():
    assert closest_name("zzz", ["stop", "roll_back"]) is None


def test_an_error_from_a_worker_process_keeps_its_parts():
    error = ScanError("not a scan", where="a.nii", got=3, expected="4", remedy="Repair it")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason, vars(again)) == (str(error), error.reason, vars(error))
    assert str(again) == "a.nii: not a scan (got 3, expected 4). Repair it"
    assert again.reason == "not a scan (got 3, expected 4). Repair it"


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "mine.json").mkdir()
    with pytest.raises(ModelError, match=r"mine\.json: cannot be read: Is a directory"):
        load_json(PretrainRecipe, tmp_path / "mine.json")

    def locked(*arguments: object, **options: object) -> str:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "mine.yaml").write_text("seed: 3")
    monkeypatch.setattr("pathlib.Path.read_text", locked)
    with pytest.raises(RecipeError, match=r"mine\.yaml: cannot be read: Permission denied"):
        load(PretrainRecipe, tmp_path / "mine.yaml", "train")
