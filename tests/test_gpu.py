"""The road on a GPU; skipped, saying so, where there is none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import brainfound
from tests.tiny_runs import log_lines

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_embeddings_agree_with_the_cpu(tiny_backbone):
    contrasts = ("T1w", "T2w", "FLAIR")
    pixels = torch.rand(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = brainfound.BrainFoundModel.from_backbone(tiny_backbone, contrasts=contrasts)
    with torch.no_grad():
        on_cpu = model(pixels).slice_embeddings
        on_gpu = model.cuda()(pixels.cuda()).slice_embeddings.cpu()
    torch.testing.assert_close(on_gpu, on_cpu, atol=2e-3, rtol=2e-3)


def test_pretraining_and_fine_tuning_in_bfloat16(small_store, tiny_backbone, tmp_path):
    views = ["views.global_size=32", "views.local_size=16", "views.num_local=2"]
    short = ["engine.steps=4", "engine.batch_size=8", "engine.log_every=1", "probe.every=4"]
    run = brainfound.pretrain(
        "pretrain-demo", small_store, tiny_backbone, tmp_path / "pretrain", overrides=[*views, *short], quiet=True
    )
    facts = json.loads((run / "run.json").read_text())
    assert facts["device"].startswith("cuda")
    lines = log_lines(run)
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    overrides = ["engine.steps=3", "engine.batch_size=2", "num_slices=4", "evaluate_every=0", "engine.precision=bf16"]
    tuned = brainfound.finetune(
        "finetune-regression",
        small_store,
        run / "export",
        "age_years",
        tmp_path / "age",
        overrides=overrides,
        quiet=True,
    )
    prediction = brainfound.load(tuned).predict_stack(small_store[0])
    assert np.isfinite(prediction.answer["value"])
