"""Reading of bundles: every file and every weight is checked. `brainfound.adapters.bundle` lists the files.

Files and weights are compared by their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from brainfound.adapters.low_rank import get_base_weight
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.errors import ModelError
from brainfound.models import (
    BrainFoundConfig,
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
    BrainFoundModel,
)
from brainfound.models.backbones import load_backbone
from brainfound.models.hub import LOAD_FAILURES, first_line, list_keys


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named tensors (names, shapes, types, bytes), independent of their file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


SCHEMA_VERSION = 1
MODEL_CLASSES: dict[str, type[Any]] = {
    "classification": BrainFoundForClassification,
    "regression": BrainFoundForRegression,
    "segmentation": BrainFoundForSegmentation,
    "embedding": BrainFoundModel,
}
ADAPTER_FILE = "adapter_model.safetensors"
TRAINED_FILE = "trained.safetensors"
MODEL_FILE = "model.safetensors"
BASELINE_FILE = "frozen_baseline.safetensors"
WEIGHTS_FILES = {"adapter": ADAPTER_FILE, "trained": TRAINED_FILE, "full": MODEL_FILE}
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


@dataclass(frozen=True)
class Bundle:
    """An adapted model with its preprocessing, labels and description."""

    model: Any
    """Ready for inference: a BrainFound model, or a `peft.PeftModel` around one."""
    preprocessing: Preprocessing
    labels: dict[str, Any]
    metadata: dict[str, Any]
    task: str
    """classification, regression, segmentation or embedding."""
    folder: Path
    content: dict[str, Any] = field(repr=False)
    """All of bundle.json."""
    baseline: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """The linear model on the untouched backbone; empty if none was saved."""

    def load_pretrained(self) -> Any | None:
        """The model with its encoder before training, and a random aggregator and head.

        None if all weights were trained: then the bundle lacks the pretrained encoder.

        Raises:
            ModelError: as `load_bundle`.
        """
        if self.content["weights"] == "full":
            return None
        config = _read_config(self.folder / "config.json")
        return (
            _load_base(MODEL_CLASSES[self.task], config, self.content["base"], self.folder).eval().requires_grad_(False)
        )


def load_bundle(folder: str | Path) -> Bundle:
    """Read a bundle that `save_bundle` wrote.

    Raises:
        ModelError: if a file is missing, damaged or a pickle, if the base is not the one that the adapter was
            trained on, or if weights are missing or left over.
    """
    folder = Path(folder)
    baseline = folder / BASELINE_FILE
    content = _read_description(folder)
    _verify_files(folder, content)
    config = _read_config(folder / "config.json")
    kind = MODEL_CLASSES[content["task"]]
    weights = content["weights"]
    if weights == "full":
        model = kind.from_pretrained(folder)
    else:
        model = _load_base(kind, config, content["base"], folder)
        model = _load_adapter(model, folder) if weights == "adapter" else _load_trained(model, folder)
    return Bundle(
        model=model.eval().requires_grad_(False),
        preprocessing=Preprocessing.load(folder),
        labels=content["labels"],
        metadata=content["metadata"],
        task=content["task"],
        folder=folder,
        content=content,
        baseline=_read_tensors(baseline) if baseline.is_file() else {},
    )


def base_encoder_state(body: Any) -> dict[str, Tensor]:
    """The encoder's weights before an adapter was attached or merged, under their own names.

    Raises:
        ModelError: if the adapter was merged in a way that does not keep them.
    """
    state = {}
    for name, value in body.encoder.state_dict().items():
        plain = strip_adapter_name(name)
        if plain is not None:
            state[plain] = value.detach().cpu()
    for name, module in body.encoder.named_modules():
        if isinstance(module, LoraLayer):
            state[f"{name}.weight"] = get_base_weight(module).detach().cpu()
    return state


def strip_adapter_name(name: str) -> str | None:
    """The name of an adapted encoder's weight without the adapter; None if it belongs to the adapter."""
    if "lora_" in name or ".modules_to_save." in name:
        return None
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def is_encoder_key(name: str) -> bool:
    return name.removeprefix("brainfound.").startswith("encoder.")


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "bundle.json"
    if not folder.is_dir():
        raise ModelError("no such bundle", where=folder, remedy="Check the path")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "bundle.json is missing", where=folder, remedy="Give a folder that fine-tuning exported"
        ) from None
    except ValueError as error:
        raise ModelError(f"not valid JSON: {error}", where=path, remedy="Export the model again") from None
    schema = content.get("schema_version") if isinstance(content, dict) else None
    if schema != SCHEMA_VERSION:
        raise ModelError(
            "the bundle has another schema", where=path, got=schema, expected=SCHEMA_VERSION, remedy="Export it again"
        )
    unusable = _unusable_fields(content)
    if unusable:
        raise ModelError(
            f"the description lacks {', '.join(unusable)}, or has unusable values there",
            where=path,
            remedy="Copy the bundle again, or export it again",
        )
    return content


def _unusable_fields(content: dict[str, Any]) -> list[str]:
    """The required fields of a description that are missing or of another type."""
    base = content.get("base")
    if isinstance(base, dict):
        of_hub = isinstance(base.get("id"), str) and isinstance(base.get("is_brainfound"), bool)
        has_base = isinstance(base.get("sha256"), str) and (base.get("source") == "folder" or of_hub)
    else:
        has_base = base is None and content.get("weights") == "full"
    usable = {
        "task": content.get("task") in tuple(MODEL_CLASSES),
        "weights": content.get("weights") in tuple(WEIGHTS_FILES),
        "base": has_base,
        **{name: isinstance(content.get(name), dict) for name in ("labels", "metadata", "files")},
    }
    return [name for name, is_usable in usable.items() if not is_usable]


def _verify_files(folder: Path, content: dict[str, Any]) -> None:
    for path in folder.rglob("*"):
        if path.suffix in _PICKLE_SUFFIXES:
            raise ModelError(
                "pickled files are refused because they can run code", where=path, remedy="Remove the file"
            )
    needed = {"config.json", "preprocessing.json", WEIGHTS_FILES[content["weights"]]}
    for name in sorted(needed | set(content["files"])):
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{name} is missing from the bundle", where=folder, remedy="Copy the whole folder again")
        if file_hash(path) != content["files"].get(name):
            raise ModelError(
                f"{name} is damaged or was changed after the bundle was saved",
                where=folder,
                remedy="Copy the folder again, or export the model again",
            )


def _read_config(path: Path) -> BrainFoundConfig:
    try:
        return BrainFoundConfig.from_json_file(path)
    except LOAD_FAILURES as error:
        raise ModelError(
            f"the configuration cannot be read: {first_line(error)}", where=path, remedy="Copy the bundle again"
        ) from error


def _load_base(kind: type[Any], config: BrainFoundConfig, base: dict[str, Any], folder: Path) -> Any:
    if base["source"] == "folder":
        where = str(folder / "base")
        model = kind.from_pretrained(where, config=config)
    elif base["is_brainfound"]:
        where = base["id"]
        with warnings.catch_warnings():
            # The bundle's head replaces that of the base.
            warnings.filterwarnings("ignore", message=".*the head begins anew")
            model = kind.from_pretrained(where, config=config, ignore_mismatched_sizes=True)
    else:
        where = base["id"]
        model = kind(config, backbone=load_backbone(where))
    found = tensors_hash(base_encoder_state(model))
    if base["sha256"] != found:
        raise ModelError(
            "these are not the base weights that the adapter was trained on",
            where=where,
            got=f"hash {found[:12]}",
            expected=base["sha256"][:12],
            remedy="Use the original base, or save the bundle with copy_base=True",
        )
    return model


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except LOAD_FAILURES as error:
        raise _unreadable_weights(path, error) from error


def _load_adapter(model: Any, folder: Path) -> PeftModel:
    path = folder / ADAPTER_FILE
    saved = _read_tensors(path)
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = True
        adapted = PeftModel(model, settings)
        _require_same_keys(path, set(saved), set(get_peft_model_state_dict(adapted, save_embedding_layers=False)))
        set_peft_model_state_dict(adapted, saved)
    except LOAD_FAILURES as error:
        raise _unreadable_weights(path, error) from error
    return adapted


def _load_trained(model: Any, folder: Path) -> Any:
    path = folder / TRAINED_FILE
    own = {name: value for name, value in model.state_dict().items() if not is_encoder_key(name)}
    saved = _read_tensors(path)
    _require_same_keys(path, set(saved), set(own))
    with torch.no_grad():
        for name, value in own.items():
            if saved[name].shape != value.shape:
                raise ModelError(
                    f"{name} has another shape", where=path, got=tuple(saved[name].shape), expected=tuple(value.shape)
                )
            value.copy_(saved[name])
    return model


def _unreadable_weights(path: Path, error: Exception) -> ModelError:
    return ModelError(f"the weights cannot be read: {first_line(error)}", where=path, remedy="Copy the bundle again")


def _require_same_keys(path: Path, saved: set[str], expected: set[str]) -> None:
    for words, keys in (("lacks", expected - saved), ("has no place for", saved - expected)):
        if keys:
            subject = "the file" if words == "lacks" else "the model"
            raise ModelError(
                f"{subject} {words} {len(keys)} weights: {list_keys(keys)}", where=path, remedy="Export the model again"
            )
