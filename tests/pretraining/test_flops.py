"""The count of a step's operations against PyTorch's own counter, which watches the operations as they happen."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from brainfound.models import BrainFoundConfig, BrainFoundModel
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.objectives.masking import num_masked_per_crop
from brainfound.pretraining.objectives.registry import make_objective
from brainfound.pretraining.objectives.self_distillation import SelfDistillation
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.pretraining.slices import PretrainBatch
from brainfound.recipes import validate
from brainfound.training.randomness import StepKey

NUM_SLICES = 4
# Few prototypes: their scores are computed again in the backward pass, which is not the model's own work.
START = ("objective.head.prototypes=8", "init.source=start", "objective.drop_path=0")


def make_model() -> BrainFoundModel:
    backbone = {
        "model_type": "dinov2_with_registers",
        "num_register_tokens": 4,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 32,
    }
    return BrainFoundModel(BrainFoundConfig(backbone_config=backbone))


def count(objective) -> int:
    """The operations of a forward and a backward pass, as they happen."""
    generator = torch.Generator().manual_seed(0)
    batch = PretrainBatch(
        pixels=torch.randint(0, 256, (NUM_SLICES, 3, 32, 32), dtype=torch.uint8, generator=generator),
        present=torch.ones(NUM_SLICES, 3, dtype=torch.bool),
        sessions=torch.arange(NUM_SLICES),
    )
    for module in (objective.student, *objective.frozen_modules()):
        for part in module.modules():
            if isinstance(part, SliceEncoder):
                part.configure_blocks("matmul")  # plain products, whose backward pass is counted as what it is
    with FlopCounterMode(display=False) as counter:
        loss, _ = objective.loss(objective.student, batch, StepKey(0, 0, 0, 0))
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("objective.anchor_gram_weight=0", "objective.anchor_cls_weight=0"),
        ("objective.drop_path=0.5",),
        ("views.num_local=0",),
        ("objective.shared_head=true",),
        ("trained.part=last_blocks", "trained.blocks=1"),
        ("trained.part=lora", "trained.rank=4"),
        ("objective.kind=masked_autoencoder", "objective.mask_ratio=0.6"),
    ],
    ids=lambda changes: " ".join(changes) or "as it is",
)
def test_a_step_needs_what_is_counted_as_it_happens(recipe, changes):
    start = () if any("masked_autoencoder" in change for change in changes) else START
    content = settings(recipe, start, changes)
    objective = make_objective(content.objective, content.trained, make_model().encoder, content.views, 6, 0)
    expected = count(objective)
    assert objective.flops(NUM_SLICES).total == pytest.approx(expected, rel=0.02)


def settings(recipe, start, changes):
    if start:
        return recipe(*start, *changes)
    views = {"global_size": 32, "local_size": 16, "num_local": 2}
    decoder = {"width": 32, "heads": 2, "layers": 2}
    content = {"views": views, "objective": {"kind": "masked_autoencoder", "decoder": decoder}}
    return validate(PretrainRecipe, content, changes[1:])


def test_the_hybrid_needs_what_both_parts_need(recipe):
    content = recipe(*START).model_dump(mode="json")
    content["objective"] |= {"kind": "hybrid", "reconstruction": {"decoder": {"width": 32, "heads": 2, "layers": 1}}}
    content = validate(PretrainRecipe, content, ())
    objective = make_objective(content.objective, content.trained, make_model().encoder, content.views, 6, 0)
    expected = count(objective)
    found = objective.flops(NUM_SLICES)
    assert found.total == pytest.approx(expected, rel=0.02)
    assert found.student > SelfDistillation.flops(objective, NUM_SLICES).student


def test_prototypes_are_counted_once_forward_and_twice_backward(recipe):
    few, many = (recipe(f"objective.head.prototypes={k}", "init.source=start") for k in (8, 108))
    found = []
    for content in (few, many):
        objective = make_objective(content.objective, content.trained, make_model().encoder, content.views, 6, 0)
        assert isinstance(objective, SelfDistillation)
        found.append(objective.flops(NUM_SLICES))
    bottleneck = few.objective.head.bottleneck
    num_patches, num_crops, num_local = 16, 2 * NUM_SLICES, 2 * NUM_SLICES
    masked = sum(num_masked_per_crop(num_crops, num_patches, 0.5, (0.1, 0.5)))
    per_row = 2 * 100 * bottleneck
    assert found[1].teacher - found[0].teacher == (num_crops + masked) * per_row
    assert found[1].student - found[0].student == 3 * (num_crops + num_local + masked) * per_row
