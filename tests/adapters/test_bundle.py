"""Bundles: one unit, the same answers in a new process, and nothing doubtful is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from brainfound.adapters import load_bundle, save_bundle
from brainfound.adapters.bundle_reader import file_hash, tensors_hash
from brainfound.data.checking.contract import InputContract
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.errors import ModelError
from brainfound.models import BrainFoundModel
from tests.damage import truncate

TASKS = ("classification", "regression", "segmentation")
LABELS = {"0": "control", "1": "patient"}
METHOD_FILES = {"lora": "adapter_model.safetensors", "none": "trained.safetensors", "full": "model.safetensors"}
WEIGHTS_FILES = {"adapter": "adapter_model.safetensors", "trained": "trained.safetensors", "full": "model.safetensors"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("lora", "adapter"),
        ("dora", "adapter"),
        ("rslora", "adapter"),
        ("pissa", "adapter"),
        ("none", "trained"),
        ("last_blocks", "full"),
        ("full", "full"),
    ],
)
def test_a_bundle_answers_as_the_model_did(
    export_folder, preprocessing, inputs, tmp_path, task, method, weights, adapted, answers, assert_same_answers
):
    model = adapted(export_folder, task, method, aggregator="transformer")
    metadata = {"metrics": {"auroc": 0.9}}
    folder = save_bundle(tmp_path / "b", model, preprocessing=preprocessing, labels=LABELS, metadata=metadata)
    bundle = load_bundle(folder)
    # What pissa took out of the weights and what is put back round differently.
    assert_same_answers(answers(model, inputs), answers(bundle.model, inputs), 1e-5 if method == "pissa" else 1e-6)
    assert (bundle.task, bundle.labels, bundle.metadata) == (task, LABELS, metadata)
    assert bundle.preprocessing == preprocessing
    assert bundle.content["weights"] == weights
    assert (folder / WEIGHTS_FILES[weights]).is_file()
    assert not bundle.model.training
    assert not any(parameter.requires_grad for parameter in bundle.model.parameters())


def test_the_input_contract_is_part_of_the_bundle(export_folder, preprocessing, tmp_path, adapted):
    contract = InputContract.from_preprocessing(preprocessing).model_copy(update={"age_years": (20.0, 80.0)})
    settings = {"preprocessing": preprocessing, "labels": LABELS}
    folder = save_bundle(tmp_path / "b", adapted(export_folder), contract=contract, **settings)
    assert InputContract.load(folder) == contract
    contract.model_copy(update={"age_years": (0.0, 99.0)}).save(folder)
    with pytest.raises(ModelError, match=r"input_contract\.json is damaged or was changed"):
        load_bundle(folder)
    assert InputContract.load_or_none(save_bundle(tmp_path / "c", adapted(export_folder), **settings)) is None


def test_saving_leaves_the_model_and_the_random_numbers_alone(export_folder, preprocessing, tmp_path, adapted):
    model = adapted(export_folder).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = torch.get_rng_state()
    save_bundle(tmp_path / "b", model, preprocessing=preprocessing, labels=LABELS)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_adapter_is_small_next_to_its_base(export_folder, preprocessing, tmp_path, adapted):
    folder = save_bundle(tmp_path / "b", adapted(export_folder), preprocessing=preprocessing, labels=LABELS)
    saved = load_file(folder / "adapter_model.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    assert all("lora_" in key or "aggregator" in key or "head" in key or "contrast_embedding" in key for key in saved)
    assert all(key.startswith("encoder.") for key in base)
    # The base is the encoder before training, not the trained one.
    exported = load_file(export_folder / "model.safetensors")
    assert all(torch.equal(value, exported[key]) for key, value in base.items())


def test_no_path_of_the_training_machine_is_in_the_adapter(export_folder, preprocessing, tmp_path, adapted):
    folder = save_bundle(tmp_path / "b", adapted(export_folder), preprocessing=preprocessing, labels=LABELS)
    assert str(export_folder) not in (folder / "adapter_config.json").read_text()
    assert str(export_folder) not in (folder / "bundle.json").read_text()
    assert str(export_folder) not in (folder / "config.json").read_text()


IN_A_NEW_PROCESS = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from brainfound.adapters import AdapterRecipe, attach_adapter, load_bundle, save_bundle
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.models import BrainFoundForClassification

here = Path(sys.argv[1])
inputs = load_file(here / "inputs.safetensors")
with torch.no_grad():
    logits = load_bundle(here / "b").model(**inputs).logits
    model = BrainFoundForClassification.from_backbone("lab/tiny", ("T1w", "FLAIR"), aggregator="attention")
    model = attach_adapter(model, AdapterRecipe())
    folder = save_bundle(
        here / "hub", model, preprocessing=Preprocessing.load(here / "b"), labels={"0": "a", "1": "b"}
    )
    bundle = load_bundle(folder)
    same = torch.allclose(bundle.model(**inputs).logits, model.eval()(**inputs).logits, atol=1e-6)
save_file({"logits": logits, "hub_same": torch.tensor(same)}, here / "out.safetensors")
"""


def test_a_new_process_and_a_base_on_the_hub(
    export_folder, backbone_folder, preprocessing, inputs, tmp_path, adapted, answers
):
    model = adapted(export_folder)
    save_bundle(tmp_path / "b", model, preprocessing=preprocessing, labels=LABELS, example=inputs)
    save_file(inputs, tmp_path / "inputs.safetensors")
    # What the Hub's client leaves behind after a download, found without a connection.
    snapshot = tmp_path / "cache" / "models--lab--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for path in backbone_folder.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    reference = tmp_path / "cache" / "models--lab--tiny" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("a" * 40)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path)],
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    out = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(out["logits"], answers(model, inputs)["logits"], atol=1e-6, rtol=1e-6)
    assert out["hub_same"]
    base = json.loads((tmp_path / "hub" / "bundle.json").read_text())["base"]
    assert (base["source"], base["id"]) == ("hub", "lab/tiny")
    assert not (tmp_path / "hub" / "base").exists()


THROUGH_BOTH_WAYS = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file, save_file
from brainfound.adapters import load_bundle
from brainfound.models import BrainFoundConfig, BrainFoundForClassification

here = Path(sys.argv[1])
inputs = load_file(here / "inputs.safetensors")
out = {}
for folder in sorted(path for path in here.iterdir() if path.is_dir()):
    with torch.no_grad():
        out[folder.name] = load_bundle(folder).model(**inputs).logits
        if (folder / "adapter_config.json").is_file():
            config = BrainFoundConfig.from_pretrained(folder)
            base = BrainFoundForClassification.from_pretrained(folder / "base", config=config)
            out[folder.name + " by peft"] = PeftModel.from_pretrained(base, folder).eval()(**inputs).logits
save_file(out, here / "out.safetensors")
"""


def test_a_new_process_reads_each_kind_and_so_does_peft(
    export_folder, preprocessing, inputs, tmp_path, adapted, answers
):
    expected = {}
    for method in ("lora", "dora", "rslora", "pissa", "none", "last_blocks", "full"):
        model = adapted(export_folder, method=method)
        save_bundle(tmp_path / method, model, preprocessing=preprocessing, labels=LABELS)
        expected[method] = answers(model, inputs)["logits"]
    save_file(inputs, tmp_path / "inputs.safetensors")
    subprocess.run(
        [sys.executable, "-c", THROUGH_BOTH_WAYS, str(tmp_path)],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
    )
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == {*expected, "lora by peft", "dora by peft", "rslora by peft", "pissa by peft"}
    for name, logits in out.items():
        tolerance = 1e-5 if "pissa" in name else 1e-6
        torch.testing.assert_close(logits, expected[name.split(" ")[0]], atol=tolerance, rtol=tolerance)


def test_a_bundle_that_cannot_take_the_place_of_another_leaves_it_whole(
    export_folder, preprocessing, tmp_path, adapted, monkeypatch
):
    folder = save_bundle(tmp_path / "b", adapted(export_folder), preprocessing=preprocessing, labels=LABELS)
    rename = Path.rename

    def fails(path, target):
        if Path(target) == folder and not path.name.endswith(".previous"):
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        save_bundle(folder, adapted(export_folder), preprocessing=preprocessing, labels={"0": "new"}, overwrite=True)
    monkeypatch.undo()
    assert load_bundle(folder).labels == LABELS
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    save_bundle(folder, adapted(export_folder), preprocessing=preprocessing, labels={"0": "new"}, overwrite=True)
    assert load_bundle(folder).labels == {"0": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_a_killed_process_left_does_not_stop_a_later_one(export_folder, preprocessing, tmp_path, adapted):
    def save(label):
        return save_bundle(
            tmp_path / "b", adapted(export_folder), preprocessing=preprocessing, labels={"0": label}, overwrite=True
        )

    folder = save("first")
    for name in (".b.previous", ".b.0123abcd.previous", ".b.0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / ".b.notes").mkdir()
    save("second")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.notes", "b"]
    # Killed between the two renames: the bundle is under its other name only.
    folder.rename(tmp_path / ".b.0123abcd.previous")
    with pytest.raises(ModelError, match="the folder is taken"):
        save_bundle(folder, adapted(export_folder), preprocessing=preprocessing, labels={"0": "third"})
    assert load_bundle(folder).labels == {"0": "second"}


@pytest.fixture
def bundle_folder(export_folder, preprocessing, tmp_path, adapted):
    return save_bundle(tmp_path / "b", adapted(export_folder), preprocessing=preprocessing, labels=LABELS)


def rehash(folder):
    """Make a bundle's own list of hashes agree with its files, as a careful forger would."""
    path = folder / "bundle.json"
    content = json.loads(path.read_text())
    content["files"] = {name: file_hash(folder / name) for name in content["files"]}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name",
    [
        "bundle.json",
        "config.json",
        "preprocessing.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base/model.safetensors",
        "base/config.json",
    ],
)
@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_a_damaged_bundle_is_one_line(bundle_folder, name, damage):
    damage(bundle_folder / name)
    with pytest.raises(ModelError) as error:
        load_bundle(bundle_folder)
    assert str(bundle_folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_file_has_its_hash_in_the_description(bundle_folder):
    files = {path.relative_to(bundle_folder).as_posix() for path in bundle_folder.rglob("*") if path.is_file()}
    hashes = json.loads((bundle_folder / "bundle.json").read_text())["files"]
    assert hashes == {name: file_hash(bundle_folder / name) for name in files - {"bundle.json"}}
    assert "base/model.safetensors" in hashes


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "base/model.safetensors"])
def test_truncated_weights_are_one_line_even_with_a_fitting_hash(bundle_folder, name):
    truncate(bundle_folder / name)
    rehash(bundle_folder)
    with pytest.raises(ModelError, match=r"cannot be read") as error:
        load_bundle(bundle_folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["lora", "none"])
@pytest.mark.parametrize("change", ["missing", "extra"])
def test_missing_and_extra_weights_are_named(export_folder, preprocessing, tmp_path, method, change, adapted):
    model = adapted(export_folder, method=method)
    folder = save_bundle(tmp_path / "b", model, preprocessing=preprocessing, labels=LABELS)
    path = folder / METHOD_FILES[method]
    weights = load_file(path)
    key = next(key for key in weights if "head" in key)
    if change == "missing":
        del weights[key]
    else:
        key = key.replace("head", "tail")
        weights[key] = torch.zeros(2)
    save_file(weights, path)
    rehash(folder)
    with pytest.raises(ModelError) as error:
        load_bundle(folder)
    assert key in str(error.value)


@pytest.mark.parametrize(("method", "name"), [*METHOD_FILES.items(), ("lora", "base/model.safetensors")])
def test_half_of_the_weights_is_refused_by_name(export_folder, preprocessing, tmp_path, method, name, adapted):
    folder = save_bundle(
        tmp_path / "b", adapted(export_folder, method=method), preprocessing=preprocessing, labels=LABELS
    )
    weights = load_file(folder / name)
    kept = dict(sorted(weights.items())[::2])
    save_file(kept, folder / name, metadata={"format": "pt"})
    rehash(folder)
    with pytest.raises(ModelError, match=rf"lacks {len(weights) - len(kept)} ") as error:
        load_bundle(folder)
    assert "\n" not in str(error.value)
    assert any(key.rsplit(".", 2)[-2] in str(error.value) for key in weights.keys() - kept.keys())


def test_a_backbone_of_another_size_is_refused(bundle_folder, tmp_path):
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, patch_size=8, image_size=40
    )
    Dinov2Model(config).save_pretrained(tmp_path / "wider")
    wider = BrainFoundModel.from_backbone(tmp_path / "wider", ("T1w", "FLAIR"))
    wider.save_pretrained(bundle_folder / "base")
    rehash(bundle_folder)
    with pytest.raises(ModelError) as error:
        load_bundle(bundle_folder)
    assert "\n" not in str(error.value)
    assert "base" in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"target_modules": 3, "peft_type": "LORA", "aggregator": "none"}'])
def test_settings_that_make_no_sense_are_one_line(bundle_folder, name, content):
    (bundle_folder / name).write_text(content)
    rehash(bundle_folder)
    with pytest.raises(ModelError) as error:
        load_bundle(bundle_folder)
    assert "\n" not in str(error.value)


def test_another_base_is_refused(bundle_folder):
    path = bundle_folder / "base" / "model.safetensors"
    weights = load_file(path)
    weights["encoder.backbone.layernorm.weight"] += 1e-6
    save_file(weights, path, metadata={"format": "pt"})
    rehash(bundle_folder)
    with pytest.raises(ModelError, match="not the base weights"):
        load_bundle(bundle_folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "base/pytorch_model.bin", "optimizer.pt"])
def test_pickles_are_refused(bundle_folder, name):
    torch.save({"weight": torch.zeros(1)}, bundle_folder / name)
    with pytest.raises(ModelError, match="pickled"):
        load_bundle(bundle_folder)


@pytest.mark.parametrize(
    "name", ["frozen_baseline.safetensors", "base/other.safetensors", "input_contract.json", "training_history.json"]
)
def test_a_file_that_the_description_does_not_list_is_refused(bundle_folder, name):
    (bundle_folder / name).parent.mkdir(exist_ok=True)
    save_file({"weight": torch.zeros(1)}, bundle_folder / name)
    with pytest.raises(ModelError, match="bundle.json does not list it.*Remove the file"):
        load_bundle(bundle_folder)
    (bundle_folder / name).unlink()
    # What other tools leave is not read.
    for other in (".cache/download/model.json", ".DS_Store", "notes.txt"):
        (bundle_folder / other).parent.mkdir(parents=True, exist_ok=True)
        (bundle_folder / other).write_text("{}")
    load_bundle(bundle_folder)


def test_a_later_schema_is_refused(bundle_folder):
    path = bundle_folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(ModelError, match="got 99, expected 1"):
        load_bundle(bundle_folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", ["classification"]),
        ("task", "guessing"),
        ("weights", "some"),
        ("labels", None),
        ("metadata", [1]),
        ("files", "all"),
        ("base", None),
        ("base", {"source": "hub", "sha256": "0"}),
        ("base", {"source": "folder"}),
    ],
)
def test_a_description_that_cannot_be_used_is_one_line(bundle_folder, field, value):
    path = bundle_folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ModelError, match=f"lacks {field}") as error:
        load_bundle(bundle_folder)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_bundle_is_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ModelError):
            load_bundle(folder)


def test_weights_changed_outside_the_adapter_are_kept(
    export_folder, preprocessing, tmp_path, adapted, answers, assert_same_answers
):
    """A layer norm that moved is in no adapter file; the base is written from the model, so it is not lost."""
    model = adapted(export_folder)
    with torch.no_grad():
        model.get_base_model().encoder.backbone.layernorm.weight.mul_(2)
    folder = save_bundle(tmp_path / "b", model, preprocessing=preprocessing, labels=LABELS)
    pixels = {"pixel_values": torch.rand(1, 2, 2, 16, 16)}
    assert_same_answers(answers(model, pixels), answers(load_bundle(folder).model, pixels))


def test_a_bundle_that_answers_differently_is_not_left_behind(export_folder, preprocessing, tmp_path, adapted):
    model = adapted(export_folder)
    # State that no file holds.
    model.get_base_model().head.norm.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ModelError, match="answers differently in logits"):
        save_bundle(tmp_path / "b", model, preprocessing=preprocessing, labels=LABELS)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_must_be_free(bundle_folder, export_folder, preprocessing, tmp_path, adapted):
    model = adapted(export_folder)
    with pytest.raises(ModelError, match="taken"):
        save_bundle(bundle_folder, model, preprocessing=preprocessing, labels=LABELS)
    other = {"0": "another"}
    save_bundle(bundle_folder, model, preprocessing=preprocessing, labels=other, overwrite=True)
    assert load_bundle(bundle_folder).labels == other
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="taken"):
        save_bundle(foreign, model, preprocessing=preprocessing, labels=LABELS, overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "mine"


def test_what_cannot_be_bundled_is_refused(export_folder, preprocessing, tmp_path, adapted):
    model = adapted(export_folder)
    for change, told in (
        ({"model": torch.nn.Linear(1, 1)}, "Linear cannot be bundled"),
        ({"preprocessing": Preprocessing(contrasts=("T1w",))}, "different contrasts"),
        ({"labels": {"0": torch.zeros(1)}}, "plain values"),
        ({"model": BrainFoundModel.from_pretrained(export_folder).to(torch.bfloat16)}, "float32"),
    ):
        arguments = {"model": model, "preprocessing": preprocessing, "labels": LABELS, **change}
        with pytest.raises(ModelError, match=told):
            save_bundle(tmp_path / "b", arguments.pop("model"), **arguments)
        assert not (tmp_path / "b").exists()


def test_an_embedding_model_is_bundled_too(export_folder, preprocessing, tmp_path, answers, assert_same_answers):
    model = BrainFoundModel.from_pretrained(export_folder)
    folder = save_bundle(tmp_path / "b", model, preprocessing=preprocessing, labels={})
    bundle = load_bundle(folder)
    assert bundle.task == "embedding"
    pixels = {"pixel_values": torch.rand(1, 2, 2, 16, 16)}
    assert_same_answers(answers(model, pixels), answers(bundle.model, pixels))


def test_the_hash_is_of_the_weights_not_of_the_file():
    first = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    assert tensors_hash(first) == tensors_hash(dict(reversed(first.items())))
    assert tensors_hash(first) != tensors_hash({**first, "b": torch.ones(4)})
    assert tensors_hash(first) != tensors_hash({**first, "a": torch.arange(4.0) + 1e-6})
