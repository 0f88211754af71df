"""The loop over a Hub ViT's blocks: packing, stochastic depth by subset, checkpointing, compiling."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from brainfound.models import BrainFoundConfig, BrainFoundModel
from brainfound.models.block_runner import kept_packing, sample_kept_tokens
from brainfound.models.kernels import Packing

LARGE, SMALL = (3, 3, 32, 32), (5, 3, 16, 16)


def encoder(model_type="dinov2", **fields):
    torch.manual_seed(0)
    backbone = {
        "model_type": model_type, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "patch_size": 8, "image_size": 32, **fields,
    }  # fmt: skip
    return BrainFoundModel(BrainFoundConfig(backbone_config=backbone)).eval().encoder


def pixels(shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("dinov2", {}), ("dinov2", {"use_swiglu_ffn": True}), ("dinov2_with_registers", {"num_register_tokens": 4})],
)
@pytest.mark.parametrize("kernel", ["sdpa", "matmul"])
def test_packed_crops_equal_crops_one_by_one(model_type, fields, kernel):
    vit = encoder(model_type, **fields)
    large, small = pixels(LARGE), pixels(SMALL, 2)
    plain = [copy.deepcopy(vit)(part) for part in (large, small)]
    vit.configure_blocks(kernel)
    for expected, tokens in zip(plain, vit.transform([vit.embed(large), vit.embed(small)]), strict=True):
        found = vit.encoding(tokens)
        torch.testing.assert_close(found.cls, expected.cls)
        torch.testing.assert_close(found.patches, expected.patches)


def gradients(vit, drop_path=0.0, **running):
    vit = copy.deepcopy(vit).train()
    vit.configure_blocks(**running)
    torch.manual_seed(3)
    groups = vit.transform([vit.embed(pixels(LARGE)), vit.embed(pixels(SMALL, 2))], drop_path)
    sum((group * group.detach().roll(1)).sum() for group in groups).backward()
    return {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("kernel", ["sdpa", "matmul"])
@pytest.mark.parametrize("kept", ["products", "inputs"])
def test_checkpointing_changes_no_gradient(drop_path, kernel, kept):
    vit = encoder()
    plain, checkpointed = gradients(vit, drop_path, kernel=kernel), gradients(vit, drop_path, kernel=kernel, kept=kept)
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        assert torch.equal(value, checkpointed[name]), name


@pytest.mark.parametrize("kept", ["products", "inputs"])
def test_two_passes_under_autocast_may_be_computed_again(kept):
    """Autocast remembers cast weights from the first pass; repeating the second one must not stumble over that."""

    def two_passes(**running):
        vit = encoder().train()
        vit.configure_blocks(**running)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts = [vit.transform([vit.embed(pixels(shape))])[0] for shape in (LARGE, SMALL)]
        sum(part.float().square().sum() for part in parts).backward()
        return {name: p.grad for name, p in vit.named_parameters() if p.grad is not None}

    plain, again = two_passes(), two_passes(kept=kept)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=0.05, atol=0.05 * value.abs().max().item(), msg=name)


def test_what_is_kept_is_what_was_requested():
    """Bytes that the backward pass holds on to, and how many matrix products it repeats."""
    vit = encoder(hidden_size=64).train()
    tokens = vit.embed(pixels(LARGE)).detach().requires_grad_()
    held, products = {}, {}
    for kept in ("all", "products", "inputs"):
        vit.configure_blocks(kept=kept)
        storages = {}

        def note(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            (output,) = vit.transform([tokens])
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
        held[kept], products[kept] = sum(storages.values()), counter.get_total_flops()
    assert held["inputs"] < held["all"] / 3
    assert products["products"] == products["all"] < products["inputs"]


def test_under_autocast_the_result_is_that_of_the_library():
    vit = encoder()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = copy.deepcopy(vit)(pixels(LARGE))
        (tokens,) = vit.transform([vit.embed(pixels(LARGE))])
    assert expected.cls.dtype == torch.float32
    assert torch.equal(vit.encoding(tokens).cls, expected.cls)


def test_stochastic_depth_trains_every_weight_and_rests_in_evaluation():
    vit = encoder()
    reached = gradients(vit, 0.9)
    # The mask token has no part here: nothing is masked.
    expected = {n for n, _ in vit.named_parameters() if "mask_token" not in n and "contrast_embedding" not in n}
    assert expected <= set(reached)
    tokens = vit.embed(pixels(LARGE))
    with torch.no_grad():
        assert torch.equal(vit.transform([tokens], 0.9)[0], vit.transform([tokens])[0])


def test_stochastic_depth_is_the_plain_loop_on_the_chosen_sequences():
    """One branch at a time: what was not chosen is untouched, what was chosen gets its branch scaled by n / kept."""
    vit = encoder().train()
    runner, block = vit._runner, vit.blocks[0]
    vit.transform([vit.embed(pixels(LARGE))])
    packing = Packing(((4, 3), (6, 2)))
    tokens = torch.randn(packing.num_tokens, 32)
    with torch.no_grad():
        for branch in (runner.attention, runner.mlp):
            torch.manual_seed(5)
            dropped = runner._residual(branch, block, tokens, packing, 0.5)
            torch.manual_seed(5)
            kept = sample_kept_tokens(packing, kept_packing(packing, 0.5), tokens.device)
            change = branch(block, tokens[None], packing, "sdpa")[0] * 2
            chosen = torch.zeros(len(tokens), dtype=torch.bool).index_fill(0, kept, True)
            torch.testing.assert_close(dropped[chosen], (tokens + change)[chosen])
            assert torch.equal(dropped[~chosen], tokens[~chosen])


def test_every_sequence_is_dropped_as_often_as_any_other():
    packing = Packing(((4, 3), (10, 2)))
    kept = kept_packing(packing, 0.3)
    assert kept.runs == ((3, 3), (7, 2))
    torch.manual_seed(0)
    counts = torch.zeros(packing.num_tokens)
    for _ in range(2000):
        index = sample_kept_tokens(packing, kept, torch.device("cpu"))
        assert len(index.unique()) == kept.num_tokens
        counts[index] += 1
    torch.testing.assert_close(counts[:12] / 2000, torch.full((12,), 0.75), atol=0.05, rtol=0)
    torch.testing.assert_close(counts[12:] / 2000, torch.full((20,), 0.7), atol=0.05, rtol=0)
    assert kept_packing(Packing(((1, 5),)), 0.9).runs == ((1, 5),)


@pytest.mark.slow
def test_compiled_branches_agree_and_blocks_share_their_graphs():
    import torch._dynamo.utils

    vit = encoder()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = gradients(vit), gradients(vit, compiled=True, kept="products")
    for name, value in plain.items():
        torch.testing.assert_close(value, compiled[name], atol=2e-5, rtol=1e-4)
    # Two branches, one packing: two graphs for three blocks.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
