"""Masked autoencoding: what is hidden, what is seen, and what is compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainfound.data.augmentation.transforms import to_device
from brainfound.errors import RecipeError
from brainfound.pretraining.objectives.masked_autoencoder import (
    MaskedAutoencoder,
    MaskedAutoencoderRecipe,
    encode_visible,
    patchify,
    reconstruct,
    reconstruction_loss,
)
from brainfound.pretraining.objectives.masking import num_hidden_patches, sample_hidden_patches
from brainfound.pretraining.objectives.networks import PixelDecoder, PixelDecoderRecipe, sincos_position_embedding
from brainfound.training.randomness import StepKey

KEY = StepKey(seed=0, step=0, micro_batch=0, rank=0)
DECODER = PixelDecoderRecipe(width=16, layers=1, heads=2)


def make(model, recipe, **changes) -> MaskedAutoencoder:
    content = MaskedAutoencoderRecipe(decoder=DECODER, **changes)
    return MaskedAutoencoder(model.encoder, content, recipe().views, num_steps=10, seed=0)


def predict(objective, views):
    return reconstruct(objective.student.encoder, objective.student.heads["decoder"], *views)


@pytest.fixture
def objective(model, recipe):
    return make(model, recipe)


def loss_by_hand(predicted, pixels, hidden, contrast_mask, side: int, normalise: bool) -> float:
    """The same with loops: crop by crop, contrast by contrast, patch by patch."""
    per_crop = []
    columns = pixels.shape[3] // side
    for crop in range(len(pixels)):
        errors = []
        for contrast in range(pixels.shape[1]):
            if not contrast_mask[crop, contrast]:
                continue
            for place, patch in enumerate(hidden[crop].tolist()):
                row, column = divmod(patch, columns)
                window = pixels[crop, contrast, row * side : (row + 1) * side, column * side : (column + 1) * side]
                target = window.double().numpy().ravel()
                if normalise:
                    target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
                answer = predicted[crop, place].double().numpy()[contrast * side**2 : (contrast + 1) * side**2]
                errors += ((answer - target) ** 2).tolist()
        per_crop.append(np.mean(errors))
    return float(np.mean(per_crop))


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_that_of_the_plain_formula(normalise):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 2, 12, 20, generator=generator)
    pixels[0, :, :4, :4] = 0  # air, whose variance is 0
    contrast_mask = torch.tensor([[True, True], [True, False], [False, True]])
    hidden = sample_hidden_patches(3, 15, 9, np.random.default_rng(0)).hidden
    predicted = torch.randn(3, hidden.shape[1], 2 * 16, generator=generator)
    patches = patchify(pixels, 4)
    target = torch.stack([patches[crop, hidden[crop]] for crop in range(3)])
    loss = reconstruction_loss(predicted, target, contrast_mask, normalise)
    assert loss.item() == pytest.approx(loss_by_hand(predicted, pixels, hidden, contrast_mask, 4, normalise), rel=1e-5)


def test_a_contrast_that_is_not_shown_is_no_target(objective, batch):
    """Neither its pixels nor what the decoder says of it enters the loss."""
    views = objective.patch_masking.views(batch, KEY)
    assert not views.contrast_mask.all()
    answer = predict(objective, views)
    loss = objective.patch_masking.loss(answer, views)
    absent = ~views.contrast_mask[:, :, None, None]
    other = views._replace(pixels=torch.where(absent, torch.rand_like(views.pixels), views.pixels))
    assert objective.patch_masking.loss(answer, other) == loss
    answer.patches.retain_grad()
    loss.backward()
    per_contrast = answer.patches.grad.unflatten(2, (views.pixels.shape[1], -1)).abs().sum(dim=(1, 3))
    assert torch.equal(per_contrast > 0, views.contrast_mask)


def test_exactly_the_requested_part_is_hidden_at_places_that_differ():
    kept, hidden = sample_hidden_patches(8, 16, num_hidden_patches(16, 0.75), np.random.default_rng(0))
    assert kept.shape == (8, 4)
    assert hidden.shape == (8, 12)
    for row in range(8):
        assert sorted(kept[row].tolist() + hidden[row].tolist()) == list(range(16))
    assert len({tuple(row.tolist()) for row in kept}) > 1
    assert (num_hidden_patches(4, 0.99), num_hidden_patches(4, 0.01)) == (3, 1)


def test_the_encoder_sees_the_visible_tokens_only(objective, batch, monkeypatch):
    encoder = objective.student.encoder
    lengths = []
    transform = type(encoder).transform

    def counted(self, groups, *rest, **named):
        lengths.extend(group.shape[1] for group in groups)
        return transform(self, groups, *rest, **named)

    monkeypatch.setattr(type(encoder), "transform", counted)
    views = objective.patch_masking.views(batch, KEY)
    answer = predict(objective, views)
    assert lengths == [encoder.num_prefix_tokens + 4]  # a quarter of the 4 × 4 patches
    # What lies under hidden patches makes no difference.
    hidden = torch.zeros(len(views.pixels), 16, dtype=torch.bool).scatter(1, views.hidden, True)
    windows = hidden.unflatten(1, (4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = views._replace(pixels=torch.where(windows, torch.rand_like(views.pixels), views.pixels))
    again = predict(objective, other)
    torch.testing.assert_close(again.patches, answer.patches)
    seen = views._replace(pixels=torch.where(windows, views.pixels, torch.rand_like(views.pixels)))
    assert not torch.allclose(predict(objective, seen).patches, answer.patches)


def test_nothing_hidden_is_the_ordinary_forward_pass(model):
    """With every patch kept, in any order, the visible tokens are those of the encoder itself."""
    pixels, mask = torch.rand(2, 3, 32, 32), torch.tensor([[True] * 3, [True, False, True]])
    kept = torch.stack([torch.randperm(16), torch.randperm(16)])
    seen = {}

    class Tap(torch.nn.Module):
        def forward(self, cls, visible, kept, hidden):
            seen.update(cls=cls, visible=visible)
            return visible

    with torch.no_grad():
        reconstruct(model.encoder, Tap(), pixels, mask, kept, kept[:, :1])
        whole = model.encoder(pixels, mask)
    torch.testing.assert_close(seen["cls"], whole.cls, atol=1e-5, rtol=1e-5)
    in_order = torch.stack([whole.patches[row, kept[row]] for row in range(2)])
    torch.testing.assert_close(seen["visible"], in_order, atol=1e-5, rtol=1e-5)


def test_decoder_knows_where_each_patch_is():
    """Hidden patches are told apart by their position alone; asked in another order, the answers follow."""
    decoder = PixelDecoder(8, (3, 4), 5, DECODER)
    decoder.initialise(torch.Generator().manual_seed(0))
    kept = torch.tensor([[1, 4, 7]])
    hidden = torch.tensor([[0, 2, 3, 11]])
    cls, visible = torch.randn(1, 8), torch.randn(1, 3, 8)
    answers = decoder(cls, visible, kept, hidden)
    assert not torch.allclose(answers[0, 0], answers[0, 1])
    torch.testing.assert_close(decoder(cls, visible, kept, hidden.flip(1)), answers.flip(1))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(decoder(cls, visible[:, order], kept[:, order], hidden), answers)


def test_sine_cosine_positions_are_those_of_the_formula():
    positions = sincos_position_embedding((2, 3), 8)
    assert positions.shape == (6, 8)
    row, column = 1, 2
    slow = 1e-2  # 10,000 ** -(1 / 2)
    expected = [
        *(np.sin(row * f) for f in (1, slow)), *(np.cos(row * f) for f in (1, slow)),
        *(np.sin(column * f) for f in (1, slow)), *(np.cos(column * f) for f in (1, slow)),
    ]  # fmt: skip
    np.testing.assert_allclose(positions[row * 3 + column].numpy(), expected, atol=1e-6)


def test_every_parameter_that_is_trained_gets_a_gradient(objective, batch):
    loss, metrics = objective.loss(objective.student, batch, KEY)
    loss.backward()
    trained = dict(objective.student.named_parameters())
    assert [name for name, p in trained.items() if p.requires_grad and p.grad is None] == []
    assert [name for name, p in trained.items() if not p.requires_grad] == ["encoder.backbone.embeddings.mask_token"]
    parts = [metrics[f"loss_{name}"] for name in ("reconstruction", "anchor_gram", "anchor_cls")]
    torch.testing.assert_close(loss.detach(), parts[0] + 1.0 * parts[1] + 0.1 * parts[2])
    assert not any(p.requires_grad or p.grad is not None for p in objective.anchor.parameters())


def test_the_anchor_is_silent_at_the_start_and_speaks_when_the_student_moves(objective, batch):
    _, metrics = objective.loss(objective.student, batch, KEY)
    assert metrics["loss_anchor_gram"] < 1e-10
    assert metrics["loss_anchor_cls"].abs() < 1e-5
    with torch.no_grad():
        for parameter in objective.student.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    _, metrics = objective.loss(objective.student, batch, KEY)
    assert metrics["loss_anchor_gram"] > 1e-3
    assert objective.health_metrics()["gram_distance"] == pytest.approx(metrics["loss_anchor_gram"].item())


def test_the_anchor_sees_the_same_patches_as_the_student(objective, batch):
    """By loops: the Gram matrices and cosines of the visible patches of both."""
    with torch.no_grad():
        for parameter in objective.student.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
        views = objective.patch_masking.views(batch, KEY)
        gram, cosine = [], []
        for row in range(len(views.pixels)):
            one = (views.pixels[row : row + 1], views.contrast_mask[row : row + 1], views.kept[row : row + 1])
            both = [encode_visible(encoder, *one) for encoder in (objective.student.encoder, objective.anchor)]
            units = [(patches[0] / patches[0].norm(dim=1, keepdim=True)).double().numpy() for _, patches in both]
            gram.append(((units[0] @ units[0].T - units[1] @ units[1].T) ** 2).mean())
            cosine.append(torch.cosine_similarity(both[0][0], both[1][0]).item())
    _, metrics = objective.loss(objective.student, batch, KEY)
    assert metrics["loss_anchor_gram"].item() == pytest.approx(np.mean(gram), rel=1e-4)
    assert metrics["loss_anchor_cls"].item() == pytest.approx(1 - np.mean(cosine), rel=1e-4)


def test_a_step_is_a_function_of_its_key(objective, batch):
    def loss(*key: int) -> float:
        return objective.loss(objective.student, batch, StepKey(*key))[0].item()

    assert loss(0, 1, 0, 0) == loss(0, 1, 0, 0)
    assert len({loss(*key) for key in ((0, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1), (1, 1, 0, 0))}) == 5


def test_the_decoder_is_a_function_of_the_seed(model, recipe):
    torch.manual_seed(1)
    one = make(model, recipe).student.heads["decoder"]
    torch.manual_seed(2)
    other = make(model, recipe).student.heads["decoder"]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_gauges_show_a_constant_encoder(objective, batch):
    assert objective.health_metrics() == {}
    objective.loss(objective.student, batch, KEY)
    healthy = objective.health_metrics()
    assert healthy["effective_rank"] > 2
    assert not {"ln_k", "teacher_entropy"} & healthy.keys()
    with torch.no_grad():
        objective.student.encoder.backbone.layernorm.weight.zero_()
        objective.student.encoder.backbone.layernorm.bias.fill_(1)
    objective.loss(objective.student, batch, KEY)
    constant = objective.health_metrics()
    assert constant["effective_rank"] == 0
    assert constant["mean_cosine"] == pytest.approx(1)


def test_it_learns(model, recipe, batch):
    objective = make(model, recipe)
    optimizer = torch.optim.AdamW(objective.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss, _ = objective.loss(objective.student, batch, KEY)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_state_next_to_the_student_is_the_anchor(objective, model, recipe):
    anchored = objective.state_dict()
    assert {name.removeprefix("anchor.") for name in anchored} == set(model.encoder.state_dict())
    with torch.no_grad():
        for parameter in objective.anchor.parameters():
            parameter.add_(1)
    fresh = make(model, recipe)
    fresh.load_state_dict({name: tensor.clone() for name, tensor in objective.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(fresh.anchor.parameters(), objective.anchor.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({})
    free = make(model, recipe, anchor_gram_weight=0, anchor_cls_weight=0)
    assert free.state_dict() == {}
    assert free.frozen_modules() == []
    with pytest.raises(KeyError, match="anchor"):
        free.load_state_dict(anchored)


def test_a_crop_that_does_not_fit_the_patches_is_refused(model, recipe):
    for size in (30, 8):
        views = recipe(f"views.global_size={size}").views
        with pytest.raises(RecipeError, match=r"views\.global_size"):
            MaskedAutoencoder(model.encoder, MaskedAutoencoderRecipe(decoder=DECODER), views, num_steps=10, seed=0)


def test_what_is_hidden_is_copied_as_everything_small_is(objective, batch, monkeypatch):
    """From pinned memory: a copy from other memory makes the host wait for the GPU, whatever it is asked."""
    copied = []

    def recording(tensor, device):
        copied.append(tensor.clone())
        return to_device(tensor, device)

    monkeypatch.setattr("brainfound.pretraining.objectives.masked_autoencoder.to_device", recording)
    views = objective.patch_masking.views(batch, KEY)
    assert len(copied) == 2
    assert all(torch.equal(one, other) for one, other in zip(copied, (views.kept, views.hidden), strict=True))
