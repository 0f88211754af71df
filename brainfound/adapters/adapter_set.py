"""Several bundles on one backbone in memory, chosen per request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from brainfound.adapters.bundle_reader import Bundle, base_encoder_state, load_bundle, strip_adapter_name, tensors_hash
from brainfound.adapters.low_rank import is_merged
from brainfound.errors import ModelError, UsageError, did_you_mean
from brainfound.models.infer import unwrap_peft


class AdapterSet:
    """Bundles whose models share the weights of one backbone.

    Each name is a whole bundle with its own model, preprocessing and labels, so choosing one changes no state: requests
    for several names may run in any order or at the same time, with the outputs of the bundle loaded alone.

    Args:
        bundles: by name; `load_adapters` reads and checks them.
    """

    def __init__(self, bundles: Mapping[str, Bundle]) -> None:
        self._bundles = dict(bundles)

    def __getitem__(self, name: str) -> Bundle:
        if name not in self._bundles:
            raise UsageError(f"no adapter named {name!r}", remedy=did_you_mean(name, self._bundles))
        return self._bundles[name]

    def __contains__(self, name: object) -> bool:
        return name in self._bundles

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundles)

    def __len__(self) -> int:
        return len(self._bundles)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {bundle.task}" for name, bundle in self._bundles.items())
        return f"AdapterSet({parts}; {self.num_parameters:,} parameters)"

    @property
    def num_parameters(self) -> int:
        """Parameters of all models; shared ones count once."""
        return sum({id(p): p.numel() for b in self._bundles.values() for p in b.model.parameters()}.values())

    def to(self, device: str | torch.device) -> Self:
        """Move all models; they keep sharing their backbone.

        Raises:
            ModelError: if one is merged: its weights are not the shared ones.
        """
        bundles = list(self._bundles.values())
        for name, bundle in self._bundles.items():
            _require_unmerged(name, bundle)
        for bundle in bundles:
            bundle.model.to(device)
            # Share again: moving a model may replace its parameters.
            _share_backbone(bundles[0], bundle)
        return self


def load_adapters(bundles: Mapping[str, str | Path | Bundle]) -> AdapterSet:
    """Read bundles that were trained on the same backbone, and keep that backbone in memory once.

    Args:
        bundles: name → folder of a bundle, or a loaded bundle. All are moved to the device of the first.

    Raises:
        UsageError: if there is none.
        ModelError: if one cannot be read, has a backbone of its own, or is merged.
    """
    if not bundles:
        raise UsageError("no bundle was given", where="load_adapters")
    loaded: dict[str, Bundle] = {}
    fingerprint = ""
    for name, source in bundles.items():
        bundle = source if isinstance(source, Bundle) else load_bundle(source)
        if bundle.content["weights"] == "full":
            raise ModelError(
                "its encoder itself was trained, so it has a backbone of its own",
                where=f"{name} ({bundle.folder})",
                expected="an adapter, or a head on a frozen backbone",
                remedy="Load it by itself with load_bundle",
            )
        _require_unmerged(name, bundle)
        own = tensors_hash(base_encoder_state(unwrap_peft(bundle.model)))
        fingerprint = fingerprint or own
        if own != fingerprint:
            raise ModelError(
                f"it was trained on another backbone than {next(iter(loaded))}",
                where=f"{name} ({bundle.folder})",
                got=f"hash {own[:12]}",
                expected=fingerprint[:12],
                remedy="Load it by itself with load_bundle",
            )
        loaded[name] = bundle
        first = next(iter(loaded.values()))
        # Before the next one is read, so that this one's copy of the backbone is freed.
        _share_backbone(first, bundle)
        bundle.model.to(next(first.model.parameters()).device)
    return AdapterSet(loaded)


def _require_unmerged(name: str, bundle: Bundle) -> None:
    if is_merged(bundle.model):
        raise ModelError("the adapter is merged", where=f"{name} ({bundle.folder})", remedy="Call unmerge first")


def _share_backbone(first: Bundle, other: Bundle) -> None:
    """Replace the other model's encoder weights by the equal ones of the first."""
    shared = {name: getattr(module, key) for name, module, key in _base_parameters(unwrap_peft(first.model))}
    for name, module, key in _base_parameters(unwrap_peft(other.model)):
        setattr(module, key, shared[name])


def _base_parameters(body: Any) -> Iterator[tuple[str, nn.Module, str]]:
    """The base weights of an encoder: name without an adapter, module, and attribute of the module."""
    for path, module in body.encoder.named_modules():
        for key in list(module._parameters):
            name = strip_adapter_name(f"{path}.{key}")
            if name is not None and module._parameters[key] is not None:
                yield name, module, key
