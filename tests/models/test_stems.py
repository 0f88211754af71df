"""The stems `per_contrast` and `slices` against the plain ViT, under absence, padding, chunks and reloading."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModel, ViTConfig, ViTModel

from brainfound.adapters import AdapterRecipe, attach_adapter
from brainfound.adapters.attach import resolve_targets
from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import ModelError, RecipeError
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.models import (
    BrainFoundConfig,
    BrainFoundForClassification,
    BrainFoundForSegmentation,
    BrainFoundModel,
    stack_prediction,
)
from brainfound.models.encoder import ValidSlices
from brainfound.models.stem import STEMS
from brainfound.pretraining.starting_model import InitRecipe, build_model
from brainfound.recipes import validate
from tests.tiny_backbones import library_tokens

THREE = ("T1w", "T2w", "FLAIR")
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
"""Matrix products round differently by the number of images; the outputs here are of the order of one."""


def contrasts_for(stem):
    return ("T1w",) if stem == "slices" else THREE


def build(folder, stem, kind=BrainFoundModel, **config):
    return kind.from_backbone(folder, config.pop("contrasts", contrasts_for(stem)), stem=stem, **config)


def embeddings_of(model):
    return model.encoder.backbone.embeddings.patch_embeddings


@pytest.fixture(scope="module", params=["dinov2", "dinov2_with_registers", "vit"])
def any_start(request, write_backbone, tmp_path_factory):
    """A folder of each family that a model can start from."""
    folder = tmp_path_factory.mktemp("start") / request.param
    if request.param != "vit":
        return write_backbone(folder, request.param)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8, image_size=40
    )
    torch.manual_seed(5)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


# --- per_contrast ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 40), (24, 56)])
def test_one_present_contrast_is_the_plain_vit_on_a_grey_image(any_backbone, size):
    folder, model_class = any_backbone
    pixels, mask = torch.rand(3, 2, 3, *size), torch.eye(3).bool()
    with torch.no_grad():
        output = build(folder, "per_contrast")(pixels, contrast_mask=mask, output_patch_embeddings=True)
    grey = pixels[torch.arange(3), :, torch.arange(3)].flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
    tokens = library_tokens(folder, model_class, grey)
    num_patches = size[0] * size[1] // 64
    torch.testing.assert_close(output.slice_embeddings.flatten(0, 1), tokens[:, 0], **CLOSE)
    torch.testing.assert_close(output.patch_embeddings.flatten(0, 1), tokens[:, -num_patches:], **CLOSE)


def test_the_kernel_is_the_sum_of_the_rgb_kernels(backbone_folder):
    rgb = embeddings_of(build(backbone_folder, "channels")).projection
    grey = embeddings_of(build(backbone_folder, "per_contrast")).projection
    assert grey.weight.shape == (32, 1, 8, 8)
    torch.testing.assert_close(grey.weight, rgb.weight.sum(dim=1, keepdim=True))
    assert torch.equal(grey.bias, rgb.bias)


@pytest.mark.parametrize("num_contrasts", [1, 2, 5])
def test_present_contrasts_are_averaged(backbone_folder, num_contrasts):
    contrasts = [f"contrast{index}" for index in range(num_contrasts)]
    encoder = build(backbone_folder, "per_contrast", contrasts=contrasts).encoder
    with torch.no_grad():
        embeddings_of(SimpleNamespace(encoder=encoder)).contrast_embedding.weight.normal_()
        pixels = torch.rand(2, num_contrasts, 16, 24)
        each = [encoder(pixels, F.one_hot(torch.tensor([c, c]), num_contrasts).bool(), layers=(1, 3))
                for c in range(num_contrasts)]  # fmt: skip
        together = encoder(pixels, None, layers=(1, 3))
    torch.testing.assert_close(together.cls, torch.stack([one.cls for one in each]).mean(dim=0), **CLOSE)
    torch.testing.assert_close(together.patches, torch.stack([one.patches for one in each]).mean(dim=0), **CLOSE)
    for layer in (1, 3):
        mean = torch.stack([one.hidden[layer] for one in each]).mean(dim=0)
        torch.testing.assert_close(together.hidden[layer], mean, **CLOSE)


def test_each_contrast_has_its_own_mean_and_std(backbone_folder):
    listed = build(backbone_folder, "per_contrast", image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 1.0, 2.0])
    plain = build(backbone_folder, "per_contrast", image_mean=0.0, image_std=1.0)
    pixels = torch.rand(2, 2, 3, 16, 16)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    scaled = (pixels - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(listed(pixels, mask).slice_embeddings, plain(scaled, mask).slice_embeddings, **CLOSE)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=3, max_size=3).filter(any), min_size=1, max_size=3),
    content=st.sampled_from([float("nan"), float("inf"), 7.0]),
)
def test_what_an_absent_contrast_holds_changes_no_bit(backbone_folder, rows, content):
    model, mask = build(backbone_folder, "per_contrast", aggregator="attention"), torch.tensor(rows)
    pixels = torch.rand(len(rows), 3, 3, 16, 16)
    changed = torch.where(mask[:, None, :, None, None], pixels, content)
    with torch.no_grad():
        first = model(pixels, contrast_mask=mask, output_patch_embeddings=True)
        second = model(changed, contrast_mask=mask, output_patch_embeddings=True)
    assert first.volume_embedding.isfinite().all()
    for one, other in zip(first.to_tuple(), second.to_tuple(), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=3, max_size=3).filter(any), min_size=1, max_size=3),
    slices=st.lists(st.booleans(), min_size=4, max_size=4).filter(any),
    chunk=st.integers(1, 9),
)
def test_absent_contrasts_are_not_encoded_and_chunks_count_images(backbone_folder, rows, slices, chunk):
    model, mask = build(backbone_folder, "per_contrast", slice_chunk=chunk), torch.tensor(rows)
    whole = build(backbone_folder, "per_contrast")
    slice_mask = torch.tensor(slices).expand(len(rows), -1)
    pixels, sizes = torch.rand(len(rows), 4, 3, 16, 16), []
    embeddings_of(model).register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    with torch.no_grad():
        output = model(pixels, mask, slice_mask)
        expected = whole(pixels, mask, slice_mask)
    assert sum(sizes) == int(mask.sum()) * sum(slices)
    # A slice whose contrasts alone are more than a chunk is a chunk by itself.
    assert max(sizes) <= max(chunk, int(mask.sum(dim=1).max()))
    assert all(first + second > chunk for first, second in pairwise(sizes))
    torch.testing.assert_close(output.slice_embeddings, expected.slice_embeddings, **CLOSE)


def test_a_slice_without_any_contrast_is_refused(backbone_folder):
    encoder = build(backbone_folder, "per_contrast").encoder
    with pytest.raises(ModelError, match="no contrast"):
        encoder(torch.rand(2, 3, 16, 16), torch.tensor([[True, False, False], [False] * 3]))


def test_gradients_reach_the_embedding_of_present_contrasts_only(backbone_folder):
    model = build(backbone_folder, "per_contrast").train()
    assert not embeddings_of(model).contrast_embedding.weight.any()
    pixels = torch.rand(1, 2, 3, 16, 16)
    pixels[:, :, 1] = float("nan")
    model(pixels, contrast_mask=torch.tensor([[True, False, True]])).volume_embedding.square().sum().backward()
    gradient = embeddings_of(model).contrast_embedding.weight.grad
    assert gradient[[0, 2]].abs().sum(dim=1).min() > 0
    assert not gradient[1].any()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_the_embedding_tells_contrasts_apart(backbone_folder):
    model, pixels = build(backbone_folder, "per_contrast"), torch.rand(1, 2, 1, 16, 16).expand(-1, -1, 3, -1, -1)
    first, second = (torch.tensor([row]) for row in ([True, False, False], [False, True, False]))
    with torch.no_grad():
        assert torch.equal(model(pixels, first).volume_embedding, model(pixels, second).volume_embedding)
        embeddings_of(model).contrast_embedding.weight[1].normal_()
        assert not torch.allclose(model(pixels, first).volume_embedding, model(pixels, second).volume_embedding)


# --- slices ---------------------------------------------------------------------------------------------------------


def test_a_slice_and_its_neighbours_are_the_three_channels(any_backbone):
    folder, model_class = any_backbone
    pixels = torch.rand(2, 4, 1, 24, 24)
    with torch.no_grad():
        output = build(folder, "slices")(pixels, output_patch_embeddings=True)
    planes = pixels[:, :, 0]
    below, above = planes[:, [0, 0, 1, 2]], planes[:, [1, 2, 3, 3]]
    tokens = library_tokens(folder, model_class, torch.stack((below, planes, above), dim=2).flatten(0, 1))
    assert torch.equal(output.slice_embeddings.flatten(0, 1), tokens[:, 0])
    assert torch.equal(output.patch_embeddings.flatten(0, 1), tokens[:, -9:])


def test_neighbours_are_the_valid_slices_of_the_same_volume(backbone_folder):
    encoder = build(backbone_folder, "slices").encoder
    mask = torch.tensor([[False, True, False, True, True], [True, False, False, False, False]])
    pixels = torch.arange(10.0).view(2, 5, 1, 1, 1).expand(-1, -1, -1, 8, 8)
    seen = []
    encoder.forward = lambda planes, *args, **kwargs: seen.append(planes[:, :, 0, 0])
    list(ValidSlices(encoder, 64, pixels, None, mask).encode())
    assert seen[0].tolist() == [[1, 1, 3], [1, 3, 4], [3, 4, 4], [5, 5, 5]]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_do_not_cut_neighbours_apart(backbone_folder, chunk):
    pixels, mask = torch.rand(2, 5, 1, 16, 16), torch.tensor([[True] * 5, [True, True, False, True, False]])
    with torch.no_grad():
        whole = build(backbone_folder, "slices")(pixels, None, mask).slice_embeddings
        chunked = build(backbone_folder, "slices", slice_chunk=chunk)(pixels, None, mask).slice_embeddings
    torch.testing.assert_close(chunked, whole, **CLOSE)


def test_prediction_keeps_neighbours_together(backbone_folder, monkeypatch):
    model = build(backbone_folder, "slices", BrainFoundForSegmentation, num_labels=2, decoder_width=8)
    stack = Stack(
        pixels=np.random.default_rng(0).integers(0, 256, (7, 1, 16, 24), dtype=np.uint8),
        contrasts=("T1w",),
        present=np.array([True]),
        positions_mm=np.arange(7, dtype=np.float32) - 3,
        affine=np.eye(4),
        native_shape=(7, 16, 24),
        native_affine=np.eye(4),
    )
    whole = stack_prediction.infer(model, stack).foreground_probability
    monkeypatch.setattr(stack_prediction, "SEGMENTATION_CHUNK", 2)
    np.testing.assert_allclose(stack_prediction.infer(model, stack).foreground_probability, whole, atol=1e-5)


def test_several_contrasts_are_refused(backbone_folder):
    with pytest.raises(ModelError, match=r"config\.contrasts: .*one contrast .*got T1w, FLAIR"):
        build(backbone_folder, "slices", contrasts=("T1w", "FLAIR"))


# --- each stem ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", STEMS)
def test_padding_changes_no_bit(backbone_folder, stem):
    model = build(backbone_folder, stem, aggregator="transformer")
    num_contrasts = len(contrasts_for(stem))
    contrast_mask = torch.tensor([[True, False, True], [True, True, True]])[:, -num_contrasts:]
    valid = torch.rand(2, 4, num_contrasts, 16, 16)
    positions = torch.tensor([[-3.0, -1.0, 1.0, 3.0], [-9.0, -3.0, 3.0, 9.0]])
    with torch.no_grad():
        expected = model(valid, contrast_mask, None, positions)
        for places, num_all in (([0, 2, 3, 7], 9), ([1, 2, 3, 4], 5)):
            pixels = torch.full((2, num_all, num_contrasts, 16, 16), float("nan"))
            where = torch.full((2, num_all), float("nan"))
            mask = torch.zeros(2, num_all, dtype=torch.bool)
            pixels[:, places], where[:, places], mask[:, places] = valid, positions, True
            output = model(pixels, contrast_mask, mask, where)
            assert torch.equal(output.volume_embedding, expected.volume_embedding)
            assert torch.equal(output.slice_embeddings[:, places], expected.slice_embeddings)
            assert not output.slice_embeddings[~mask].any()


@pytest.mark.parametrize("stem", STEMS)
def test_masked_patches_are_hidden(any_backbone, stem):
    encoder = build(any_backbone[0], stem).encoder
    pixels = torch.rand(2, 3, 16, 16)
    changed = pixels.clone()
    changed[..., :8, :8] = torch.rand(2, 3, 8, 8)
    mask = torch.tensor([[True, False, False, False]] * 2)
    with torch.no_grad():
        assert torch.equal(encoder(pixels, None, mask).cls, encoder(changed, None, mask).cls)
        assert not torch.equal(encoder(pixels).cls, encoder(changed).cls)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("kind", [BrainFoundModel, BrainFoundForClassification, BrainFoundForSegmentation])
def test_a_saved_model_answers_the_same(any_start, tmp_path, stem, kind):
    model = build(any_start, stem, kind, decoder_width=8)
    if stem != "slices":
        torch.nn.init.normal_(embeddings_of(model).contrast_embedding.weight)
    model.save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, len(contrasts_for(stem)), 16, 24)
    loaded = [kind.from_pretrained(tmp_path)]
    if kind is BrainFoundModel:
        loaded.append(AutoModel.from_pretrained(tmp_path))
    with torch.no_grad():
        for other in loaded:
            assert type(other) is kind
            assert other.config.stem == other.encoder.stem == stem
            assert torch.equal(model.eval()(pixels)[0], other.eval()(pixels)[0])


@pytest.mark.parametrize("stem", STEMS)
def test_bfloat16_forward(backbone_folder, stem):
    model, pixels = build(backbone_folder, stem), torch.rand(1, 3, len(contrasts_for(stem)), 16, 16)
    with torch.no_grad():
        exact = model(pixels).volume_embedding
        rounded = model.to(torch.bfloat16)(pixels).volume_embedding
    assert rounded.dtype == torch.bfloat16
    assert F.cosine_similarity(rounded.float(), exact).min() > 0.9


def gradients_of(model, pixels, chunk, checkpointing):
    model.config.slice_chunk = chunk
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    calls = []
    handles = [block.norm1.register_forward_hook(lambda *args: calls.append(1)) for block in model.encoder.blocks]
    labels = (pixels[:, :, 0] > 0.5).long()
    model(pixels, labels=labels).loss.backward()
    for handle in handles:
        handle.remove()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return gradients, len(calls)


@pytest.mark.parametrize("stem", STEMS)
def test_gradient_checkpointing_and_chunks_change_no_gradient(backbone_folder, stem):
    pixels = torch.rand(2, 3, len(contrasts_for(stem)), 16, 16)
    results = []
    for chunk, checkpointing in ((64, False), (64, True), (4, False), (4, True)):
        torch.manual_seed(1)
        model = build(backbone_folder, stem, BrainFoundForSegmentation, decoder_width=8, num_labels=2)
        results.append(gradients_of(model, pixels, chunk, checkpointing))
    expected = results[0][0]
    assert len(expected) > 40
    for gradients, _ in results[1:]:
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3, msg=name)
    # With checkpointing each block runs once more, in the backward pass.
    plain, again, chunked, chunked_again = (calls for _, calls in results)
    assert (again, chunked_again) == (2 * plain, 2 * chunked)
    assert chunked > plain


@pytest.mark.parametrize("stem", STEMS)
def test_checkpointing_trains_an_adapter_on_a_frozen_backbone(backbone_folder, stem):
    pixels = torch.rand(1, 3, len(contrasts_for(stem)), 16, 16)
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = build(backbone_folder, stem, BrainFoundForClassification, num_labels=2)
        adapted = attach_adapter(model, AdapterRecipe(rank=2, train_contrast_embedding=False)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        adapted(pixel_values=pixels, labels=torch.tensor([1])).loss.backward()
        results.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    assert any("lora_B" in name and gradient.any() for name, gradient in results[0].items())
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, msg=name)


@pytest.mark.parametrize("stem", STEMS)
def test_an_adapter_finds_the_projection_of_the_stem(backbone_folder, stem):
    model = build(backbone_folder, stem, BrainFoundForClassification, num_labels=2)
    (name,) = resolve_targets(model, ["patch"])
    assert model.get_submodule(name) is embeddings_of(model).projection
    pixels = torch.rand(1, 2, len(contrasts_for(stem)), 16, 16)
    with torch.no_grad():
        before = model(pixels).logits
    adapted = attach_adapter(model, AdapterRecipe(rank=2, roles=("patch",))).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(pixel_values=pixels).logits, before, **CLOSE)
    adapted(pixel_values=pixels, labels=torch.tensor([1])).loss.backward()
    trained = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("projection.lora_B" in name for name in trained)
    assert any("contrast_embedding" in name for name in trained) == (stem != "slices")


# --- from one stem to another, and what is refused --------------------------------------------------------------------


def test_a_saved_model_is_loaded_with_another_stem(backbone_folder, tmp_path):
    saved = build(backbone_folder, "channels")
    torch.nn.init.normal_(embeddings_of(saved).contrast_embedding.weight)
    saved.save_pretrained(tmp_path / "channels")
    model = BrainFoundForClassification.from_pretrained(tmp_path / "channels", stem="per_contrast", num_labels=4)
    assert model.config.stem == model.brainfound.config.stem == model.encoder.stem == "per_contrast"
    before, after = embeddings_of(saved), embeddings_of(model)
    torch.testing.assert_close(after.projection.weight, before.projection.weight.sum(dim=1, keepdim=True))
    assert torch.equal(after.contrast_embedding.weight, before.contrast_embedding.weight)
    model.save_pretrained(tmp_path / "per_contrast")
    again = BrainFoundForClassification.from_pretrained(tmp_path / "per_contrast")
    pixels = torch.rand(1, 2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, model.eval()(pixels).logits)
        assert again.head.score.out_features == 4


def test_equal_neighbours_look_like_one_slice_to_the_model_before(backbone_folder, tmp_path):
    saved = build(backbone_folder, "channels", contrasts=("T1w",))
    saved.save_pretrained(tmp_path)
    model = BrainFoundModel.from_pretrained(tmp_path, stem="slices")
    pixels = torch.rand(2, 1, 1, 16, 16).expand(-1, 3, -1, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).slice_embeddings, saved(pixels).slice_embeddings, **CLOSE)


@pytest.mark.parametrize("load", [BrainFoundModel.from_pretrained, AutoModel.from_pretrained])
def test_the_other_stem_may_be_requested_by_a_configuration(backbone_folder, tmp_path, load):
    """As a bundle does, whose base is a model of another stem."""
    saved = build(backbone_folder, "channels")
    saved.save_pretrained(tmp_path)
    config = BrainFoundConfig.from_dict({**saved.config.to_dict(), "stem": "per_contrast"})
    pixels = torch.rand(1, 2, 3, 16, 16)
    with torch.no_grad():
        expected = BrainFoundModel.from_pretrained(tmp_path, stem="per_contrast")(pixels).volume_embedding
        for model in (load(tmp_path, config=config), load(tmp_path, stem="per_contrast")):
            assert model.config.stem == model.encoder.stem == "per_contrast"
            assert torch.equal(model(pixels).volume_embedding, expected)


@pytest.mark.parametrize(
    ("stem", "told"),
    [
        ("per_contrasts", "Did you mean per_contrast?"),
        ("channel", "Did you mean channels?"),
        ("volume", "channels, per_contrast, slices"),
    ],
)
def test_a_wrong_stem_is_one_line(backbone_folder, tmp_path, stem, told):
    build(backbone_folder, "channels").save_pretrained(tmp_path)
    for make in (
        lambda: BrainFoundModel.from_backbone(backbone_folder, stem=stem),
        lambda: BrainFoundModel.from_pretrained(tmp_path, stem=stem),
    ):
        with pytest.raises(ModelError) as error:
            make()
        assert told in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(RecipeError) as refused:
        validate(FinetuneRecipe, {"stem": stem})
    assert "stem: " in str(refused.value)


@pytest.mark.parametrize("stem", ["per_contrast", "slices"])
def test_pretraining_is_refused_before_it_begins(backbone_folder, tmp_path, stem):
    build(backbone_folder, stem).save_pretrained(tmp_path)
    store = SimpleNamespace(contrasts=contrasts_for(stem))
    with pytest.raises(ModelError, match=f"the stem '{stem}' cannot embed a slice by itself"):
        build_model(InitRecipe(source=str(tmp_path)), store, 40, seed=0)
    encoder = BrainFoundModel.from_pretrained(tmp_path).encoder
    with pytest.raises(ModelError, match=f"the stem '{stem}'"):
        encoder.embed(torch.rand(2, len(contrasts_for(stem)), 16, 16))
