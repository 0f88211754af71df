"""Packed attention: sequences of one packing never see each other, and every kernel that works here agrees."""

import itertools
import sys
import types

import pytest
import torch
from transformers import AttentionInterface, Dinov2Config, Dinov2Model

from brainfound.errors import ModelError
from brainfound.models import kernels as attention
from brainfound.models.kernels import Packing, available_kernels, choose_kernel, packed_attention

PACKING = Packing(((2, 7), (3, 4), (1, 9)))
CPU = torch.device("cpu")


def random_inputs(packing=PACKING, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, packing.num_tokens, 8, generator=generator, dtype=dtype)


def one_by_one(inputs, packing, scaling):
    """The definition, sequence by sequence."""
    start, outputs = 0, []
    for length in packing.lengths():
        query, key, value = inputs[:, :, start : start + length]
        weights = torch.softmax(torch.einsum("hqd,hkd->hqk", query, key) * scaling, dim=-1)
        outputs.append(torch.einsum("hqk,hkd->qhd", weights, value))
        start += length
    return torch.cat(outputs)


@pytest.mark.parametrize("kernel", ["sdpa", "matmul"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_values_and_gradients_are_those_of_the_definition(kernel, scaling):
    inputs, reference = random_inputs().requires_grad_(), random_inputs().requires_grad_()
    output = packed_attention(*inputs.unbind(0), PACKING, kernel, scaling)
    expected = one_by_one(reference, PACKING, 8**-0.5 if scaling is None else scaling)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    for result in (output, expected):
        (result * torch.arange(result.numel()).view_as(result)).sum().backward()
    torch.testing.assert_close(inputs.grad, reference.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", ["sdpa", "matmul"])
def test_a_sequence_does_not_see_its_neighbours(kernel):
    inputs = random_inputs()
    before = packed_attention(*inputs, PACKING, kernel)
    inputs[:, :, 7:] += 100  # everything but the first sequence
    after = packed_attention(*inputs, PACKING, kernel)
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7:], after[7:])


@pytest.mark.parametrize("piece_bytes", [1, 2 * 7 * 7 * 8, 2**20], ids=["one by one", "a sequence of 7", "all"])
def test_pieces_of_any_size_give_the_same(monkeypatch, piece_bytes):
    monkeypatch.setitem(attention._PIECE_BYTES, "cpu", piece_bytes)
    inputs = random_inputs().requires_grad_()
    output = packed_attention(*inputs.unbind(0), PACKING, "matmul")
    torch.testing.assert_close(output, one_by_one(inputs, PACKING, 8**-0.5), rtol=0, atol=1e-12)
    small = [tensor.clone().requires_grad_() for tensor in random_inputs(Packing(((3, 2),))).detach().unbind(0)]
    assert torch.autograd.gradcheck(lambda *given: packed_attention(*given, Packing(((3, 2),)), "matmul", 0.4), small)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_kernel_that_rounds_otherwise_is_no_fault(dtype):
    """The reference is not rounded, and differences are relative to it."""
    found = available_kernels(CPU, dtype, 64)
    assert found["sdpa"] == found["matmul"] == ""


def test_attention_in_pieces_is_one_operation_that_is_not_computed_again(monkeypatch):
    """Its parts would be kept one by one, scores included."""
    from brainfound.models.block_runner import checkpoint_except_matmuls

    calls = []
    made = attention._probabilities
    monkeypatch.setattr(attention, "_probabilities", lambda *a: calls.append(1) or made(*a))
    inputs = random_inputs().requires_grad_()
    packing = Packing(((5, 7),))
    output = checkpoint_except_matmuls(
        lambda given: packed_attention(*(given * 2).unbind(0), packing, "matmul"), inputs
    )
    assert len(calls) == 1
    output.sum().backward()
    assert len(calls) == 2, "once more for the gradient, and not a third time for the output"


def test_a_packing_counts_its_tokens():
    assert PACKING.num_tokens == 14 + 12 + 9
    assert PACKING.longest == 9
    assert PACKING.cumulative_lengths(CPU).tolist() == [0, 7, 14, 18, 22, 26, 35]


def test_kernels_are_tried_not_trusted(monkeypatch):
    def wrong(query, key, value, packing, scaling):
        return attention._KERNELS["sdpa"](query, key, value, packing, scaling) * 1.5

    def broken(query, key, value, packing, scaling):
        raise NotImplementedError("no operator for this device\nand a long explanation")

    monkeypatch.setitem(attention._KERNELS, "varlen", wrong)
    monkeypatch.setitem(attention._KERNELS, "xformers", broken)
    found = available_kernels(CPU, torch.float32)
    assert found["sdpa"] == found["matmul"] == ""
    assert "differs from the reference" in found["varlen"]
    assert found["xformers"] == "no operator for this device"
    kernel, report = choose_kernel(PACKING, 2, 8, CPU, torch.float32, repeats=1)
    assert kernel in ("sdpa", "matmul")
    assert report["sdpa"] > 0
    assert report["xformers"] == found["xformers"]


def test_a_kernel_that_fails_at_the_lengths_of_the_run_is_not_chosen(monkeypatch):
    def only_short(query, key, value, packing, scaling):
        if packing.longest > 5:
            raise RuntimeError("out of memory")
        return attention._per_run(attention._sdpa)(query, key, value, packing, scaling)

    monkeypatch.setitem(attention._KERNELS, "varlen", only_short)
    assert available_kernels(CPU, torch.float32)["varlen"] == ""
    kernel, report = choose_kernel(PACKING, 2, 8, CPU, torch.float32, repeats=1)
    assert kernel != "varlen"
    assert report["varlen"] == "out of memory"


def test_the_fastest_kernel_is_chosen(monkeypatch):
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(attention, "time", clock)

    def slow(query, key, value, packing, scaling):
        clock.now += 0.05
        return attention._per_run(attention._sdpa)(query, key, value, packing, scaling)

    for name in ("sdpa", "varlen", "xformers"):
        monkeypatch.setitem(attention._KERNELS, name, slow)
    assert choose_kernel(PACKING, 2, 8, CPU, torch.float32, repeats=1)[0] == "matmul"


def attend_within(query, key, value, ends, scale):
    """The definition for tokens ``(T, H, d)`` of sequences that end at ``ends``."""
    outputs = []
    for start, end in itertools.pairwise(ends):
        of_sequence = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        outputs.append(torch.nn.functional.scaled_dot_product_attention(*of_sequence, scale=scale)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("kernel", ["varlen", "xformers"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_kernels_of_gpus_get_the_packing_that_they_want(monkeypatch, kernel, scaling):
    """With stand-ins that do on a CPU what the documentation of the two libraries says."""

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale):
        assert cu_seq_q.dtype == torch.int32
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert max_q == max_k == 9
        assert query.is_contiguous()
        return attend_within(query, key, value, cu_seq_q.tolist(), scale)

    def memory_efficient_attention(query, key, value, attn_bias, scale):
        assert query.shape[0] == 1, "all sequences lie in one"
        ends = [0, *itertools.accumulate(attn_bias)]
        return attend_within(query[0], key[0], value[0], ends, scale)[None]

    varlen, ops, fmha = (types.ModuleType(name) for name in ("varlen", "ops", "fmha"))
    varlen.varlen_attn, ops.memory_efficient_attention = varlen_attn, memory_efficient_attention
    fmha.BlockDiagonalMask = types.SimpleNamespace(from_seqlens=list)
    for name, module in {
        "torch.nn.attention.varlen": varlen,
        "xformers": types.ModuleType("xformers"),
        "xformers.ops": ops,
        "xformers.ops.fmha": fmha,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    attention._block_diagonal_mask.cache_clear()
    found = packed_attention(*random_inputs(), PACKING, kernel, scaling)
    attention._block_diagonal_mask.cache_clear()
    expected = one_by_one(random_inputs(), PACKING, 8**-0.5 if scaling is None else scaling)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["varlen", "xformers"])
def test_kernels_of_gpus_agree_with_sdpa(kernel):
    """At the lengths of pretraining, in bfloat16; values and gradients."""
    if kernel == "xformers":
        pytest.importorskip("xformers")
    device, packing = torch.device("cuda"), Packing(((4, 257), (16, 50)))
    assert available_kernels(device, torch.bfloat16)[kernel] == ""
    inputs = torch.randn(3, 6, packing.num_tokens, 64, device=device)
    expected = attention._with_gradients("sdpa", inputs, packing)
    found = attention._with_gradients(kernel, inputs.bfloat16(), packing)
    for wanted, got in zip(expected, found, strict=True):
        assert (wanted - got.float()).abs().max() <= 0.02 * wanted.abs().max()


def tiny_vit(implementation):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32,
        attn_implementation=implementation,
    )  # fmt: skip
    return Dinov2Model(config).eval()


def test_xformers_is_registered_with_the_library_and_says_why_it_cannot_run(monkeypatch):
    assert "xformers" in AttentionInterface().valid_keys()
    attention._xformers_fault.cache_clear()
    monkeypatch.setattr(attention, "_find_kernel_failure", lambda *arguments: "no operator for a CPU")
    with pytest.raises(ModelError, match=r"no operator for a CPU.*attn_implementation"):
        tiny_vit("xformers")(torch.rand(1, 3, 32, 32))
    attention._xformers_fault.cache_clear()


def test_xformers_gets_what_the_library_hands_over(monkeypatch):
    """With a stand-in for the missing package, a model with attn_implementation="xformers" equals one with SDPA."""

    def stand_in(query, key, value, attn_bias=None, scale=None):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)

    module = types.ModuleType("xformers.ops")
    module.memory_efficient_attention = stand_in
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    monkeypatch.setattr(attention, "_xformers_fault", lambda *arguments: "")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = tiny_vit("sdpa")(pixels).last_hidden_state
        torch.testing.assert_close(tiny_vit("xformers")(pixels).last_hidden_state, expected)
