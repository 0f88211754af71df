"""Saving and loading: every weight comes back, or the load is refused."""

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
import threading
import time

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BeitConfig,
    BeitModel,
)

from brainfound.data.splits.training_history import HISTORY_FILE, TrainingHistory
from brainfound.data.store import Store
from brainfound.errors import BrainFoundError, ModelError
from brainfound.hub import cache_if_hub_is_away
from brainfound.models import (
    BrainFoundConfig,
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
    BrainFoundModel,
)
from brainfound.models.aggregators import AGGREGATORS
from brainfound.models.decoders import DECODERS
from brainfound.models.loading import is_brainfound, load_initial_model, read_history
from brainfound.models.model_folder import require_finite, silence_transformers
from tests.damage import truncate

HEADS = (BrainFoundForClassification, BrainFoundForRegression, BrainFoundForSegmentation)


def answers(model, pixels):
    with torch.no_grad():
        return [value for value in model.eval()(pixels).to_tuple() if value is not None]


def assert_equal_answers(first, second, num_contrasts=3):
    pixels = torch.rand(2, 3, num_contrasts, 16, 24)
    for one, other in zip(answers(first, pixels), answers(second, pixels), strict=True):
        assert torch.equal(one, other)


def drop_keys(folder, drop):
    """Rewrite a folder's weights without the keys that `drop` says."""
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not drop(key)}
    assert 0 < len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", [BrainFoundModel, *HEADS])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_a_saved_model_answers_the_same(any_backbone, tmp_path, kind, aggregator):
    model = kind.from_backbone(any_backbone[0], aggregator=aggregator, decoder_width=8, decoder_slice_mixing=True)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = kind.from_pretrained(tmp_path)
    assert_equal_answers(model, loaded)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    known, back = model.config.to_dict(), loaded.config.to_dict()
    assert {key for key in known if known[key] != back[key]} <= {"_name_or_path", "architectures"}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("num_contrasts", [1, 2, 4])
def test_any_number_of_contrasts_comes_back(backbone_folder, tmp_path, decoder, num_contrasts):
    contrasts = ("T1w", "T2w", "FLAIR", "SWI")[:num_contrasts]
    model = BrainFoundForSegmentation.from_backbone(
        backbone_folder, contrasts, decoder=decoder, id2label={0: "background", 1: "lesion", 2: "oedema"}
    )
    model.save_pretrained(tmp_path)
    loaded = BrainFoundForSegmentation.from_pretrained(tmp_path)
    assert tuple(loaded.config.contrasts) == contrasts
    assert loaded.config.id2label == {0: "background", 1: "lesion", 2: "oedema"}
    assert_equal_answers(model, loaded, num_contrasts)


@pytest.mark.parametrize(
    ("auto", "kind"),
    [
        (AutoModel, BrainFoundModel),
        (AutoModelForImageClassification, BrainFoundForClassification),
        (AutoModelForSemanticSegmentation, BrainFoundForSegmentation),
    ],
)
def test_auto_classes_know_the_models(backbone_folder, tmp_path, auto, kind):
    model = kind.from_backbone(backbone_folder, decoder_width=8)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BrainFoundConfig)
    assert_equal_answers(model, loaded)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_starts_from_a_saved_model(backbone_folder, tmp_path, kind):
    base = BrainFoundModel.from_backbone(backbone_folder, aggregator="attention")
    base.save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path, num_labels=4, decoder_width=8)
    assert_equal_answers(base, model.brainfound)
    if kind is not BrainFoundForRegression:
        assert model.config.num_labels == 4
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    decoder_or_head = model.decoder if kind is BrainFoundForSegmentation else model.head
    assert any(parameter.std() > 0 for parameter in decoder_or_head.parameters() if parameter.dim() > 1)


def test_the_body_of_a_head_model_loads_alone(backbone_folder, tmp_path):
    model = BrainFoundForClassification.from_backbone(backbone_folder)
    model.save_pretrained(tmp_path)
    assert_equal_answers(model.brainfound, BrainFoundModel.from_pretrained(tmp_path))


def test_another_aggregator_may_be_requested(backbone_folder, tmp_path):
    BrainFoundModel.from_backbone(backbone_folder, aggregator="mean").save_pretrained(tmp_path)
    model = BrainFoundModel.from_pretrained(tmp_path, aggregator="transformer")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.aggregator.class_token.std() > 0


def test_new_parts_start_the_same_way_loaded_or_built(backbone_folder, tmp_path):
    """Weights that a file lacks are initialised, not left as memory happened to be."""
    BrainFoundModel.from_backbone(backbone_folder).save_pretrained(tmp_path)
    for model in (
        BrainFoundForSegmentation.from_pretrained(tmp_path, decoder_slice_mixing=True, decoder_width=16),
        BrainFoundForSegmentation.from_backbone(backbone_folder, decoder_slice_mixing=True, decoder_width=16),
    ):
        assert not model.decoder.slice_mixing.weight.any()
        smoothing = model.decoder.smoothing[0]
        assert 0.03 < smoothing[0].weight.std() < 0.3
        assert torch.equal(smoothing[1].weight, torch.ones(16))


def test_weights_are_float32_unless_requested(backbone_folder, tmp_path):
    BrainFoundModel.from_backbone(backbone_folder).to(torch.bfloat16).save_pretrained(tmp_path)
    assert BrainFoundModel.from_pretrained(tmp_path).dtype == torch.float32
    assert BrainFoundModel.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [BrainFoundModel, BrainFoundForClassification])
def test_missing_weights_are_refused_by_name(backbone_folder, tmp_path, kind):
    kind.from_backbone(backbone_folder).save_pretrained(tmp_path)
    drop_keys(tmp_path, lambda key: ".layer.1." in key)
    with pytest.raises(ModelError, match=r"lacks 18 of the model's \d+ weights: .*encoder\.layer\.1\."):
        kind.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\."):
        BrainFoundForSegmentation.from_pretrained(tmp_path)


def test_a_missing_head_is_refused(backbone_folder, tmp_path):
    BrainFoundForClassification.from_backbone(backbone_folder).save_pretrained(tmp_path)
    drop_keys(tmp_path, lambda key: key.startswith("head"))
    with pytest.raises(ModelError, match=r"head\.norm"):
        BrainFoundForClassification.from_pretrained(tmp_path)


def test_left_over_weights_are_refused_by_name(backbone_folder, tmp_path):
    BrainFoundModel.from_backbone(backbone_folder).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "encoder.secret.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder\.secret\.weight"):
        BrainFoundModel.from_pretrained(tmp_path)


def test_other_contrasts_than_saved_are_refused(backbone_folder, tmp_path):
    BrainFoundModel.from_backbone(backbone_folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        BrainFoundModel.from_pretrained(tmp_path, contrasts=["T1w"])


def test_a_backbone_with_missing_weights_is_refused_by_name(write_backbone, tmp_path):
    folder = write_backbone(tmp_path / "half")
    drop_keys(folder, lambda key: "layer.2" in key or "mask_token" in key)
    with pytest.raises(ModelError, match=r"lacks 18 of the model's \d+ weights: encoder\.layer\.2"):
        BrainFoundModel.from_backbone(folder)


def test_a_backbone_may_lack_its_mask_token(write_backbone, tmp_path):
    folder = write_backbone(tmp_path / "no_mask_token")
    drop_keys(folder, lambda key: "mask_token" in key)
    model = BrainFoundModel.from_backbone(folder)
    assert not model.encoder.backbone.embeddings.mask_token.any()


def test_another_family_is_refused_with_the_known_ones(tmp_path):
    BeitModel(BeitConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'beit' .*expected one of dinov2, dinov2_with_registers, vit"):
        BrainFoundModel.from_backbone(tmp_path)
    with pytest.raises(ModelError, match="from_backbone"):
        BrainFoundModel.from_pretrained(tmp_path)


def test_a_brainfound_folder_is_not_a_backbone(backbone_folder, tmp_path):
    BrainFoundModel.from_backbone(backbone_folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="from_pretrained"):
        BrainFoundModel.from_backbone(tmp_path)


AFTER = "print(type({auto}.from_pretrained(sys.argv[1])).__name__)"
IMPORTS = {
    "brainfound first": "import sys, brainfound; from transformers import AutoModel; " + AFTER.format(auto="AutoModel"),
    "transformers first": "import sys; from transformers import AutoModel; AutoModel; import brainfound; "
    + AFTER.format(auto="AutoModel"),
    "configuration": "import sys, brainfound; assert 'torch' not in sys.modules; from transformers import AutoConfig; "
    + AFTER.format(auto="AutoConfig"),
}


@pytest.mark.parametrize(
    "order", ["brainfound first", *(pytest.param(name, marks=pytest.mark.slow) for name in list(IMPORTS)[1:])]
)
def test_auto_classes_know_the_models_once_the_package_is_imported(backbone_folder, tmp_path, order):
    BrainFoundModel.from_backbone(backbone_folder).save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", IMPORTS[order], tmp_path], capture_output=True, text=True, timeout=300)
    expected = "BrainFoundConfig" if order == "configuration" else "BrainFoundModel"
    assert done.stdout.strip() == expected, done.stderr


def test_a_brainfound_folder_for_another_class_gets_a_hint_that_fits(backbone_folder, tmp_path):
    BrainFoundModel.from_backbone(backbone_folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="from_pretrained of the same class"):
        BrainFoundForClassification.from_backbone(tmp_path)
    model = BrainFoundForClassification.from_pretrained(tmp_path, aggregator="attention", id2label={0: "a", 1: "b"})
    assert (model.config.aggregator, model.config.num_classes) == ("attention", 2)


def spoil(folder, name, value):
    """Rewrite a folder's weights with one value changed."""
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["embeddings.cls_token", "encoder.layer.1.mlp.fc2.bias", "layernorm.weight"])
def test_a_backbone_with_a_value_that_is_no_number_is_refused_by_name(write_backbone, tmp_path, name, value):
    folder = write_backbone(tmp_path / "backbone")
    spoil(folder, name, value)
    with pytest.raises(ModelError, match=re.escape(f"1 of 61 weights hold infinite or undefined values: {name} (")):
        BrainFoundModel.from_backbone(folder)


@pytest.mark.parametrize("kind", HEADS)
def test_a_saved_model_with_a_value_that_is_no_number_is_refused_by_name(backbone_folder, tmp_path, kind):
    kind.from_backbone(backbone_folder, decoder_width=8).save_pretrained(tmp_path)
    name = max(load_file(tmp_path / "model.safetensors"))
    spoil(tmp_path, name, float("nan"))
    with pytest.raises(ModelError, match=re.escape(name)):
        kind.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=re.escape(name)):
        load_initial_model(kind, tmp_path, ("T1w", "T2w", "FLAIR"))


def test_large_finite_weights_are_fine():
    require_finite("here", {"a": torch.full((1000,), 6e4, dtype=torch.float16), "b": torch.full((9,), 3e38)})
    with pytest.raises(ModelError, match="here: 1 of 2 weights .* b"):
        require_finite("here", {"a": torch.arange(3), "b": torch.tensor([1.0, float("nan")])})


@pytest.mark.parametrize("read", [BrainFoundModel.from_backbone, BrainFoundModel.from_pretrained, is_brainfound])
def test_a_hub_that_is_away_is_one_line_without_retries(monkeypatch, read):
    requests = []

    class Session:
        def head(self, url, timeout):
            requests.append(url)
            raise ConnectionError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    monkeypatch.setattr("brainfound.hub._last_answer", ("", 0.0, False))
    with pytest.raises(ModelError, match="no answer from https://hub.invalid"):
        read("nobody/nothing-of-this-name")
    assert requests == ["https://hub.invalid"]
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder):
    truncate(folder / "model.safetensors")


def not_json(folder):
    (folder / "config.json").write_text("{")


def without_config(folder):
    (folder / "config.json").unlink()


def unknown_type(folder):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "model_type": "nothing-like-this"}))


@pytest.mark.parametrize("damage", [pickled, truncated, not_json, without_config, unknown_type])
def test_a_damaged_folder_is_one_line(backbone_folder, write_backbone, tmp_path, damage):
    saved = tmp_path / "saved"
    BrainFoundModel.from_backbone(backbone_folder).save_pretrained(saved)
    plain = write_backbone(tmp_path / "plain")
    for folder, load in ((saved, BrainFoundModel.from_pretrained), (plain, BrainFoundModel.from_backbone)):
        damage(folder)
        with pytest.raises(ModelError) as error:
            load(folder)
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)
        if damage is pickled:
            assert "safetensors" in str(error.value)


@pytest.mark.parametrize("load", [BrainFoundModel.from_pretrained, BrainFoundModel.from_backbone])
def test_a_folder_that_does_not_exist_is_one_line(tmp_path, load):
    for name in (tmp_path / "nothing", "./nothing", "nothing"):
        with pytest.raises(ModelError, match="no such model folder"):
            load(name)


def test_pickles_cannot_be_requested(backbone_folder, tmp_path):
    BrainFoundModel.from_backbone(backbone_folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="pickled"):
        BrainFoundModel.from_pretrained(tmp_path, use_safetensors=False)


BINS = {"regression_head": "bins", "regression_bins": 8, "regression_range": [20.0, 90.0]}
CLASSES = {"id2label": {0: "a", 1: "b"}}
OTHER_ANSWERS = {
    "another head": (BrainFoundForRegression, {}, BINS, "a point head", "8 bins from 20 to 90"),
    "head of two numbers": (BrainFoundForRegression, {}, {"regression_head": "gaussian"}, "a point", "a gaussian"),
    "the same shape": (BrainFoundForRegression, BINS, {"regression_range": [0.0, 100.0]}, "20 to 90", "0 to 100"),
    "more bins": (BrainFoundForRegression, BINS, {"regression_bins": 9}, "8 bins", "9 bins"),
    "more classes": (BrainFoundForClassification, {}, {"num_labels": 3}, "2 classes", "3 classes"),
    "weighted classes": (
        BrainFoundForClassification,
        {**CLASSES, "class_weights": [1.0, 2.0]},
        {"id2label": {0: "a", 1: "b", 2: "c"}},
        "2 classes",
        "3 classes",
    ),
    "several labels": (
        BrainFoundForClassification,
        CLASSES,
        {"problem_type": "multi_label_classification"},
        "2 classes",
        "2 labels of yes or no",
    ),
    "other features": (BrainFoundForClassification, {}, {"slice_features": "patches"}, "2 classes", "on patches"),
    "more regions": (BrainFoundForSegmentation, {"decoder_width": 8}, {"num_labels": 4}, "2 classes", "4 classes"),
    "overlapping regions": (
        BrainFoundForSegmentation,
        {"decoder_width": 8},
        {"overlapping_labels": True},
        "2 classes",
        "2 overlapping labels",
    ),
}


@pytest.mark.parametrize("case", OTHER_ANSWERS)
def test_a_head_with_other_answers_is_refused_or_begins_anew(backbone_folder, tmp_path, case):
    kind, fields, asked, has, wants = OTHER_ANSWERS[case]
    saved = kind.from_backbone(backbone_folder, **fields)
    layer = "decoder.score" if kind is BrainFoundForSegmentation else "head.score"
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(7.0)
    saved.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"other outputs.*got .*{wants}.*expected .*{has}.*ignore_mismatched") as error:
        kind.from_pretrained(tmp_path, **asked)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=f"new weights, because the saved one has .*{has}.* requested one .*{wants}"):
        model = kind.from_pretrained(tmp_path, **asked, ignore_mismatched_sizes=True)
    new, old = dict(model.named_parameters()), dict(saved.named_parameters())
    assert new[f"{layer}.weight"].abs().max() < 6
    assert not new[f"{layer}.bias"].any()
    assert all(torch.equal(value, old[name]) for name, value in new.items() if not name.startswith(layer))
    assert model.config.class_weights is None
    # A configuration in the place of fields is held to the same.
    with pytest.raises(ModelError, match="other outputs"):
        kind.from_pretrained(tmp_path, config=model.config)


@pytest.mark.parametrize("kind", [BrainFoundForClassification, BrainFoundForRegression])
def test_features_of_another_width_begin_aggregator_and_head_anew(backbone_folder, tmp_path, kind):
    saved = kind.from_backbone(backbone_folder, aggregator="attention")
    saved.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="other outputs.*on cls_and_patches"):
        kind.from_pretrained(tmp_path, slice_features="cls_and_patches")
    with pytest.warns(UserWarning, match="gets new weights.*the requested one .* on cls_and_patches"):
        model = kind.from_pretrained(tmp_path, slice_features="cls_and_patches", ignore_mismatched_sizes=True)
    assert model.head.score.in_features == 64
    assert not model.head.score.bias.any()
    encoders = [one.encoder.state_dict() for one in (model, saved)]
    assert all(torch.equal(value, encoders[1][name]) for name, value in encoders[0].items())
    model.save_pretrained(tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again")
    pixels = torch.rand(1, 3, 3, 16, 16)
    with torch.no_grad():
        first, second = (one.eval()(pixels).to_tuple()[0] for one in (model, again))
    assert torch.equal(first, second)
    # A model without a head has nothing to lose.
    body = BrainFoundModel.from_pretrained(tmp_path, slice_features="cls_and_patches")
    assert body.config.embedding_size == 64


def test_the_same_answers_need_no_warning(backbone_folder, tmp_path, recwarn):
    saved = BrainFoundForRegression.from_backbone(backbone_folder, **BINS)
    saved.save_pretrained(tmp_path)
    for options in (BINS, {}, {"head_dropout": 0.3}, {"ignore_mismatched_sizes": True}):
        loaded = BrainFoundForRegression.from_pretrained(tmp_path, **options)
        assert torch.equal(loaded.head.score.weight, saved.head.score.weight)
    older = BrainFoundForRegression.from_backbone(backbone_folder, regression_head="gaussian")
    older.save_pretrained(tmp_path / "older")
    BrainFoundForRegression.from_pretrained(tmp_path / "older", regression_head="gaussian")
    assert not [warning for warning in recwarn if "gets new weights" in str(warning.message)]


def test_weights_of_another_shape_are_named(backbone_folder, tmp_path):
    BrainFoundForClassification.from_backbone(backbone_folder).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = "brainfound.encoder.backbone.layernorm.weight"
    save_file({**weights, key: torch.ones(5)}, tmp_path / "model.safetensors", {"format": "pt"})
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(
            ModelError, match=r"another shape.*layernorm\.weight \(got \(5,\).*expected \(32,\)"
        ) as error:
            BrainFoundForClassification.from_pretrained(tmp_path, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="projection.weight"):
        BrainFoundModel.from_pretrained(tmp_path, contrasts=["T1w"])


def test_another_width_of_a_part_is_a_new_part(backbone_folder, tmp_path):
    kind = BrainFoundForSegmentation
    kind.from_backbone(backbone_folder, decoder_width=8, aggregator="attention").save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path, decoder_width=16, aggregator_width=64)
    assert model.decoder.score.weight.shape[1] == 16
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_auto_classes_refuse_other_answers_too(backbone_folder, tmp_path):
    BrainFoundForClassification.from_backbone(backbone_folder, class_weights=[1.0, 3.0]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="3 classes"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)
    with pytest.warns(UserWarning, match="gets new weights"):
        model = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert (model.config.num_classes, model.config.class_weights) == (3, None)
    weighted = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert weighted.config.class_weights == [1.0, 3.0]


def test_an_adapter_by_itself_is_named_as_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter without the model"):
        BrainFoundForClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("is_known", [True, False])
def test_the_history_of_a_hub_model_is_read_empty_or_unknown(tmp_path, monkeypatch, recwarn, is_known):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, kind in (("ours", "brainfound"), ("new", "brainfound"), ("plain", "dinov2")):
        repository = tmp_path / f"models--someone--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("c" * 40)
        snapshot = repository / "snapshots" / ("c" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"model_type": kind}))
        if name == "ours":
            TrainingHistory(complete=True).save(snapshot)
        elif is_known:  # what the Hub's client leaves behind where a repository lacks a file
            absent = repository / ".no_exist" / ("c" * 40)
            absent.mkdir(parents=True)
            (absent / HISTORY_FILE).touch()
    assert read_history("someone/ours") == TrainingHistory(complete=True)
    assert read_history("someone/plain") == TrainingHistory()  # a model of others has no history
    assert not recwarn.list
    assert read_history("someone/new") == TrainingHistory()
    lines = [str(warning.message) for warning in recwarn.list]
    why = "whether it was trained on these subjects is not known"
    assert lines == ([] if is_known else [f"{HISTORY_FILE} of someone/new cannot be fetched: {why}"])


def test_two_readers_without_the_hub_leave_it_as_it_was(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    together = threading.Barrier(2)
    seen = []

    def is_away() -> bool:
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(timeout=0.2)  # where one reader does not wait for the other
        return True

    def read(seconds: float) -> None:
        with cache_if_hub_is_away():
            time.sleep(seconds)
            seen.append(huggingface_hub.constants.HF_HUB_OFFLINE)

    monkeypatch.setattr("brainfound.hub._is_away", is_away)
    for waits in ((0.05, 0.6), (0.6, 0.05)):
        together.reset()
        readers = [threading.Thread(target=read, args=(seconds,)) for seconds in waits]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    assert seen == [True] * 4


def test_two_models_that_are_loaded_at_once_leave_the_messages_as_they_were(monkeypatch):
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    monkeypatch.setattr(logging, "_tqdm_active", True)
    logging.set_verbosity_warning()
    try:
        with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
            first.enter_context(silence_transformers())
            second.enter_context(silence_transformers())
            first.close()
            assert logging.get_verbosity() == logging.ERROR
            second.close()
            assert logging.get_verbosity() == logging.WARNING
            assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_fault_of_the_disk_is_not_blamed_on_the_hub(monkeypatch, number):
    def download(*arguments, **options):
        raise OSError(number, os.strerror(number), "/somewhere/cache")

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for call in (lambda: is_brainfound("lab/model"), lambda: Store.from_hub("lab/store")):
        with pytest.raises(BrainFoundError) as error:
            call()
        assert os.strerror(number) in str(error.value)
        assert "Set HF_HOME to a folder that you may write, on a disk with free space" in str(error.value)
        assert "/somewhere" not in str(error.value)
        assert "connection" not in str(error.value)


def test_a_fault_of_the_program_is_not_blamed_on_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **options: {}["missing"])
    with pytest.raises(KeyError):
        Store.from_hub("lab/store")
