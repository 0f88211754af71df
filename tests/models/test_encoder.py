"""The slice encoder against the plain ViT that it starts from."""

import pytest
import torch
from transformers import Dinov2Model

from brainfound.errors import ModelError
from brainfound.models import BrainFoundModel, SliceEncoder
from brainfound.models.stem import inflate_kernels
from tests.tiny_backbones import library_tokens


@pytest.mark.parametrize("size", [(40, 40), (24, 56)])
def test_slices_equal_the_hub_model_to_the_last_bit(any_backbone, size):
    folder, model_class = any_backbone
    pixels = torch.rand(2, 3, 3, *size)
    model = BrainFoundModel.from_backbone(folder, contrasts=("T1w", "T2w", "FLAIR"))
    with torch.no_grad():
        output = model(pixels, output_patch_embeddings=True)
    tokens = library_tokens(folder, model_class, pixels.flatten(0, 1))
    num_patches = size[0] * size[1] // 64
    assert torch.equal(output.slice_embeddings.flatten(0, 1), tokens[:, 0])
    assert torch.equal(output.patch_embeddings.flatten(0, 1), tokens[:, -num_patches:])
    assert model.encoder.backbone.dtype == torch.float32


def test_masks_that_mask_nothing_change_no_bit(any_backbone):
    folder, model_class = any_backbone
    pixels = torch.rand(2, 3, 3, 24, 24)
    model = BrainFoundModel.from_backbone(folder)
    with torch.no_grad():
        output = model(pixels, contrast_mask=torch.ones(2, 3), slice_mask=torch.ones(2, 3))
    assert torch.equal(
        output.slice_embeddings.flatten(0, 1), library_tokens(folder, model_class, pixels.flatten(0, 1))[:, 0]
    )


def test_mean_and_std_may_be_listed_per_contrast(backbone_folder):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pixels = torch.rand(1, 2, 3, 24, 24)
    model = BrainFoundModel.from_backbone(backbone_folder, image_mean=mean, image_std=std)
    as_image = [torch.tensor(values)[:, None, None] for values in (mean, std)]
    expected = library_tokens(backbone_folder, Dinov2Model, pixels[0], *as_image)[:, 0]
    with torch.no_grad():
        assert torch.equal(model(pixels).slice_embeddings[0], expected)


def test_uint8_and_float_pixels_agree(backbone_folder):
    model = BrainFoundModel.from_backbone(backbone_folder)
    pixels = torch.randint(0, 256, (1, 2, 3, 24, 24), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model(pixels).volume_embedding, model(pixels.float() / 255).volume_embedding)


@pytest.mark.parametrize("content", [float("nan"), float("inf"), "random"])
def test_an_absent_contrast_never_matters(backbone_folder, content):
    model = BrainFoundModel.from_backbone(backbone_folder, contrasts=("T1w", "T2w", "FLAIR", "SWI"))
    pixels = torch.rand(2, 3, 4, 24, 24)
    mask = torch.tensor([[True, False, True, True], [False, False, False, True]])
    changed = pixels.clone()
    absent = ~mask[:, None, :, None, None].expand_as(pixels)
    changed[absent] = torch.rand(int(absent.sum())) * 9 if content == "random" else content
    with torch.no_grad():
        assert torch.equal(
            model(changed, contrast_mask=mask).slice_embeddings, model(pixels, contrast_mask=mask).slice_embeddings
        )
        assert not torch.equal(model(pixels).slice_embeddings, model(pixels, contrast_mask=mask).slice_embeddings)


def test_present_contrasts_are_rescaled(backbone_folder):
    """Without its bias, a patch embedding of two equal contrasts of four is that of all four."""
    encoder = BrainFoundModel.from_backbone(backbone_folder, contrasts=("T1w", "T2w", "FLAIR", "SWI")).encoder
    grey = torch.rand(1, 1, 16, 16).expand(1, 4, -1, -1)
    seen = patches_of(encoder, grey, torch.tensor([[True, False, True, False]]))
    torch.testing.assert_close(seen, patches_of(encoder, grey, None))


@pytest.mark.parametrize("num_contrasts", [1, 2, 4, 6])
def test_equal_contrasts_look_like_grey_to_the_rgb_model(backbone_folder, num_contrasts):
    contrasts = [f"contrast{index}" for index in range(num_contrasts)]
    encoder = BrainFoundModel.from_backbone(backbone_folder, contrasts=contrasts).encoder
    rgb = BrainFoundModel.from_backbone(backbone_folder).encoder
    grey = torch.rand(2, 1, 24, 24)
    assert encoder.backbone.embeddings.patch_embeddings.projection.weight.shape == (32, num_contrasts, 8, 8)
    torch.testing.assert_close(
        patches_of(encoder, grey.expand(-1, num_contrasts, -1, -1)),
        patches_of(rgb, grey.expand(-1, 3, -1, -1)),
        atol=1e-4,
        rtol=1e-4,
    )


def test_three_contrasts_keep_the_rgb_kernels():
    kernels = torch.rand(4, 3, 2, 2)
    assert torch.equal(inflate_kernels(kernels, 3), kernels)


def test_the_contrast_embedding_is_the_mean_over_present_contrasts(backbone_folder):
    encoder = BrainFoundModel.from_backbone(backbone_folder).encoder
    embedding = encoder.backbone.embeddings.patch_embeddings.contrast_embedding
    assert not embedding.weight.any()
    pixels, mask = torch.rand(1, 3, 16, 16), torch.tensor([[True, False, True]])
    before = patches_of(encoder, pixels, mask)
    with torch.no_grad():
        embedding.weight.normal_()
    added = patches_of(encoder, pixels, mask) - before
    torch.testing.assert_close(added, embedding.weight[[0, 2]].mean(0).expand_as(added), atol=1e-5, rtol=1e-5)


def test_masked_patches_are_replaced_by_the_mask_token(any_backbone):
    encoder = BrainFoundModel.from_backbone(any_backbone[0]).encoder
    pixels = torch.rand(1, 3, 16, 16)
    changed = pixels.clone()
    changed[..., :8, :8] = torch.rand(1, 3, 8, 8)
    masked = torch.tensor([[True, False, False, False]])
    with torch.no_grad():
        assert torch.equal(encoder(pixels, bool_masked_pos=masked).cls, encoder(changed, bool_masked_pos=masked).cls)
        assert not torch.equal(encoder(pixels).cls, encoder(changed).cls)


def test_layers_are_the_blocks_outputs(any_backbone):
    folder, model_class = any_backbone
    pixels = torch.rand(2, 3, 16, 16)
    encoder = BrainFoundModel.from_backbone(folder).encoder
    with torch.no_grad():
        encoding = encoder(pixels, layers=(1, 3))
        states = model_class.from_pretrained(folder)((pixels - 0.449) / 0.226, output_hidden_states=True).hidden_states
    assert sorted(encoding.hidden) == [1, 3]
    assert encoder.num_layers == len(encoder.blocks) == 3
    for layer, tokens in encoding.hidden.items():
        assert torch.equal(tokens, states[layer][:, -4:])
    torch.testing.assert_close(encoder.backbone.layernorm(encoding.hidden[3]), encoding.patches)


def test_a_mask_token_is_made_where_the_checkpoint_has_none(tmp_path, write_backbone):
    folder = write_backbone(tmp_path / "no_mask", use_mask_token=False)
    encoder = BrainFoundModel.from_backbone(folder).encoder
    assert encoder.backbone.embeddings.mask_token.shape == (1, 32)
    assert not encoder.backbone.embeddings.mask_token.any()


@pytest.mark.parametrize(
    ("shape", "told"),
    [((3, 16, 16), "shape (3, 16, 16)"), ((2, 2, 16, 16), "2 contrasts"), ((2, 3, 16, 20), "16 × 20")],
)
def test_wrong_shapes_are_named(backbone_folder, shape, told):
    encoder = BrainFoundModel.from_backbone(backbone_folder).encoder
    with pytest.raises(ModelError) as error:
        encoder(torch.rand(shape))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_gradients_are_finite_next_to_absent_nan(backbone_folder):
    model = BrainFoundModel.from_backbone(backbone_folder).train()
    pixels = torch.rand(1, 2, 3, 16, 16)
    pixels[:, :, 1] = float("nan")
    model(pixels, contrast_mask=torch.tensor([[True, False, True]])).volume_embedding.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 30
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert model.encoder.backbone.embeddings.patch_embeddings.contrast_embedding.weight.grad[1].abs().sum() == 0


def test_an_encoder_is_built_from_a_configuration_alone(backbone_folder):
    config = BrainFoundModel.from_backbone(backbone_folder).config
    encoding = SliceEncoder(config)(torch.rand(2, 3, 16, 24))
    assert encoding.cls.shape == (2, 32)
    assert encoding.patches.shape == (2, 6, 32)


def patches_of(encoder, pixels, contrast_mask=None):
    """Patch embeddings of slices, before positions are added."""
    seen = []
    handle = encoder.backbone.embeddings.patch_embeddings.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        encoder(pixels, contrast_mask)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_kernel_is_the_one_requested(backbone_folder, attention):
    model = BrainFoundModel.from_backbone(backbone_folder, attn_implementation=attention)
    assert model.encoder.blocks[0].attention.config._attn_implementation == attention
    assert BrainFoundModel.from_backbone(backbone_folder).encoder.backbone.config._attn_implementation == "sdpa"
