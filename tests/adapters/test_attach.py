"""What each method trains, and what it leaves as it was."""

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import Dinov2Config

from brainfound import recipes
from brainfound.adapters import AdapterRecipe, attach_adapter, count_parameters
from brainfound.errors import ModelError, RecipeError
from brainfound.models import (
    BrainFoundConfig,
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
)

LOW_RANK = ("lora", "dora", "rslora", "pissa")
ALL_ROLES = ("query", "key", "value", "output", "mlp_in", "mlp_out", "patch")
SHIPPED = (
    "dora-r8",
    "full",
    "head-only",
    "last-2-blocks",
    "lora-r16-all",
    "lora-r16-mlp",
    "lora-r8",
    "lora-r8-patch",
    "pissa-r8",
    "rslora-r32",
)


def make(kind, folder, **config):
    return kind.from_pretrained(folder, decoder_width=8, **config)


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def first_answer(model, inputs):
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output["predictions"] if "predictions" in output else output["logits"]


@pytest.mark.parametrize("kind", [BrainFoundForClassification, BrainFoundForRegression, BrainFoundForSegmentation])
@pytest.mark.parametrize("method", LOW_RANK)
def test_an_adapter_changes_no_answer_at_first(export_folder, inputs, kind, method):
    model = make(kind, export_folder)
    before = first_answer(model, inputs)
    roles = ALL_ROLES[:-1] if method == "pissa" else ALL_ROLES
    adapted = attach_adapter(model, AdapterRecipe(method=method, roles=roles))
    assert isinstance(adapted, PeftModel)
    torch.testing.assert_close(first_answer(adapted, inputs), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", LOW_RANK)
def test_low_rank_methods_train_updates_and_the_task(export_folder, method):
    model = attach_adapter(make(BrainFoundForClassification, export_folder), AdapterRecipe(method=method, layers=(2,)))
    for name in trained_names(model):
        assert "lora_" in name or ".modules_to_save." in name, name
    parts = {
        part for part in ("aggregator", "head", "contrast_embedding") if any(part in n for n in trained_names(model))
    }
    assert parts == {"aggregator", "head", "contrast_embedding"}
    updates = {name.split(".lora_")[0].split("backbone.")[1] for name in trained_names(model) if "lora_" in name}
    assert updates == {f"encoder.layer.1.attention.{projection}" for projection in ("q_proj", "v_proj")}
    assert any("lora_magnitude_vector" in name for name in trained_names(model)) == (method == "dora")


def test_a_step_moves_what_is_trained_and_nothing_else(export_folder, inputs):
    model = attach_adapter(make(BrainFoundForClassification, export_folder), AdapterRecipe()).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved <= trained_names(model)
    # lora_A waits for lora_B, which starts at zero, and a bias before a softmax over slices cannot matter.
    waiting = {
        n for n in trained_names(model) if "lora_A" in n or n.endswith("aggregator.modules_to_save.default.score.bias")
    }
    assert trained_names(model) - moved <= waiting


def test_the_contrast_embedding_may_stay_frozen(export_folder):
    recipe = AdapterRecipe(train_contrast_embedding=False)
    model = attach_adapter(make(BrainFoundForClassification, export_folder), recipe)
    assert not any("contrast_embedding" in name for name in trained_names(model))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [(BrainFoundForClassification, {"brainfound.aggregator", "head"}), (BrainFoundForSegmentation, {"decoder"})],
)
def test_none_trains_the_task_alone(export_folder, kind, parts):
    model = attach_adapter(make(kind, export_folder), AdapterRecipe(method="none"))
    assert not isinstance(model, PeftModel)
    names = trained_names(model)
    assert {next(part for part in parts if name.startswith(part)) for name in names} == parts
    assert names == {name for name, _ in model.named_parameters() if name.startswith(tuple(parts))}


@pytest.mark.parametrize("kind", [BrainFoundForClassification, BrainFoundForSegmentation])
@pytest.mark.parametrize("method", ["full", "none", "lora", "pissa", "last_blocks"])
def test_every_trained_weight_gets_a_gradient(export_folder, inputs, kind, method):
    model = attach_adapter(make(kind, export_folder), AdapterRecipe(method=method)).train()
    labels = (
        torch.tensor([0, 1]) if kind is BrainFoundForClassification else torch.zeros(2, 4, 16, 24, dtype=torch.long)
    )
    model(**inputs, labels=labels).loss.backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert without == []
    if method == "full":
        assert count_parameters(model).trainable > 0.75 * count_parameters(model).total


@pytest.mark.parametrize("with_embedding", [False, True])
@pytest.mark.parametrize("kind", [BrainFoundForClassification, BrainFoundForSegmentation])
def test_last_blocks_trains_them_the_last_norm_and_the_task(export_folder, inputs, kind, with_embedding):
    recipe = AdapterRecipe(method="last_blocks", blocks=2, train_contrast_embedding=with_embedding)
    model = attach_adapter(make(kind, export_folder), recipe).train()
    encoder = {name.split("backbone.")[1] for name in trained_names(model) if ".encoder." in name}
    blocks = {name for name in encoder if name.startswith(("encoder.layer.1.", "encoder.layer.2."))}
    assert len(blocks) == sum(len(list(block.parameters())) for block in model.encoder.blocks[1:])
    # A segmentation reads patch tokens before the last norm.
    norm = set() if kind is BrainFoundForSegmentation else {"layernorm.weight", "layernorm.bias"}
    embedding = {"embeddings.patch_embeddings.contrast_embedding.weight"} if with_embedding else set()
    assert encoder - blocks == norm | embedding
    task = {name.removeprefix("brainfound.").split(".")[0] for name in trained_names(model)} - {"encoder"}
    assert task == ({"decoder"} if kind is BrainFoundForSegmentation else {"aggregator", "head"})
    # Without the embedding, no gradient is computed for the blocks before.
    seen = []
    model.encoder.blocks[0].register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    model(**inputs)
    assert set(seen) == {with_embedding}


def test_blocks_that_no_decoder_reads_are_not_trained(export_folder):
    model = attach_adapter(
        make(BrainFoundForSegmentation, export_folder, decoder_layers=[1, 2]), AdapterRecipe(method="full")
    )
    assert not any(".layer.2." in name for name in trained_names(model))
    assert any(".layer.1." in name for name in trained_names(model))


def test_more_blocks_than_there_are_is_refused(export_folder):
    model = make(BrainFoundForClassification, export_folder)
    with pytest.raises(RecipeError, match=r"blocks: .*got 4, expected at most 3"):
        attach_adapter(model, AdapterRecipe(method="last_blocks", blocks=4))


def test_last_blocks_that_no_decoder_reads_are_refused(export_folder):
    model = make(BrainFoundForSegmentation, export_folder, decoder_layers=[1])
    with pytest.raises(RecipeError, match="would learn nothing"):
        attach_adapter(model, AdapterRecipe(method="last_blocks", blocks=1))


@pytest.mark.parametrize("method", LOW_RANK)
def test_the_same_seed_gives_the_same_adapter(export_folder, method):
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(attach_adapter(make(BrainFoundForClassification, export_folder), AdapterRecipe(method=method)))
    first, second = (model.state_dict() for model in states)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("name", ["lora-r8", "lora-r8-patch", "dora-r8"])
def test_of_a_vit_s_two_percent_are_trained(name):
    """With the attention aggregator and the head; nothing is allocated, only counted."""
    backbone = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518)
    with torch.device("meta"):
        model = BrainFoundForClassification(BrainFoundConfig(backbone_config=backbone, aggregator="attention"))
        size = sum(parameter.numel() for parameter in model.encoder.parameters())
        adapted = attach_adapter(model, recipes.load(AdapterRecipe, name, "adapters"))
    assert 21e6 < size < 23e6
    updates = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n and p.requires_grad)
    assert updates >= 12 * 2 * 8 * (384 + 384)
    assert count_parameters(adapted).trainable <= 0.02 * size


def test_parameters_are_counted(export_folder):
    model = make(BrainFoundForClassification, export_folder)
    total = sum(parameter.numel() for parameter in model.parameters())
    head = sum(p.numel() for n, p in model.named_parameters() if "aggregator" in n or n.startswith("head"))
    count = count_parameters(attach_adapter(model, AdapterRecipe(method="none")))
    assert count == (head, total)


def test_an_adapter_is_not_put_on_an_adapter(export_folder):
    model = attach_adapter(make(BrainFoundForClassification, export_folder), AdapterRecipe())
    with pytest.raises(ModelError, match="already has an adapter"):
        attach_adapter(model, AdapterRecipe())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_work(export_folder, inputs, name):
    recipe = recipes.load(AdapterRecipe, name, "adapters")
    model = attach_adapter(make(BrainFoundForClassification, export_folder), recipe).train()
    model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    assert count_parameters(model).trainable > 0


def test_the_shipped_recipes_are_these():
    assert tuple(sorted(recipes.available("adapters"))) == SHIPPED
    readme = (recipes.recipe_folder("adapters") / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in (*SHIPPED, *AdapterRecipe.model_fields, *ALL_ROLES))


def test_recipes_refuse_unknown_roles_and_keys():
    with pytest.raises(RecipeError, match=r"unknown role 'valeu'.*Did you mean value"):
        recipes.load(AdapterRecipe, "lora-r8", "adapters", ["roles=[valeu]"])
    with pytest.raises(RecipeError, match="Did you mean rank"):
        recipes.load(AdapterRecipe, "lora-r8", "adapters", ["rnak=4"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"rank": 0}, r"rank.*expected 1 or more"),
        ({"method": "last_blocks", "blocks": 0}, r"blocks.*expected 1 or more"),
        ({"alpha": 0}, r"alpha.*expected more than 0"),
        ({"dropout": 1}, r"dropout.*less than 1"),
        ({"method": "lorra"}, r"method.*Did you mean"),
        ({"roles": []}, "at least one role"),
        ({"layers": [0]}, "layers"),
        ({"method": "pissa", "dropout": 0.1}, "set dropout to 0 with pissa"),
        ({"method": "pissa", "roles": ["query", "patch"]}, "leave out patch"),
    ],
)
def test_values_that_cannot_be_meant_are_one_line(tmp_path, content, told):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=told) as error:
        recipes.load(AdapterRecipe, path, "adapters")
    assert "\n" not in str(error.value)
    assert "mine.yaml" in str(error.value)
