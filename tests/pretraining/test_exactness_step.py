"""Whole steps of pretraining against an independent reference.

`pretrain` runs as it is shipped: store, loader, objective, engine, optimiser, teacher, log. The
reference gets the starting weights and the views and masks of each micro-batch, and computes the rest
on its own in double precision: the forward pass through the library's own ViT, teacher,
targets, losses by the published formulas, gradients by autograd, clipping, AdamW and the moving average
by hand, learning rates by closed formulas. It is never set back to the engine's weights, so that an
error in one step would show in all that follow.

Compared are the losses, the gradients that the optimiser sees, the weights and the teacher after
every step, over the step at which the head warm-up ends.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, PreTrainedModel

from brainfound.pretraining.objectives import self_distillation
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.training_task import PretrainTask
from tests.tiny_runs import log_lines

SETTINGS = {
    "seed": 3,
    "views.num_local": 3,
    "objective.drop_path": 0.0,
    "objective.dino_weight": 0.9,
    "objective.ibot_weight": 1.1,
    "objective.koleo_weight": 0.1,
    "objective.anchor_gram_weight": 1.3,
    "objective.anchor_cls_weight": 0.2,
    "objective.teacher_temperature": [0.05, 0.08],
    "objective.teacher_temperature_warmup_steps": 3,
    "objective.momentum": [0.8, 1.0],
    "optim.lr": 8e-3,
    "optim.layer_decay": 0.7,
    "optim.weight_decay": 0.2,
    "optim.beta1": 0.8,
    "optim.beta2": 0.95,
    "schedule.warmup_steps": 2,
    "schedule.head_warmup_steps": 1,
    "schedule.freeze_last_layer_steps": 2,
    "engine.steps": 4,
    "probe.every": 0,
}
STEPS, BATCH, LAYERS = SETTINGS["engine.steps"], 8, 3
FLOAT32 = 1e-5
CLIPPED = ("backbone", "dino_head", "ibot_head")
PARTS = ("dino_global", "dino_local", "ibot", "koleo", "anchor_gram", "anchor_cls")


@dataclass
class MicroBatch:
    """What the comparison takes as given."""

    views: object
    mask: Tensor
    sessions: Tensor


@dataclass
class Recording:
    """What the engine was given and what it did, step by step."""

    student: dict[str, Tensor] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    anchor: dict[str, Tensor] = field(default_factory=dict)
    micro_batches: list[MicroBatch] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    teachers: list[dict[str, Tensor]] = field(default_factory=list)
    lines: list[dict] = field(default_factory=list)


def doubled(named) -> dict[str, Tensor]:
    return {name: tensor.detach().double().clone() for name, tensor in named}


def stir(module: torch.nn.Module, seed: int) -> None:
    """Move every weight a little: no bias, token or layer scale is at its special starting value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)


def record(monkeypatch, dtype: torch.dtype) -> Recording:
    """Listen to the next run; student, teacher and anchor start apart from each other, all in `dtype`."""
    recording = Recording()
    make_optimizer = PretrainTask.make_optimizer
    pending: dict = {}

    def listening(task):
        objective = task.objective
        stir(objective.student, 1)
        stir(objective.teacher, 2)
        for module in (objective.student, objective.teacher, objective.anchor):
            module.to(dtype)
        recording.student = doubled(objective.student.named_parameters())
        recording.teacher = doubled(objective.teacher.named_parameters())
        recording.anchor = doubled(objective.anchor.named_parameters())
        listen_to_objective(objective)
        optimizer = make_optimizer(task)
        optimizer.register_step_pre_hook(
            lambda *_: recording.gradients.append(
                doubled((name, p.grad) for name, p in objective.student.named_parameters())
            )
        )
        return optimizer

    def listen_to_objective(objective):
        multi_crop, loss, after_step = objective.multi_crop, objective.loss, objective.after_step

        def crop(*arguments, **options):
            pending["views"] = views = multi_crop(*arguments, **options)
            for part in (views.global_views, views.local_views):
                object.__setattr__(part, "pixels", part.pixels.to(dtype))
            return views

        def losing(student, batch, key):
            result = loss(student, batch, key)
            recording.micro_batches.append(MicroBatch(pending["views"], pending["mask"], batch.sessions))
            return result

        def stepped(step, taken):
            after_step(step, taken)
            recording.weights.append(doubled(objective.student.named_parameters()))
            recording.teachers.append(doubled(objective.teacher.named_parameters()))

        objective.multi_crop, objective.loss, objective.after_step = crop, losing, stepped

    sample_block_masks = self_distillation.sample_block_masks

    def draw(*arguments, **options):
        masks = sample_block_masks(*arguments, **options)
        pending["mask"] = masks.mask
        return masks

    monkeypatch.setattr(PretrainTask, "make_optimizer", listening)
    monkeypatch.setattr(self_distillation, "sample_block_masks", draw)
    return recording


# The reference. Nothing below calls brainfound.


def half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def rate(name: str, step: int) -> float:
    """The learning rate of a parameter at a step, of the settings above; layer decay and all."""
    peak = SETTINGS["optim.lr"] * math.sqrt(BATCH / 128)
    warmup, wait = SETTINGS["schedule.warmup_steps"], SETTINGS["schedule.head_warmup_steps"]
    is_head = name.startswith("heads.")
    is_new = is_head or "mask_token" in name or "contrast_embedding" in name
    if "last_layer" in name and step < SETTINGS["schedule.freeze_last_layer_steps"]:
        return 0.0
    first = 0 if is_new else wait
    if step < first:
        return 0.0
    if step - first < warmup:
        value = peak * (step - first + 1) / warmup
    else:
        value = half_cosine(peak, 0.01 * peak, (step - first - warmup) / max(STEPS - 1 - first - warmup, 1))
    if is_new:
        return value
    inside = name.removeprefix("encoder.backbone.")
    if inside.startswith("embeddings."):
        layer = 0
    elif inside.startswith("encoder.layer."):
        layer = int(inside.split(".")[2]) + 1
    else:
        layer = LAYERS + 1
    return value * 0.7 ** (LAYERS + 1 - layer) * (0.2 if "patch_embeddings" in inside else 1.0)


def decays(name: str) -> bool:
    """Kernels and matrices; not biases, norms, layer scales and tokens."""
    quiet = ("bias", "norm", "layer_scale", "lambda", "token", "position", "contrast_embedding")
    return name.endswith("weight") and not any(word in name for word in quiet)


def published_sinkhorn(scores: Tensor, temperature: float) -> Tensor:
    table = torch.exp(scores.T / temperature)
    num_prototypes, num_rows = table.shape
    table = table / table.sum()
    for _ in range(3):
        table = table / table.sum(dim=1, keepdim=True) / num_prototypes
        table = table / table.sum(dim=0, keepdim=True) / num_rows
    return (table * num_rows).T


def entropy_between(student: Tensor, target: Tensor) -> Tensor:
    scaled = student / 0.1
    return -(target * (scaled - torch.logsumexp(scaled, dim=-1, keepdim=True))).sum(dim=-1)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.square().sum(dim=-1, keepdim=True).sqrt()


def published_koleo(cls: Tensor, sessions: Tensor) -> Tensor:
    rows, terms = unit(cls), []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if sessions[j] != sessions[i]]
        if others:
            distances = torch.stack([(rows[i] - rows[j]).square().sum().sqrt() for j in others])
            terms.append(-(distances.min() + 1e-8).log())
    return torch.stack(terms).mean()


class Reference:
    """DINOv2's step, written out."""

    def __init__(self, hub: PreTrainedModel, start: Recording) -> None:
        self.hub = hub.double().eval()
        self.contrast_vector: Tensor | None = None
        # What a contrast embedding adds, the library's model does not know: it is added behind its convolution.
        self.hub.embeddings.patch_embeddings.register_forward_hook(
            lambda module, inputs, output: output + self.contrast_vector[:, None]
        )
        self.student = {name: value.clone().requires_grad_() for name, value in start.student.items()}
        self.teacher = {name: value.clone() for name, value in start.teacher.items()}
        self.anchor = {f"encoder.{name}": value for name, value in start.anchor.items()}
        self.first = {name: torch.zeros_like(value) for name, value in start.student.items()}
        self.second = {name: torch.zeros_like(value) for name, value in start.student.items()}

    def encode(self, weights, views, mask=None) -> tuple[Tensor, Tensor]:
        shown = views.contrast_mask.double()
        share = shown / shown.sum(dim=1, keepdim=True)
        pixels = (views.pixels.double() - 0.449) / 0.226 * share[:, :, None, None] * shown.shape[1]
        names = {name.removeprefix("encoder.backbone."): value for name, value in weights.items()}
        own = {name: value for name, value in names.items() if not name.startswith("heads.")}
        self.contrast_vector = share @ own.pop("embeddings.patch_embeddings.contrast_embedding.weight")
        out = torch.func.functional_call(self.hub, own, (pixels,), {"bool_masked_pos": mask}, strict=True)
        prefix = 1 + getattr(self.hub.config, "num_register_tokens", 0)
        return out.last_hidden_state[:, 0], out.last_hidden_state[:, prefix:]

    @staticmethod
    def scores(weights, head: str, rows: Tensor) -> Tensor:
        if f"heads.{head}.mlp.0.weight" not in weights:
            head = "dino"  # one head for both, as in iBOT
        for layer in (0, 2, 4):
            rows = rows @ weights[f"heads.{head}.mlp.{layer}.weight"].T + weights[f"heads.{head}.mlp.{layer}.bias"]
            if layer < 4:
                rows = 0.5 * rows * (1 + torch.erf(rows / math.sqrt(2)))
        return unit(rows) @ unit(weights[f"heads.{head}.last_layer.weight"]).T

    def losses(self, given: MicroBatch, temperature: float) -> dict[str, Tensor]:
        large, small, mask = given.views.global_views, given.views.local_views, given.mask
        images, crops = len(given.sessions), len(mask)
        with torch.no_grad():
            cls, patches = self.encode(self.teacher, large)
            cls_targets = published_sinkhorn(self.scores(self.teacher, "dino", cls), temperature)
            patch_targets = published_sinkhorn(self.scores(self.teacher, "ibot", patches[mask]), temperature)
            anchor_cls, anchor_patches = self.encode(self.anchor, large)
        cls, patches = self.encode(self.student, large, mask)
        small_cls, _ = self.encode(self.student, small)
        own, own_small = self.scores(self.student, "dino", cls), self.scores(self.student, "dino", small_cls)
        num_local = len(small_cls) // images
        crossed = local = ibot = 0.0
        for image in range(images):
            first, second = cls_targets[image], cls_targets[images + image]
            crossed += entropy_between(own[image], second) + entropy_between(own[images + image], first)
            for crop in range(num_local):
                row = own_small[crop * images + image]
                local += entropy_between(row, first) + entropy_between(row, second)
        pairs = images * (2 + 2 * num_local)
        per_token = entropy_between(self.scores(self.student, "ibot", patches[mask]), patch_targets)
        for crop in range(crops):
            of_crop = mask.nonzero()[:, 0] == crop
            if of_crop.any():
                ibot += per_token[of_crop].mean() / crops
        seen = ~mask.any(dim=1)
        gram = [unit(tokens[seen]) @ unit(tokens[seen]).mT for tokens in (patches, anchor_patches)]
        return {
            "dino_global": crossed / pairs,
            "dino_local": local / pairs,
            "ibot": ibot,
            "koleo": sum(published_koleo(crop, given.sessions) for crop in (cls[:images], cls[images:])),
            "anchor_gram": (gram[0] - gram[1]).square().mean(),
            "anchor_cls": 1 - (unit(cls[seen]) * unit(anchor_cls[seen])).sum(dim=1).mean(),
        }

    def step(self, number: int, micro_batches: list[MicroBatch], clip: float) -> tuple[dict[str, float], dict]:
        """One step; gives the mean losses and the clipped gradients."""
        low, high = SETTINGS["objective.teacher_temperature"]
        part = min(number / SETTINGS["objective.teacher_temperature_warmup_steps"], 1)
        weight = {
            **{f"dino_{kind}": SETTINGS["objective.dino_weight"] for kind in ("global", "local")},
            **{name: SETTINGS[f"objective.{name}_weight"] for name in ("ibot", "koleo", "anchor_gram", "anchor_cls")},
        }
        means = dict.fromkeys(PARTS, 0.0)
        total = 0.0
        for given in micro_batches:
            for name, value in self.losses(given, low + (high - low) * part).items():
                means[name] += value.item() / len(micro_batches)
                total = total + weight[name] * value / len(micro_batches)
        names = list(self.student)
        gradients = dict(zip(names, torch.autograd.grad(total, [self.student[n] for n in names]), strict=True))
        for module in ("encoder.", "heads.dino.", "heads.ibot."):
            inside = [name for name in names if name.startswith(module)]
            if not inside:
                continue
            norm = math.sqrt(sum(float(gradients[name].square().sum()) for name in inside))
            for name in inside:
                gradients[name] = gradients[name] * min(1.0, clip / (norm + 1e-6))
        self.move(number, gradients)
        return means | {"loss": total.item()}, gradients

    @torch.no_grad()
    def move(self, number: int, gradients: dict[str, Tensor]) -> None:
        beta1, beta2 = SETTINGS["optim.beta1"], SETTINGS["optim.beta2"]
        momentum = half_cosine(*SETTINGS["objective.momentum"], number / STEPS)
        for name, gradient in gradients.items():
            lr, weight = rate(name, number), self.student[name]
            if decays(name):
                weight -= lr * SETTINGS["optim.weight_decay"] * weight
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * gradient
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * gradient**2
            mean = self.first[name] / (1 - beta1 ** (number + 1))
            spread = (self.second[name] / (1 - beta2 ** (number + 1))).sqrt()
            weight -= lr * mean / (spread + 1e-8)
            self.teacher[name] = momentum * self.teacher[name] + (1 - momentum) * weight


# The comparison


def distance(own: dict[str, Tensor], expected: dict[str, Tensor], floor: float = 0.0) -> dict[str, float]:
    """Per tensor: the norm of the difference over the norm of what is expected (or `floor`)."""
    assert own.keys() == expected.keys()
    return {
        n: float((own[n] - e.detach()).norm()) / max(float(e.detach().norm()), floor, 1e-30)
        for n, e in expected.items()
    }


def require_close(what: str, distances: dict[str, float], tolerance: float) -> None:
    # Attention does not see the bias of its keys: its gradient is 0 but for rounding, which AdamW then
    # divides by its own size. In float32 the path of these few numbers is noise, of no effect.
    noise = [name for name in distances if name.endswith("k_proj.bias")] if tolerance == FLOAT32 else []
    assert all(distances.pop(name) <= 1e-2 for name in noise), what
    worst = max(distances, key=lambda name: distances[name])
    assert distances[worst] <= tolerance, f"{what}: {worst} is off by {distances[worst]:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize(
    ("dtype", "tolerance", "accumulation", "clip"),
    [
        pytest.param(torch.float32, FLOAT32, 1, 0.5, id="float32"),
        pytest.param(torch.float64, 1e-6, 1, 1e9, id="float64"),
        pytest.param(torch.float64, 1e-6, 2, 0.5, id="float64, two micro-batches"),
    ],
)
def test_steps_are_those_of_the_reference(
    store, recipe, tiny_backbone, tmp_path, monkeypatch, dtype, tolerance, accumulation, clip
):
    compare(store, recipe, tiny_backbone, tmp_path, monkeypatch, dtype, tolerance, accumulation, clip)


def test_registers_and_one_head_for_both(store, recipe, tmp_path, monkeypatch):
    """Registers are neither patches nor masked; a shared head gets the gradients of CLS and patches."""
    torch.manual_seed(1)
    size = {"hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    backbone = tmp_path / "registers"
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**size, num_register_tokens=2)).save_pretrained(backbone)
    compare(
        store, recipe, backbone, tmp_path, monkeypatch, torch.float64, 1e-6, 1, 0.5, {"objective.shared_head": True}
    )


def compare(store, recipe, backbone, folder, monkeypatch, dtype, tolerance, accumulation, clip, changes=None):
    """Run, and hold every step against the reference."""
    recording = record(monkeypatch, dtype)
    more = {"init.source": str(backbone), "engine.accumulation": accumulation, "optim.clip_norm": clip} | (
        changes or {}
    )
    overrides = [f"{key}={json.dumps(value)}" for key, value in (SETTINGS | more).items()]
    run = pretrain(recipe(*overrides), store, out=folder / "run", quiet=True)
    lines = log_lines(run)
    reference = Reference(AutoModel.from_pretrained(backbone), recording)
    assert len(recording.weights) == len(lines) == STEPS
    clipped = False
    for step in range(STEPS):
        given = recording.micro_batches[step * accumulation : (step + 1) * accumulation]
        means, gradients = reference.step(step, given, clip)
        for name, value in means.items():
            own = lines[step]["loss" if name == "loss" else f"loss_{name}"]
            assert own == pytest.approx(value, rel=tolerance, abs=tolerance * 1e-2), (step, name)
        largest = max(float(gradient.norm()) for gradient in gradients.values())
        require_close(
            f"gradient, step {step}", distance(recording.gradients[step], gradients, 1e-3 * largest), tolerance
        )
        clipped |= any(
            lines[step][f"grad_norm/{name}"] > clip for name in CLIPPED if f"grad_norm/{name}" in lines[step]
        )
        for what, own, expected in (
            ("weights", recording.weights, reference.student),
            ("teacher", recording.teachers, reference.teacher),
        ):
            require_close(f"{what}, step {step}", distance(own[step], expected), tolerance)
        waits = [n for n in recording.student if torch.equal(recording.weights[step][n], recording.student[n])]
        # At step 0 the backbone waits, and with it nothing but the frozen prototypes.
        assert any(name.startswith("encoder.backbone.encoder") for name in waits) == (step == 0)
        assert any("last_layer" in name for name in waits) == (step < SETTINGS["schedule.freeze_last_layer_steps"])
    assert clipped == (clip < 1)
