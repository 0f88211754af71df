"""Settings without an effect are refused in one line; recipes, defaults and settings with an effect pass."""

from __future__ import annotations

import pytest

from brainfound.adapters.attach import AdapterRecipe, attach_adapter
from brainfound.errors import RecipeError
from brainfound.finetuning.recipe import FinetuneRecipe, require_effective_settings
from brainfound.finetuning.tasks import Classification, Regression, Segmentation
from brainfound.finetuning.training_task import FinetuneTask
from brainfound.models import BrainFoundConfig, BrainFoundForClassification, BrainFoundForSegmentation
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.recipes import load, validate

TASKS = {
    "classification": Classification("diagnosis", names=("a", "b")),
    "regression": Regression("age_years", mean=50.0, std=10.0),
    "segmentation": Segmentation("mask", names=("background", "label 1"), codes=(0, 1)),
}


def recipe(*overrides: str) -> FinetuneRecipe:
    return validate(FinetuneRecipe, {}, overrides)


@pytest.mark.parametrize("kind", TASKS)
def test_shipped_recipes_and_defaults_fit(kind):
    shipped = load(FinetuneRecipe, f"finetune-{kind}", "train")
    assert shipped.task.kind == kind
    require_effective_settings(shipped, TASKS[kind])
    require_effective_settings(recipe(), TASKS[kind])
    # A resolved recipe has every key, with its default.
    for content in (shipped, recipe(), recipe(f"task={kind}")):
        assert validate(FinetuneRecipe, content.model_dump(mode="json")) == content


@pytest.mark.parametrize("kind", TASKS)
def test_a_kind_is_a_short_form_of_its_section(kind):
    assert recipe(f"task={kind}") == recipe(f"task.kind={kind}") == FinetuneRecipe(task=kind)
    assert FinetuneRecipe(task={"kind": kind}).task == recipe(f"task={kind}").task


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("classification", ["task.focal_gamma=2", "task.class_weights=balanced", "aggregator=max"]),
        ("regression", ["task.loss=huber", "task.huber_delta=0.5"]),
        ("regression", ["task.head=bins", "task.bins=20", "task.label_width=2"]),
        ("regression", ["task.head=gaussian", "task.interval_confidence=0.8"]),
        ("segmentation", ["task.decoder=unetr", "task.decoder_width=16", "task.decoder_slice_mixing=true"]),
        ("segmentation", ["task.loss=tversky", "task.tversky_alpha=0.5", "task.tversky_beta=0.5"]),
        ("segmentation", ["task.loss=focal_tversky", "task.tversky_beta=0.8", "task.tversky_gamma=2"]),
        ("segmentation", ["task.loss=dice_focal", "task.focal_gamma=3", "aggregator=mean"]),
        ("segmentation", ["task.regions={whole: [1]}", "task.foreground_share=0.9"]),
    ],
)
def test_settings_with_an_effect_pass(kind, overrides):
    require_effective_settings(recipe(f"task={kind}", *overrides), TASKS[kind])


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        (
            "regression",
            ["task.huber_delta=0.5"],
            "--set task: huber_delta has no effect with loss=smooth_l1; leave it out, or set task.loss=huber",
        ),
        (
            "regression",
            ["task.bins=20", "task.label_width=2"],
            "--set task: bins has no effect with head=point; leave it out, or set task.head=bins",
        ),
        (
            "regression",
            ["task.head=bins", "task.loss=l1"],
            "--set task: loss has no effect with head=bins; leave it out, or set task.head=point",
        ),
        (
            "segmentation",
            ["task.tversky_beta=0.9"],
            "--set task: tversky_beta has no effect with loss=dice_cross_entropy; leave it out, or set "
            "task.loss=tversky or focal_tversky",
        ),
        (
            "segmentation",
            ["task.loss=tversky", "task.tversky_gamma=2"],
            "--set task: tversky_gamma has no effect with loss=tversky; leave it out, or set task.loss=focal_tversky",
        ),
        (
            "segmentation",
            ["task.loss=tversky", "task.focal_gamma=3"],
            "--set task: focal_gamma has no effect with loss=tversky; leave it out, or set task.loss=dice_focal",
        ),
        (
            "segmentation",
            ["aggregator=max"],
            "aggregator: this setting is for a classification or a regression (got a segmentation of mask). "
            "Leave it out",
        ),
        ("classification", ["task.decoder=unetr"], "--set task.decoder: unknown key. Known names: class_weights, fo"),
        ("regression", ["task.foreground_share=0.9"], "--set task.foreground_share: unknown key"),
        ("classification", ["task.merge_codes=true"], "--set task.merge_codes: unknown key"),
        ("segmentation", ["task.class_weights=none"], "--set task.class_weights: unknown key"),
        (
            "segmentation",
            ["task.decoder_with=8"],
            "--set task.decoder_with: unknown key. Did you mean task.decoder_width?",
        ),
        ("classification", ["task.head=bins"], "--set task.head: unknown key"),
        ("regression", ["regression.head=bins"], "--set regression: unknown key"),
        ("auto", ["task.head=bins"], "--set task: the setting 'head' needs the kind of the task: set task.kind=reg"),
        ("regresion", [], "--set task.kind: unknown kind 'regresion'. Did you mean regression?"),
    ],
)
def test_settings_without_an_effect_are_refused(kind, overrides, expected):
    with pytest.raises(RecipeError) as error:
        require_effective_settings(recipe(f"task={kind}", *overrides), TASKS[kind])
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_workers_are_refused_because_fine_tuning_has_none(tmp_path):
    with pytest.raises(RecipeError, match=r"--set engine\.num_workers: num_workers is for pretraining.*leave it out"):
        recipe("engine.num_workers=2")
    (tmp_path / "old.yaml").write_text("num_slices: 8\nengine: {steps: 3, num_workers: 0}\n")
    with pytest.raises(RecipeError, match=r"old\.yaml: engine: num_workers is for pretraining.*leave it out"):
        load(FinetuneRecipe, tmp_path / "old.yaml", "train")
    assert validate(PretrainRecipe, {}, ["engine.num_workers=2"]).engine.num_workers == 2


def test_one_setting_of_the_engine_leaves_the_others():
    engine = recipe("engine.log_every=7").engine
    assert (engine.steps, engine.batch_size) == (recipe().engine.steps, recipe().engine.batch_size)


def parameter_groups_of(task: str, adapter: str | None, **config) -> dict[str, tuple[str, bool]]:
    """Name → role and whether it decays, of each trained parameter of a tiny model."""
    backbone = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    fields = {"backbone_config": backbone, "contrasts": ["T1w", "FLAIR"], "stem": "per_contrast"}
    kind = BrainFoundForSegmentation if task == "segmentation" else BrainFoundForClassification
    model = kind(BrainFoundConfig(**fields, **config))
    if adapter is not None:
        model = attach_adapter(model, AdapterRecipe(method=adapter, roles=("query", "patch")))
    training = FinetuneTask.__new__(FinetuneTask)
    training.model, training.recipe = model, recipe()
    groups = training.make_optimizer().param_groups
    found = {id(p): (group["role"], group["decays"]) for group in groups for p in group["params"]}
    names = {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(names)
    return names


def only(groups: dict[str, tuple[str, bool]], ending: str) -> tuple[str, bool]:
    (value,) = {value for name, value in groups.items() if name.endswith(ending)}
    return value


def test_roles_and_decay_are_those_of_pretraining():
    groups = parameter_groups_of("classification", None, aggregator="transformer")
    assert only(groups, "patch_embeddings.projection.weight") == ("backbone", True)
    assert only(groups, "patch_embeddings.projection.bias") == ("backbone", False)
    assert only(groups, "contrast_embedding.weight") == ("new", False)
    assert only(groups, "position_embeddings") == only(groups, "cls_token") == ("backbone", False)
    assert only(groups, "aggregator.class_token") == ("new", False)
    assert only(groups, "query_key_value.weight") == only(groups, "score.weight") == ("new", True)
    assert only(groups, "encoder.backbone.layernorm.weight") == ("backbone", False)


def test_every_matrix_of_a_decoder_decays():
    groups = parameter_groups_of("segmentation", None, decoder="unetr", decoder_width=8)
    convolutions = [value for name, value in groups.items() if "decoder.tokens" in name and name.endswith("0.weight")]
    assert set(convolutions) == {("new", True)}


def test_low_rank_updates_of_the_patch_embedding_decay_and_scales_do_not():
    groups = parameter_groups_of("classification", "dora")
    assert only(groups, "projection.lora_A.default.weight") == ("backbone", True)
    assert only(groups, "projection.lora_magnitude_vector.default.weight") == ("backbone", False)
