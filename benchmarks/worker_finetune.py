"""One way of fine-tuning a ViT on volumes, step by step, for `adapt.py`.

Usage: python worker_finetune.py SETTINGS.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from step_server import StepServer

from brainfound.adapters.attach import AdapterRecipe, attach_adapter, count_parameters
from brainfound.models import BrainFoundConfig, BrainFoundForClassification
from brainfound.models.stack_prediction import unwrap_peft
from brainfound.recipes import load


def backbone_of(size: Sequence[int]) -> dict[str, Any]:
    """The configuration of a Dinov2 with this width, number of layers and number of heads."""
    width, layers, heads = size
    return {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "patch_size": 14,
        "image_size": 518,
    }


def build(settings: dict[str, Any]) -> Any:
    """A classifier with new weights and the adapter of the settings."""
    torch.manual_seed(0)
    config = BrainFoundConfig(backbone_config=backbone_of(settings["size"]), aggregator="attention", num_labels=2)
    model = BrainFoundForClassification(config)
    return attach_adapter(model, load(AdapterRecipe, settings["adapter"], "adapters")).train()


def main() -> None:
    """Train on one batch again and again, a step for each command of the parent."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    server = StepServer(settings)
    model = build(settings)
    encoder = unwrap_peft(model).brainfound.encoder
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    server.facts = {
        "trained": count_parameters(model).trainable,
        "trained_in_encoder": sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        "encoder": sum(p.numel() for n, p in encoder.named_parameters() if "lora_" not in n),
    }
    volumes, slices, side = settings["batch"], settings["slices"], settings["image"]
    inputs = {"pixel_values": torch.rand(volumes, slices, 3, side, side)}
    labels = torch.arange(volumes) % 2
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    while True:
        server.boundary()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
