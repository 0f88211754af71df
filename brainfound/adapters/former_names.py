"""Bundles from before the library renamed the matrices of its ViTs.

A bundle's recipe names roles, but the file of an adapter has a key per module, named as the library named
it on the day of saving. Those keys are carried over by what they are: the role that the module plays, and its
block. The hash of a base has names in it too, so a base is also compared under the names of that time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from brainfound.adapters.roles import block_number, group_modules_by_role, infer_role

_UPDATE = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?P<rest>\..+)?")
PEFT_PREFIX = "base_model.model."

# How modules end in the present library → how they ended before. Gated MLPs had both ways in as one matrix.
_FORMER_ENDINGS = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}
_GATE, _UP, _FORMERLY_BOTH = ".mlp.gate_proj.", ".mlp.up_proj.", ".mlp.weights_in."


def to_current_targets(targets: Iterable[str], model: nn.Module) -> list[str]:
    """Names of modules that an adapter was made for → those of this model; names without a match stay as they are."""
    return [name for target in targets for name in _present_modules(target, model)]


def to_current_tensors(saved: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an adapter's file under the names that they have in this model.

    Where one matrix has become two, an update is split: both share its way in and have their rows of its way out.
    Keys without a match stay as they are.

    Args:
        saved: content of `adapter_model.safetensors`.
        model: the base, without the adapter.
    """
    present: dict[str, Tensor] = {}
    for key, tensor in saved.items():
        found = _UPDATE.fullmatch(key.removeprefix(PEFT_PREFIX))
        if found is None:
            present[key] = tensor
            continue
        modules = _present_modules(found["module"], model)
        shared = found["part"] == "lora_A"
        pieces = [tensor] * len(modules) if shared else tensor.chunk(len(modules), dim=0)
        for module, piece in zip(modules, pieces, strict=True):
            # A copy: files refuse tensors that share memory, and a piece would keep the whole alive.
            present[f"{PEFT_PREFIX}{module}.{found['part']}{found['rest'] or ''}"] = piece.clone()
    return present


def to_legacy_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's weights under the names that the library had before."""
    former: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _UP in name:
            continue
        if _GATE in name:
            tensor = torch.cat((tensor, state[name.replace(_GATE, _UP)]))
            name = name.replace(_GATE, _FORMERLY_BOTH)
        for present, before in _FORMER_ENDINGS.items():
            name = name.replace(f".{present}.", f".{before}.")
        former[name] = tensor
    return former


def _present_modules(name: str, model: nn.Module) -> list[str]:
    playing = group_modules_by_role(model)
    if any(name in names for names in playing.values()):
        return [name]
    role = infer_role(name)
    return playing.get((block_number(name), role), [name]) if role else [name]
