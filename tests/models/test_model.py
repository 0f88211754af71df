"""Volumes: padding, chunks, what is returned, what is refused."""

import pytest
import torch
from transformers import Dinov2Config

from brainfound.errors import ModelError, UsageError
from brainfound.models import (
    BrainFoundConfig,
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
    BrainFoundModel,
)
from brainfound.models.aggregators import AGGREGATORS
from brainfound.models.configuration import SLICE_FEATURES

KINDS = (BrainFoundForClassification, BrainFoundForRegression, BrainFoundForSegmentation)


def answer(model, *args, **kwargs):
    with torch.no_grad():
        output = model.eval()(*args, **kwargs)
    return next(output[name] for name in ("logits", "predictions", "volume_embedding") if output.get(name) is not None)


def padded(pixels, positions, num_more, content):
    """Two volumes of 4 and 2 valid slices, with more padding at the end."""
    shape = (2, num_more, *pixels.shape[2:])
    mask = torch.tensor([[True] * 4, [True, False, True, False]])
    pixels = torch.where(mask[:, :, None, None, None], pixels, torch.full_like(pixels, content))
    return (
        torch.cat((pixels, torch.full(shape, content)), dim=1),
        torch.cat((mask, torch.zeros(2, num_more, dtype=torch.bool)), dim=1),
        torch.cat((positions, torch.full((2, num_more), content)), dim=1),
    )


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_padding_never_changes_a_volume_embedding(backbone_folder, aggregator):
    model = BrainFoundModel.from_backbone(backbone_folder, aggregator=aggregator)
    pixels, positions = torch.rand(2, 4, 3, 16, 16), torch.arange(8.0).view(2, 4)
    answers = []
    for num_more, content in ((0, 0.0), (3, 0.5), (9, float("nan"))):
        padded_pixels, mask, padded_positions = padded(pixels, positions, num_more, content)
        with torch.no_grad():
            output = model(padded_pixels, slice_mask=mask, positions_mm=padded_positions)
        assert not output.slice_embeddings[~mask].any()
        answers.append((output.volume_embedding, output.slice_embeddings[mask]))
    for volume_embedding, slice_embeddings in answers[1:]:
        assert torch.equal(volume_embedding, answers[0][0])
        assert torch.equal(slice_embeddings, answers[0][1])


def test_chunks_change_nothing(backbone_folder):
    pixels = torch.rand(2, 5, 3, 16, 16)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    contrast_mask = torch.tensor([[True, True, False], [False, True, True]])
    whole = BrainFoundForSegmentation.from_backbone(backbone_folder, decoder_width=8)
    chunked = BrainFoundForSegmentation(BrainFoundConfig.from_dict({**whole.config.to_dict(), "slice_chunk": 3}))
    chunked.load_state_dict(whole.state_dict())
    for slice_mask in (None, mask):
        torch.testing.assert_close(
            answer(chunked, pixels, contrast_mask, slice_mask), answer(whole, pixels, contrast_mask, slice_mask)
        )
        torch.testing.assert_close(
            answer(chunked.brainfound, pixels, contrast_mask, slice_mask),
            answer(whole.brainfound, pixels, contrast_mask, slice_mask),
        )


def test_each_volume_has_its_own_contrasts(backbone_folder):
    model = BrainFoundModel.from_backbone(backbone_folder)
    pixels, mask = torch.rand(2, 3, 3, 16, 16), torch.tensor([[True, False, True], [False, True, False]])
    together = answer(model, pixels, contrast_mask=mask)
    for row in range(2):
        torch.testing.assert_close(answer(model, pixels[[row]], contrast_mask=mask[[row]]), together[[row]])


def test_outputs_have_the_promised_shapes(backbone_folder):
    model = BrainFoundModel.from_backbone(backbone_folder, contrasts=("T1w", "FLAIR"))
    output = model(torch.rand(2, 4, 2, 16, 24), output_patch_embeddings=True)
    assert output.volume_embedding.shape == (2, 32)
    assert output.slice_embeddings.shape == (2, 4, 32)
    assert output.patch_embeddings.shape == (2, 4, 6, 32)
    assert model(torch.rand(2, 4, 2, 16, 24)).patch_embeddings is None
    assert isinstance(model(torch.rand(1, 1, 2, 16, 16), return_dict=False), tuple)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("features", SLICE_FEATURES)
def test_a_slice_is_its_class_token_the_mean_of_its_patches_or_both(backbone_folder, features, aggregator):
    model = BrainFoundModel.from_backbone(backbone_folder, aggregator=aggregator, slice_features=features)
    plain = BrainFoundModel.from_backbone(backbone_folder)
    pixels, mask = torch.rand(2, 4, 3, 16, 24), torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.no_grad():
        output, expected = model(pixels, slice_mask=mask), plain(pixels, slice_mask=mask, output_patch_embeddings=True)
        again = model(slice_embeddings=output.slice_embeddings, slice_mask=mask)
    patches = expected.patch_embeddings.mean(dim=2)
    parts = {"cls": [expected.slice_embeddings], "patches": [patches]}
    parts["cls_and_patches"] = parts["cls"] + parts["patches"]
    torch.testing.assert_close(output.slice_embeddings, torch.cat(parts[features], dim=-1))
    assert output.volume_embedding.shape == (2, model.config.volume_embedding_size)
    torch.testing.assert_close(again.volume_embedding, output.volume_embedding)
    with pytest.raises(ModelError, match=f"expected .*{model.config.embedding_size}"):
        model(slice_embeddings=torch.rand(2, 4, 7))


@pytest.mark.parametrize("kind", [BrainFoundModel, *KINDS])
def test_bfloat16_forward(backbone_folder, kind):
    model = kind.from_backbone(backbone_folder, aggregator="transformer", decoder_width=8)
    pixels = torch.rand(1, 3, 3, 16, 16)
    exact = answer(model, pixels)
    rounded = answer(model.to(torch.bfloat16), pixels)
    assert rounded.isfinite().all()
    assert torch.nn.functional.cosine_similarity(rounded.float().flatten(), exact.flatten(), dim=0) > 0.9


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"pixel_values": torch.rand(3, 3, 16, 16)}, "five axes"),
        ({"pixel_values": torch.rand(1, 3, 4, 16, 16)}, "4 contrasts"),
        ({"pixel_values": torch.rand(1, 3, 3, 16, 17)}, "multiples of 8"),
        ({"pixel_values": torch.zeros(1, 3, 3, 16, 16, dtype=torch.int16)}, "int16"),
        ({"slice_mask": torch.ones(1, 4)}, "shape (1, 4), expected shape (1, 3)"),
        ({"contrast_mask": torch.ones(3)}, "shape (3,), expected shape (1, 3)"),
        ({"positions_mm": torch.zeros(3)}, "positions_mm"),
        ({"slice_mask": torch.zeros(1, 3)}, "no valid slice"),
        ({"contrast_mask": torch.zeros(1, 3)}, "no contrast"),
    ],
)
def test_inputs_that_do_not_fit_are_named(backbone_folder, arguments, told):
    model = BrainFoundModel.from_backbone(backbone_folder)
    with pytest.raises(ModelError) as error:
        model(**{"pixel_values": torch.rand(1, 3, 3, 16, 16), **arguments})
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("decoder", "unet", "linear, fpn, unetr"),
        ("aggregator", "median", "mean, max, mean_std, mean_max, mean_std_max, attention, transformer"),
        ("stem", "volume", "channels, per_contrast, slices"),
        ("contrasts", ["T1w", "T1w"], "different"),
        ("image_mean", [0.1, 0.2], "3 values"),
        ("decoder_layers", [0, 4], "from 1 to 3"),
        ("target_std", 0.0, "positive"),
    ],
)
def test_choices_that_do_not_exist_are_refused(backbone_folder, field, value, told):
    with pytest.raises(ModelError) as error:
        BrainFoundModel.from_backbone(backbone_folder, **{field: value})
    assert told in str(error.value)


def test_unknown_configuration_arguments_are_refused(backbone_folder):
    with pytest.raises(UsageError, match="Did you mean aggregator"):
        BrainFoundModel.from_backbone(backbone_folder, agregator="mean")


@pytest.mark.parametrize(
    ("depth", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (12, [3, 6, 9, 12]), (24, [6, 12, 18, 24])]
)
def test_decoded_blocks_are_evenly_spaced(depth, expected):
    config = BrainFoundConfig(backbone_config=Dinov2Config(num_hidden_layers=depth))
    assert config.resolved_decoder_layers == expected


def test_drop_path_is_set_on_request(backbone_folder):
    model = BrainFoundModel.from_backbone(backbone_folder, drop_path_rate=0.5)
    pixels = torch.rand(1, 8, 3, 16, 16)
    expected = answer(BrainFoundModel.from_backbone(backbone_folder), pixels)
    assert torch.equal(answer(model, pixels), expected)
    assert not torch.allclose(model.train()(pixels).volume_embedding, expected)
