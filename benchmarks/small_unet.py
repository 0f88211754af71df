"""The baseline of the real-brains benchmark: a small MONAI 3-D U-Net, or its encoder and a linear layer, from scratch.

It reads the same prepared stacks as BrainFound, with the same augmentation, and trains for as many seconds on one core.

Axes: B volumes, S slices, C contrasts, H W pixels, K classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brainfound.data.batches import collate
from brainfound.data.store import Store
from brainfound.finetuning.scoring import SessionScores, score_predictions
from brainfound.finetuning.tasks import Task
from brainfound.finetuning.volumes import VolumeAugmentation, augment_volumes
from brainfound.models.stack_prediction import StackPrediction
from brainfound.training.randomness import StepKey

CHANNELS = (16, 32, 64, 128)
HALVINGS = len(CHANNELS) - 1
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
BATCH = 2
CROP = (24, 96, 96)
"""Slices, rows and columns of a training crop of a segmentation, where the stack is larger."""
WARMUP = 0.05


def network(target: Task) -> nn.Module:
    """The U-Net of a segmentation, or its encoder, a mean over the volume, and one number."""
    from monai.networks.blocks import ResidualUnit
    from monai.networks.nets import UNet

    if target.per_voxel:
        return UNet(3, 1, len(target.names), CHANNELS, (2,) * HALVINGS, num_res_units=2)
    widths = (1, *CHANNELS)
    units = [ResidualUnit(3, before, after, strides=2) for before, after in pairwise(widths)]
    return nn.Sequential(*units, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], 1))


def train(
    store: Store,
    sessions: Sequence[int],
    target: Task,
    contrast: str,
    augmentation: VolumeAugmentation,
    seconds: float,
    seed: int,
) -> tuple[nn.Module, int]:
    """Train for so many seconds of processor time; gives the network and its number of steps."""
    from monai.losses import DiceCELoss

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = network(target)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    dice_cross_entropy = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    channel, order, step = store.contrasts.index(contrast), [], 0
    began = time.process_time()
    while (done := (time.process_time() - began) / seconds) < 1:
        rate = LEARNING_RATE * min(1.0, done / WARMUP) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if len(order) < BATCH:
            order = [*order, *rng.permutation(list(sessions)).tolist()]
        chosen, order = order[:BATCH], order[BATCH:]
        batch = augment_volumes(_whole(store, chosen), augmentation, StepKey(seed, step, 0, 0))
        images = _standardised(batch.pixel_values[:, :, channel])
        if target.per_voxel:
            masks = target.loss_labels(None, batch.masks)
            images, masks = _crop(rng, images, masks)
            loss = dice_cross_entropy(net(images[:, None]), masks[:, None])
        else:
            truth = torch.tensor(target.values(store, chosen), dtype=torch.float32)
            loss = F.smooth_l1_loss(net(images[:, None])[:, 0], (truth - target.mean) / target.std)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
    return net.eval(), step


def score(net: nn.Module, store: Store, sessions: Sequence[int], target: Task, contrast: str) -> SessionScores:
    """Predict whole volumes, and score them in the same way as BrainFound's runs."""
    channel = store.contrasts.index(contrast)

    @torch.inference_mode()
    def predict(session: int, stack: Any) -> StackPrediction:
        images = _standardised(_whole(store, [session]).pixel_values[:, :, channel].float() / 255)
        size = images.shape[1:]
        padding = [pad for side in reversed(size) for pad in (0, -side % 2**HALVINGS)]
        found = net(F.pad(images, padding)[:, None])
        if target.per_voxel:
            return StackPrediction(classes=found[0].argmax(dim=0)[: size[0], : size[1], : size[2]].numpy())
        return StackPrediction(value=float(found[0, 0]) * target.std + target.mean)

    return score_predictions(predict, store, sessions, target)


def _whole(store: Store, sessions: Sequence[int]) -> Any:
    stacks = [store[int(session)] for session in sessions]
    return collate(stacks, [np.arange(len(stack.pixels)) for stack in stacks])


def _standardised(images: Tensor) -> Tensor:
    """(B, S, H, W): mean 0 and variance 1 over the foreground."""
    head = images > 0
    count = head.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    mean = (images * head).sum(dim=(1, 2, 3), keepdim=True) / count
    variance = ((images - mean).square() * head).sum(dim=(1, 2, 3), keepdim=True) / count
    return (images - mean) / variance.sqrt().clamp(min=1e-3)


def _crop(rng: np.random.Generator, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The same random part of all volumes of a batch; padded to a multiple of the network's stride."""
    places = []
    for side, wanted in zip(images.shape[1:], CROP, strict=True):
        first = int(rng.integers(max(1, side - wanted + 1)))
        places.append(slice(first, first + wanted))
    images, masks = images[:, *places], masks[:, *places]
    padding = [pad for side in reversed(images.shape[1:]) for pad in (0, -side % 2**HALVINGS)]
    return F.pad(images, padding), F.pad(masks, padding)
