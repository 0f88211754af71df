"""Sharded training: the cut and its undoing in one process, and two processes against DDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from brainfound.errors import TrainingError
from brainfound.pretraining.objectives.registry import make_objective
from brainfound.training import distributed
from brainfound.training.engine import Engine
from brainfound.training.optim import make_optimizer, parameter_groups
from brainfound.training.process import make_accelerator
from tests.ranks import launch
from tests.tiny_runs import untimed_lines

LAST = "step-000006"

# One pair of processes does all runs: starting processes takes longer than training.
SCRIPT = """
import shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from brainfound.training import distributed
from brainfound.pretraining.pretrain import pretrain

recipe, store, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
cut = []
shard = distributed.shard
def counting_shard(trained, frozen, device, precision):
    shard(trained, frozen, device, precision)
    modules = (trained, *frozen)
    cut.append(len(frozen))
    for module in modules:
        for name, parameter in module.named_parameters():
            rows = parameter.shape[0]
            assert parameter.to_local().shape[0] in (rows // 2, rows - rows // 2, 0, 1), name
distributed.shard = counting_shard

def run(name, parallel, start=None):
    if start is not None and PartialState().is_main_process:
        shutil.copytree(folder / start, folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "step-000006")
        shutil.rmtree(folder / name / "export")
    if start is not None:
        PartialState().wait_for_everyone()
    overrides = [f"engine.parallel={parallel}"]
    pretrain(recipe, store, out=folder / name, quiet=True, resume=start is not None, overrides=overrides)

run("ddp", "ddp")
assert not cut
run("fsdp", "fsdp")
assert cut == [2], cut
run("ddp-then-fsdp", "fsdp", start="ddp")
run("fsdp-then-ddp", "ddp", start="fsdp")
run("fsdp-again", "fsdp", start="fsdp")

# The loss of one rank is not finite in one step: no rank moves anything in it.
from brainfound.pretraining.training_task import PretrainTask
loss, after_step = PretrainTask.loss, PretrainTask.after_step
states = []
def broken_loss(self, model, batch, step, micro_batch):
    value, parts = loss(self, model, batch, step, micro_batch)
    return (value * float("nan") if step == 3 and self.rank == 1 else value), parts
def remembering_after_step(self, step, taken):
    after_step(self, step, taken)
    state = {**self.model.state_dict(), **self.objective.state_dict()}
    states.append((float(taken), [tensor.to_local().clone() for tensor in state.values()]))
PretrainTask.loss, PretrainTask.after_step = broken_loss, remembering_after_step
run("broken-step", "fsdp")
assert [taken for taken, _ in states] == [1, 1, 1, 0, 1, 1]
same = [all(torch.equal(*pair) for pair in zip(states[i][1], states[i + 1][1])) for i in range(5)]
assert same == [False, False, True, False, False], same
"""


@pytest.fixture
def one_process():
    """A process group of this process alone: the cut is real, though each share is the whole."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def objective(model, recipe):
    content = recipe()
    return make_objective(content.objective, content.trained, model.encoder, content.views, 6, 0)


def shard(objective, precision: str = "no") -> None:
    distributed.shard(objective.student, objective.frozen_modules(), torch.device("cpu"), precision)


def state(objective) -> dict[str, torch.Tensor]:
    return {f"student.{name}": value for name, value in objective.student.state_dict().items()} | objective.state_dict()


def test_what_is_cut_and_gathered_is_what_there_was(objective, one_process):
    before = {name: value.clone() for name, value in state(objective).items()}
    shard(objective)
    after = state(objective)
    assert all(isinstance(value, DTensor) for value in after.values())
    gathered = distributed.gather(after)
    assert gathered.keys() == before.keys()
    assert all(torch.equal(gathered[name], before[name]) for name in before)
    again = distributed.shard_like(gathered, after)
    assert all(
        isinstance(value, DTensor) and value.placements == after[name].placements for name, value in again.items()
    )
    assert all(value.numel() == 0 for value in distributed.gather(after, keep=False).values())


def test_every_way_into_a_sharded_encoder_gives_what_it_gave(objective, one_process):
    """Before any pass through the student or the teacher as a whole, as a probe before the first step does."""
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        encoders = [objective.teacher.encoder, objective.anchor, objective.student.eval().encoder]
        expected = [encoder(pixels, layers=[1]) for encoder in encoders]
        groups = [encoder.transform([encoder.embed(pixels)])[0] for encoder in encoders]
        projection = objective.teacher.heads["dino"](expected[0].cls)
        shard(objective)
        for encoder, one, group in zip(encoders, expected, groups, strict=True):
            answer = encoder(pixels, layers=[1])
            assert torch.equal(answer.patches, one.patches)
            assert torch.equal(answer.hidden[1], one.hidden[1])
            assert torch.equal(encoder.transform([encoder.embed(pixels)])[0], group)
        again = objective.teacher.heads["dino"](expected[0].cls)
        assert torch.equal(again.unit, projection.unit)
        assert torch.equal(again.prototypes, projection.prototypes)
    # Nothing frozen stays gathered: the EMA would move what is thrown away.
    assert all(isinstance(p, DTensor) for module in objective.frozen_modules() for p in module.parameters())


@pytest.mark.parametrize("kept", ["all", "products", "inputs"])
def test_gradients_are_the_same_whatever_is_computed_again(objective, one_process, kept):
    """Recomputation must gather the weights again: between the passes they are given up."""
    pixels = torch.rand(2, 3, 32, 32)
    encoder = objective.student.eval().encoder
    encoder.configure_blocks(kept=kept)

    def loss() -> torch.Tensor:
        return encoder.transform([encoder.embed(pixels)])[0].square().mean()

    loss().backward()
    expected = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    encoder.zero_grad()
    shard(objective)
    found = loss()
    # The memory of the gathered weights is given to something else.
    spoilt = [torch.full_like(distributed.to_full_tensor(parameter), torch.nan) for parameter in encoder.parameters()]
    del spoilt
    found.backward()
    for name, parameter in encoder.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(distributed.to_full_tensor(parameter.grad), expected[name])


def test_matrices_of_blocks_are_gathered_in_bfloat16_and_the_rest_in_float32(objective, one_process):
    seen = {}
    block = objective.teacher.encoder.blocks[0]
    block.mlp.fc1.register_forward_pre_hook(lambda module, _: seen.update(matrix=module.weight.dtype))
    block.norm1.register_forward_pre_hook(lambda module, _: seen.update(norm=module.weight.dtype))
    shard(objective, "bf16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        patches = objective.teacher.encoder(torch.rand(2, 3, 32, 32)).patches
    assert seen == {"matrix": torch.bfloat16, "norm": torch.float32}
    assert patches.dtype == torch.float32
    assert {p.dtype for p in objective.teacher.parameters()} == {torch.float32}


def test_the_state_of_an_optimiser_is_cut_as_its_parameters(objective, recipe, one_process):
    shard(objective)

    def optimizer() -> torch.optim.Optimizer:
        optim = recipe().optim
        return make_optimizer(parameter_groups(objective.student.named_parameters(), 2, optim), optim)

    first, second = optimizer(), optimizer()
    for parameter in objective.student.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    saved = distributed.gather(first.state_dict())
    assert not any(isinstance(value, DTensor) for values in saved["state"].values() for value in values.values())
    second.load_state_dict(distributed.shard_optimizer_state(saved, second))
    for parameter in objective.student.parameters():
        one, other = first.state[parameter], second.state[parameter]
        assert isinstance(other["exp_avg"], DTensor)
        assert torch.equal(one["exp_avg"].full_tensor(), other["exp_avg"].full_tensor())
        assert one["step"] == other["step"]


def test_a_task_that_was_not_sharded_is_refused(tmp_path, recipe, monkeypatch):
    class Task:
        model = nn.Linear(2, 2)

    monkeypatch.setattr("brainfound.training.distributed.is_distributed", lambda: True)
    with pytest.raises(TrainingError, match=r"engine\.parallel"):
        Engine(Task(), recipe("engine.parallel=fsdp").engine, tmp_path, make_accelerator("no"))


def weights(run: Path, file: str) -> dict[str, torch.Tensor]:
    return load_file(run / file)


def require_close(first: Path, second: Path) -> None:
    for one, other in zip(untimed_lines(first), untimed_lines(second), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, str):
                assert other[name] == value
                continue
            # The score of a probe is a ratio of small differences between predictions.
            tolerance = 1e-3 if name.startswith("probe") else 1e-5
            assert other[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (one["step"], name)
    for file in (f"checkpoints/{LAST}/model.safetensors", f"checkpoints/{LAST}/task.safetensors"):
        torch.testing.assert_close(weights(first, file), weights(second, file), rtol=1e-5, atol=1e-5)
    one, other = (torch.load(run / "checkpoints" / LAST / "optimizer.pt", weights_only=True) for run in (first, second))
    assert one["param_groups"] == other["param_groups"]
    torch.testing.assert_close(one["state"], other["state"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_sharded_processes_train_as_two_that_are_not(store, recipe, tmp_path):
    """The same losses, teacher, checkpoints and export; and a run goes on the other way from its checkpoint."""
    # 36 rows over 2 ranks, and one-row tokens that only rank 0 can hold; micro-batches and an anchor take part.
    # Packed, as sharded training always is: apart, crops would draw another stochastic depth.
    changes = ("init.scratch.hidden_size=36", "engine.accumulation=2", "engine.crops=packed")
    (tmp_path / "tiny.yaml").write_text(anchored(recipe(*changes), tmp_path, store).to_yaml())
    (tmp_path / "run.py").write_text(SCRIPT)
    fault_handler = {"PYTHONFAULTHANDLER": "1"}  # where a rank that aborts stood
    launch(tmp_path / "run.py", tmp_path / "tiny.yaml", store.path, tmp_path, timeout_s=400, **fault_handler)

    ddp, fsdp = tmp_path / "ddp", tmp_path / "fsdp"
    require_close(ddp, fsdp)
    require_close(ddp, tmp_path / "ddp-then-fsdp")
    require_close(ddp, tmp_path / "fsdp-then-ddp")
    exported = [weights(run / "export", "model.safetensors") for run in (ddp, fsdp)]
    torch.testing.assert_close(exported[0], exported[1], rtol=1e-5, atol=1e-5)
    # On the same ranks a sharded run goes on exactly.
    assert untimed_lines(fsdp) == untimed_lines(tmp_path / "fsdp-again")
    for file in ("model.safetensors", "task.safetensors"):
        one, other = (weights(run / "checkpoints" / LAST, file) for run in (fsdp, tmp_path / "fsdp-again"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def anchored(content, folder: Path, store):
    """The recipe started from a model folder: new weights would turn the anchor off."""
    from brainfound.pretraining.starting_model import build_model

    model = build_model(content.init, store, content.views.global_size, 0)
    model.encoder.backbone.config.name_or_path = ""
    model.save_pretrained(folder / "start")
    return content.model_copy(update={"init": content.init.model_copy(update={"source": str(folder / "start")})})
