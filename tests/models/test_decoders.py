"""Decoders: any patch and grid, what must not be seen, and what the image skips are for."""

import pytest
import torch

from brainfound.models import BrainFoundConfig, BrainFoundForSegmentation
from brainfound.models.decoders import DECODERS, doublings_of_tokens, doublings_to_pixels

NAN = float("nan")


def build(folder, decoder="unetr", contrasts=("T1w", "T2w", "FLAIR"), **config):
    """A segmentation whose slice mixing, if there is one, does something."""
    config = {"decoder_width": 8, "num_labels": 3, **config}
    model = BrainFoundForSegmentation.from_backbone(folder, contrasts, decoder=decoder, **config)
    if model.decoder.slice_mixing is not None:
        with torch.no_grad():
            model.decoder.slice_mixing.weight.normal_()
    return model


def scores(model, *args, **kwargs):
    with torch.no_grad():
        return model.eval()(*args, **kwargs).logits


@pytest.mark.parametrize(("patch_size", "num_layers"), [(8, 4), (14, 4), (16, 4), (14, 1), (4, 6), (2, 3), (12, 2)])
@pytest.mark.parametrize("grid", [(2, 3), (1, 1)])
def test_unetr_reaches_every_pixel_of_any_grid(write_backbone, tmp_path, patch_size, num_layers, grid):
    folder = write_backbone(tmp_path, num_layers=6, patch_size=patch_size, image_size=3 * patch_size)
    model = build(folder, decoder_layers=list(range(1, num_layers + 1)))
    height, width = (patch_size * side for side in grid)
    output = model(torch.rand(2, 2, 3, height, width), labels=torch.randint(0, 3, (2, 2, height, width)))
    assert output.logits.shape == (2, 2, 3, height, width)
    assert output.logits.isfinite().all()
    output.loss.backward()
    assert [name for name, parameter in model.decoder.named_parameters() if parameter.grad is None] == []


def test_tokens_are_met_before_the_pixels_and_in_order():
    for patch_size in (2, 4, 8, 12, 14, 16, 32):
        last = doublings_to_pixels(patch_size)
        assert 2 ** (last - 1) < patch_size <= 2**last
        for num_layers in range(1, 7):
            doublings = doublings_of_tokens(num_layers, patch_size)
            assert doublings == sorted(doublings, reverse=True)
            assert doublings[-1] == 0
            assert max(doublings) < last


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_an_absent_contrast_holds_changes_no_bit(backbone_folder, decoder):
    model = build(backbone_folder, decoder)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    pixels = torch.rand(2, 3, 3, 16, 24)
    plain = scores(model, pixels, mask)
    for content in (0.0, 7.0, NAN, float("inf")):
        filled = torch.where(mask[:, None, :, None, None], pixels, torch.full_like(pixels, content))
        assert torch.equal(scores(model, filled, mask), plain)
    assert not torch.equal(scores(model, pixels, torch.tensor([[True] * 3, [False, True, False]])), plain)


@pytest.mark.parametrize("decoder", DECODERS)
def test_absent_contrasts_get_no_gradient_and_give_no_nan(backbone_folder, decoder):
    model = build(backbone_folder, decoder)
    pixels = torch.rand(1, 2, 3, 16, 16)
    pixels[:, :, 1] = NAN
    model(
        pixels, torch.tensor([[True, False, True]]), labels=torch.zeros(1, 2, 16, 16, dtype=torch.long)
    ).loss.backward()
    for name, parameter in model.decoder.named_parameters():
        assert parameter.grad.isfinite().all(), name
    if decoder == "unetr":
        first = model.decoder.image[0].weight.grad
        assert not first[:, 1].any()
        assert first[:, [0, 2]].abs().sum(dim=(0, 2, 3)).all()


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_padding_changes_no_bit(backbone_folder, decoder, mixing):
    model = build(backbone_folder, decoder, decoder_slice_mixing=mixing, slice_chunk=3)
    pixels, valid = torch.rand(2, 4, 3, 16, 16), torch.tensor([[True] * 4, [True, False, True, False]])
    contrasts = torch.tensor([[True, True, False], [False, True, True]])
    plain = scores(model, pixels, contrasts, valid)
    longer = torch.cat([pixels, torch.zeros(2, 3, 3, 16, 16)], dim=1)
    mask = torch.cat([valid, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    for content in (0.5, NAN):
        filled = torch.where(mask[:, :, None, None, None], longer, torch.full_like(longer, content))
        found = scores(model, filled, contrasts, mask)
        assert torch.equal(found[mask], plain[valid])
        assert not found[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_each_slice_goes_with_its_own_image_and_contrasts(backbone_folder, dtype):
    """Volumes of different lengths and contrasts, together and alone."""
    model = build(backbone_folder, slice_chunk=2)
    pixels = (
        torch.rand(2, 3, 3, 16, 16) if dtype == torch.float32 else torch.randint(0, 256, (2, 3, 3, 16, 16)).to(dtype)
    )
    valid, contrasts = torch.tensor([[True, False, True], [True] * 3]), torch.tensor([[True, False, False], [True] * 3])
    together = scores(model, pixels, contrasts, valid)
    for row in range(2):
        alone = scores(model, pixels[[row]][:, valid[row]], contrasts[[row]])
        torch.testing.assert_close(together[[row]][:, valid[row]], alone)


def test_the_image_is_shown_as_the_stem_shows_it(backbone_folder):
    """Normalised, absent contrasts 0, the others rescaled by C / present; and never more than a chunk at once."""
    model = build(backbone_folder, slice_chunk=2, image_mean=[0.1, 0.2, 0.3], image_std=0.5)
    seen = []
    model.decoder.image.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = torch.randint(0, 256, (1, 3, 3, 16, 16), dtype=torch.uint8)
    scores(model, pixels, torch.tensor([[True, False, True]]))
    assert [len(images) for images in seen] == [2, 1]
    expected = (pixels[0].double() / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5 * 1.5
    expected[:, 1] = 0
    torch.testing.assert_close(torch.cat(seen), expected.float(), atol=1e-6, rtol=1e-5)


def test_every_pixel_of_the_image_reaches_its_own_score(backbone_folder):
    """Through the skip alone: the tokens are constants here."""
    model = build(backbone_folder)
    decoder = model.decoder
    fused = torch.rand(1, 8 * len(decoder.layers), 2, 2)
    pixels = torch.rand(1, 3, 16, 16, requires_grad=True)
    decoder(fused, [1], (16, 16), pixels)[0, 1, 5, 7].backward()
    reach = pixels.grad[0].abs().sum(dim=0)
    assert reach[5, 7] > 10 * reach[15, 0]
    pixels.grad = None
    (decoder(fused, [1], (16, 16), pixels) ** 2).sum().backward()
    assert (pixels.grad.abs() > 0).all()


def test_unetr_learns_single_pixels(backbone_folder):
    """Labels that differ from pixel to pixel, which no token can say: the pyramid stays near chance, unetr does not."""
    correct = {}
    pixels = torch.rand(1, 2, 3, 16, 16)
    labels = (pixels[:, :, 0] > 0.5).long()
    for decoder in ("fpn", "unetr"):
        torch.manual_seed(0)
        model = build(backbone_folder, decoder, num_labels=2, decoder_width=16).train()
        optimizer = torch.optim.Adam(model.decoder.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model(pixels, labels=labels).loss.backward()
            optimizer.step()
        correct[decoder] = (scores(model, pixels).argmax(dim=2) == labels).float().mean().item()
    assert correct["unetr"] > 0.95
    assert correct["unetr"] > correct["fpn"] + 0.1


def test_unetr_in_bfloat16(backbone_folder):
    model = build(backbone_folder)
    pixels = torch.rand(1, 2, 3, 16, 16)
    exact = scores(model, pixels)
    rounded = scores(model.to(torch.bfloat16), pixels).float()
    assert torch.nn.functional.cosine_similarity(rounded.flatten(), exact.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_saved_decoder_comes_back_the_same(backbone_folder, tmp_path, decoder):
    model = build(backbone_folder, decoder, decoder_slice_mixing=True)
    pixels = torch.rand(1, 3, 3, 16, 16)
    model.save_pretrained(tmp_path)
    assert torch.equal(scores(BrainFoundForSegmentation.from_pretrained(tmp_path), pixels), scores(model, pixels))


def test_fields_that_a_configuration_does_not_name_have_their_defaults():
    old = BrainFoundConfig().to_dict()
    for field in (
        "overlapping_labels",
        "segmentation_loss",
        "tversky_alpha",
        "tversky_beta",
        "tversky_gamma",
        "focal_gamma",
    ):
        del old[field]
    config = BrainFoundConfig.from_dict(old)
    assert (config.decoder, config.overlapping_labels, config.segmentation_loss) == ("fpn", False, "dice_cross_entropy")
