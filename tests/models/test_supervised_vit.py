"""A supervised ViT as a start: the same function in another architecture, every weight carried over, or refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    DeiTConfig,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from brainfound.errors import ModelError
from brainfound.models import BrainFoundForClassification, BrainFoundModel
from brainfound.models.backbones import FAMILIES

TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 72,
    "patch_size": 8,
    "image_size": 40,
}


def write_vit(folder, kind=ViTForImageClassification, **changes):
    """A checkpoint as the Hub has it: an encoder under a classifier, with weights far from their initial values."""
    torch.manual_seed(3)
    model = kind(ViTConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def write_preprocessor(folder, **content):
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def reference(folder, pixels, **options):
    vit = ViTModel.from_pretrained(folder, add_pooling_layer=False, **options).eval()
    with torch.no_grad():
        return vit(pixels, interpolate_pos_encoding=True).last_hidden_state


def encode(folder, pixels, **config):
    encoder = BrainFoundModel.from_backbone(folder, image_mean=0.0, image_std=1.0, **config).encoder
    with torch.no_grad():
        return encoder(pixels)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": False},
        {"layer_norm_eps": 1e-3},
        {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2},
        {"patch_size": 4, "image_size": 12},
        {"image_size": [48, 48], "patch_size": [16, 16]},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(40, 40), (48, 48), (16, 64), (80, 32)], ids=str)
def test_the_converted_model_is_the_same_function(tmp_path, changes, size):
    """CLS and patches, at the size of the position grid and at others, square and not."""
    folder = write_vit(tmp_path / "vit", **changes)
    patch = changes.get("patch_size", 8)
    patch = patch if isinstance(patch, int) else patch[0]
    height, width = (max(patch, side // patch * patch) for side in size)
    pixels = torch.randn(2, 3, height, width)
    # The library's own resampling divides by the patch size, which it then wants as one number.
    number = {"patch_size": patch} if isinstance(changes.get("patch_size"), list) else {}
    expected = reference(folder, pixels, **number)
    encoding = encode(folder, pixels)
    torch.testing.assert_close(encoding.cls, expected[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(encoding.patches, expected[:, 1:], atol=1e-5, rtol=0)
    assert encoding.patches.std() > 0.1


def test_the_attention_kernel_can_be_chosen_and_the_library_has_the_same_answer(tmp_path):
    folder = write_vit(tmp_path / "vit")
    pixels = torch.randn(2, 3, 24, 32)
    expected = reference(folder, pixels, attn_implementation="eager")
    model = BrainFoundModel.from_backbone(folder, image_mean=0.0, image_std=1.0, attn_implementation="eager")
    assert model.encoder.backbone.config._attn_implementation == "eager"
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(pixels).cls, expected[:, 0], atol=1e-5, rtol=0)


def test_every_weight_is_of_the_file(tmp_path):
    """Nothing is left at random, nothing of the encoder is left out; what is new is zero or one."""
    folder = write_vit(tmp_path / "vit")
    torch.manual_seed(0)
    first = BrainFoundModel.from_backbone(folder).state_dict()
    torch.manual_seed(1)
    second = BrainFoundModel.from_backbone(folder).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    saved = [tensor for name, tensor in load_file(folder / "model.safetensors").items() if "classifier" not in name]
    own = [tensor for name, tensor in first.items() if not any(n in name for n in ("lambda1", "contrast_", "mask_"))]
    assert sorted(t.double().abs().sum().item() for t in own) == pytest.approx(
        sorted(t.double().abs().sum().item() for t in saved)
    )
    for name, tensor in first.items():
        if "lambda1" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
    assert not first["encoder.backbone.embeddings.mask_token"].any()


def test_a_pooler_is_left_out_and_a_trained_mask_token_is_taken(tmp_path):
    pixels = torch.randn(1, 3, 40, 40)
    pooled = write_vit(tmp_path / "pooled", ViTModel)
    assert any("pooler" in name for name in load_file(pooled / "model.safetensors"))
    torch.testing.assert_close(encode(pooled, pixels).cls, reference(pooled, pixels)[:, 0], atol=1e-5, rtol=0)
    masked = write_vit(tmp_path / "masked", ViTForMaskedImageModeling)
    token = BrainFoundModel.from_backbone(masked).encoder.backbone.embeddings.mask_token
    (saved,) = (t for n, t in load_file(masked / "model.safetensors").items() if n.endswith("mask_token"))
    assert torch.equal(token.flatten(), saved.flatten())
    assert token.any()


def rewrite(folder, change):
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_each_tensor_of_a_hub_file_lands_in_its_place(tmp_path):
    """Hub files are named as before transformers 5; each of a layer's tensors becomes the one of the same meaning."""
    folder = write_vit(tmp_path / "vit")
    saved = load_file(folder / "model.safetensors")
    own = BrainFoundModel.from_backbone(folder).encoder.backbone.encoder.layer[2].state_dict()
    places = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    for theirs, ours in places.items():
        for kind in ("weight", "bias"):
            assert torch.equal(own[f"{ours}.{kind}"], saved[f"vit.encoder.layer.2.{theirs}.{kind}"]), ours


def test_missing_weights_are_refused_by_name(tmp_path):
    folder = write_vit(tmp_path / "vit")
    rewrite(folder, lambda weights: {name: t for name, t in weights.items() if ".layer.1." not in name})
    with pytest.raises(ModelError, match=r"lacks 16 of the model's \d+ weights: layers\.1\.") as error:
        BrainFoundModel.from_backbone(folder)
    assert "\n" not in str(error.value)


def test_weights_beyond_the_configuration_are_refused_by_name(tmp_path):
    folder = write_vit(tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"holds 16 weights that its configuration has no place for: .*layer.*2\."):
        BrainFoundModel.from_backbone(folder)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"hidden_dropout_prob": 0.1}, "hidden_dropout_prob"),
        ({"intermediate_size": 70}, "intermediate_size"),
        ({"image_size": [40, 48]}, "image_size"),
    ],
)
def test_what_dinov2_cannot_compute_is_refused_in_one_line(tmp_path, changes, field):
    folder = write_vit(tmp_path / "vit", **changes)
    with pytest.raises(ModelError, match=rf"config\.{field}.*got.*expected") as error:
        BrainFoundModel.from_backbone(folder)
    assert "\n" not in str(error.value)


def test_dropout_of_attention_is_reported_and_left_out_so_that_it_can_be_trained(tmp_path):
    folder = write_vit(tmp_path / "vit", attention_probs_dropout_prob=0.1)
    with pytest.warns(UserWarning, match=r"attention_probs_dropout_prob 0\.1 is taken as 0"):
        encoder = BrainFoundModel.from_backbone(folder, image_mean=0.0, image_std=1.0).encoder
    pixels = torch.randn(2, 3, 40, 40)
    (trained,) = encoder.train().transform([encoder.embed(pixels)])
    torch.testing.assert_close(trained, reference(folder, pixels), atol=1e-5, rtol=0)


def test_patches_that_are_not_square_are_refused(tmp_path):
    folder = write_vit(tmp_path / "vit", patch_size=[8, 4])
    with pytest.raises(ModelError, match="patches must be square"):
        BrainFoundModel.from_backbone(folder)


def test_distilled_deit_is_refused_with_the_known_families(tmp_path):
    """It has a distillation token, which Dinov2 has no place for."""
    DeiTModel(DeiTConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'deit' .*expected one of dinov2, dinov2_with_registers, vit"):
        BrainFoundModel.from_backbone(tmp_path)


@pytest.mark.parametrize(
    ("preprocessor", "mean", "std"),
    [
        (None, 0.5, 0.5),
        ({"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 0.5, 0.5),
        ({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, 0.449, 0.226),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"size": 224}, 0.5, 0.5),
    ],
)
def test_images_are_normalised_as_the_preprocessor_says(tmp_path, preprocessor, mean, std):
    folder = write_vit(tmp_path / "vit")
    if preprocessor is not None:
        write_preprocessor(folder, **preprocessor)
    model = BrainFoundModel.from_backbone(folder)
    assert model.config.image_mean == pytest.approx(mean)
    assert model.config.image_std == pytest.approx(std)
    pixels = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        cls = model.encoder(pixels).cls
    torch.testing.assert_close(cls, reference(folder, (pixels - mean) / std)[:, 0], atol=1e-4, rtol=0)


def test_what_the_caller_says_goes_before_the_preprocessor(tmp_path):
    folder = write_vit(tmp_path / "vit")
    write_preprocessor(folder, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    model = BrainFoundModel.from_backbone(folder, image_mean=0.1)
    assert (model.config.image_mean, model.config.image_std) == (0.1, pytest.approx(0.3))


def test_the_preprocessor_of_a_hub_id_is_requested(tmp_path, monkeypatch):
    """Its preprocessor, the values of the family if it has none, and a warning if it is out of reach."""
    folder = write_vit(tmp_path / "vit")
    write_preprocessor(folder, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    asked = {}

    def hub(answer):
        def download(source, name, **options):
            asked.update(source=source, name=name, **options)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        return FAMILIES["vit"].image_statistics("google/vit-tiny", {"revision": "abc"})

    assert hub(str(folder / "preprocessor_config.json")) == {"image_mean": 0.4, "image_std": 0.3}
    assert (asked["source"], asked["name"], asked["revision"]) == ("google/vit-tiny", "preprocessor_config.json", "abc")
    missing = RemoteEntryNotFoundError("no such file", response=SimpleNamespace(headers={}, request=None))
    assert hub(missing) == {"image_mean": 0.5, "image_std": 0.5}
    for error in (OSError("offline"), LocalEntryNotFoundError("nothing in the cache")):
        with pytest.warns(UserWarning, match=r"google/vit-tiny cannot be fetched.*0\.5"):
            assert hub(error) == {"image_mean": 0.5, "image_std": 0.5}


@pytest.mark.parametrize("content", ["{", "[]", '{"image_mean": "grey"}', '{"image_std": [0, 0, 0]}'])
def test_a_damaged_preprocessor_is_one_line(tmp_path, content):
    folder = write_vit(tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(ModelError, match="preprocessor_config.json") as error:
        BrainFoundModel.from_backbone(folder)
    assert "\n" not in str(error.value)


def test_a_dinov2_start_does_not_look_at_a_preprocessor(write_backbone, tmp_path):
    folder = write_backbone(tmp_path / "dinov2")
    write_preprocessor(folder, image_mean=[0.1] * 3, image_std=[0.9] * 3)
    model = BrainFoundModel.from_backbone(folder)
    assert (model.config.image_mean, model.config.image_std) == (0.449, 0.226)


@pytest.mark.parametrize("num_contrasts", [1, 3, 4])
def test_it_is_saved_and_comes_back_as_a_brainfound_model(tmp_path, num_contrasts):
    contrasts = ("T1w", "T2w", "FLAIR", "SWI")[:num_contrasts]
    folder = write_vit(tmp_path / "vit")
    model = BrainFoundForClassification.from_backbone(folder, contrasts, num_labels=3)
    assert model.config.backbone_config.model_type == "dinov2"
    model.save_pretrained(tmp_path / "saved")
    loaded = BrainFoundForClassification.from_pretrained(tmp_path / "saved").eval()
    assert loaded.config.image_mean == 0.5
    pixels = torch.rand(1, 2, num_contrasts, 16, 24)
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, loaded(pixels).logits)
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()


def test_stochastic_depth_can_be_requested(tmp_path):
    model = BrainFoundModel.from_backbone(write_vit(tmp_path / "vit"), drop_path_rate=0.2)
    assert model.config.backbone_config.drop_path_rate == 0.2
