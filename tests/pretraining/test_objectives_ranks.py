"""The objectives beside plain self-distillation on two processes: data-parallel, and sharded."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.recipes import validate
from tests.ranks import launch
from tests.tiny_runs import log_lines

DECODER = {"width": 16, "layers": 1, "heads": 2}

# One pair of processes does all runs: starting processes takes longer than training.
SCRIPT = """
import hashlib, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from brainfound.pretraining import pretrain as module
from brainfound.training.distributed import to_full_tensor

folder, store = Path(sys.argv[1]), sys.argv[2]
tasks = []
make_task = module.make_task
def kept_task(*arguments, **named):
    tasks.append(make_task(*arguments, **named))
    return tasks[-1]
module.make_task = kept_task

for recipe in sorted(folder.glob("*.yaml")):
    module.pretrain(recipe, store, out=folder / recipe.stem, quiet=True)
    task = tasks[-1]
    digest = hashlib.sha256()
    for root in (task.model, *task.objective.frozen_modules()):
        for parameter in root.parameters():
            digest.update(to_full_tensor(parameter.detach()).numpy().tobytes())
    (folder / f"{recipe.stem}.rank{task.rank}.json").write_text(json.dumps(digest.hexdigest()))
"""


def recipe_of(recipe, kind: str, part: str, again: str, parallel: str) -> PretrainRecipe:
    content = recipe().model_dump(mode="json")
    if kind == "masked_autoencoder":
        content["objective"] = {"kind": kind, "decoder": DECODER}
    else:
        content["objective"] |= {"kind": kind, "reconstruction": {"decoder": DECODER}}
    content["trained"] = {"part": part, "rank": 2, "alpha": 2.0}
    # Passes of their own would draw another stochastic depth; sharded crops are always packed.
    overrides = ["engine.steps=3", "engine.crops=packed", "probe.every=0", "schedule.warmup_steps=0"]
    overrides += [f"engine.parallel={parallel}", f"engine.gradient_checkpointing={again}"]
    return validate(PretrainRecipe, content, overrides)


@pytest.mark.slow
def test_two_processes_train_one_student(store, recipe, tmp_path):
    """Both ranks hold the same weights; sharded or not, the losses and the export are the same."""
    cases = [("hybrid", "lora", "pointwise"), ("masked_autoencoder", "last_blocks", "true")]
    names = {}
    for kind, part, again in cases:
        for parallel in ("ddp", "fsdp"):
            names[kind, parallel] = name = f"{kind}-{part}-{parallel}"
            (tmp_path / f"{name}.yaml").write_text(recipe_of(recipe, kind, part, again, parallel).to_yaml())
    (tmp_path / "run.py").write_text(SCRIPT)
    launch(tmp_path / "run.py", tmp_path, store.path, timeout_s=400)
    for kind, *_ in cases:
        losses, exports = [], []
        for parallel in ("ddp", "fsdp"):
            name = names[kind, parallel]
            digests = [(tmp_path / f"{name}.rank{rank}.json").read_text() for rank in (0, 1)]
            assert digests[0] == digests[1], name
            log = log_lines(tmp_path / name)
            losses.append([line["loss_reconstruction"] for line in log])
            exports.append(load_file(tmp_path / name / "export" / "model.safetensors"))
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert len(set(losses[0])) == 3
        assert exports[0].keys() == exports[1].keys()
        assert not any("lora" in name for name in exports[0])
        for name, tensor in exports[0].items():
            torch.testing.assert_close(exports[1][name], tensor, atol=2e-3, rtol=1e-2)
