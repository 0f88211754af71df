"""Reading bundles: a single one (`load_bundle`), or several that share one backbone in memory (`load_adapters`).

Every file and every weight is checked by its SHA-256. `brainfound.adapters.bundle` lists the files.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from brainfound.adapters.low_rank import get_base_weight, is_merged
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.errors import ModelError, UsageError, did_you_mean
from brainfound.files import require_json
from brainfound.models import (
    BrainFoundConfig,
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
    BrainFoundModel,
)
from brainfound.models.backbones import load_backbone
from brainfound.models.model_folder import LOAD_FAILURES, first_line, list_keys, require_finite
from brainfound.models.stack_prediction import unwrap_peft


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
_READ_SUFFIXES = {".safetensors", ".json"}
"""Endings of the files that are read, so that each must be listed."""
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
        """The model with its encoder as it was before training, and a random aggregator and head.

        None if all weights were trained, since the bundle then lacks the pretrained encoder.
        """
        if self.content["weights"] == "full":
            return None
        config = _read_config(self.folder / "config.json")
        model = _load_base(MODEL_CLASSES[self.task], config, self.content["base"], self.folder)
        return model.eval().requires_grad_(False)


def load_bundle(folder: str | Path) -> Bundle:
    """Read a bundle that `save_bundle` wrote.

    Raises:
        ModelError: if a file is missing, damaged or a pickle, if the base is not the one that the adapter was
            trained on, or if weights are missing or left over.
    """
    folder = Path(folder)
    content = _read_description(folder)
    _verify_files(folder, content)
    config = _read_config(folder / "config.json")
    kind = MODEL_CLASSES[content["task"]]
    if content["weights"] == "full":
        model = kind.from_pretrained(folder)
    else:
        model = _load_base(kind, config, content["base"], folder)
        model = _load_adapter(model, folder) if content["weights"] == "adapter" else _load_trained(model, folder)
    baseline = folder / BASELINE_FILE
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

    A ModelError if the adapter was merged in a way that does not keep them.
    """
    named = body.encoder.state_dict().items()
    state = {plain: value.detach().cpu() for name, value in named if (plain := strip_adapter_name(name)) is not None}
    for name, module in body.encoder.named_modules():
        if isinstance(module, LoraLayer):
            state[f"{name}.weight"] = get_base_weight(module).detach().cpu()
    return state


def strip_adapter_name(name: str) -> str | None:
    """A weight's name in the encoder before the adapter was attached; None if the weight belongs to the adapter."""
    if "lora_" in name or ".modules_to_save." in name:
        return None
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def is_encoder_key(name: str) -> bool:
    return name.removeprefix("brainfound.").startswith("encoder.")


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "bundle.json"
    if not folder.is_dir():
        raise ModelError("no such bundle", where=folder, remedy="Check the path", usage=True)
    if not path.is_file():
        remedy = "Give a folder that fine-tuning exported"
        raise ModelError("bundle.json is missing", where=folder, remedy=remedy, usage=True)
    content = require_json(path, "Export the model again", ModelError)
    schema = content.get("schema_version")
    if schema != SCHEMA_VERSION:
        text = "the bundle has another schema"
        raise ModelError(text, where=path, got=schema, expected=SCHEMA_VERSION, remedy="Export it again")
    base = content.get("base")
    if isinstance(base, dict):
        has_hub_id = isinstance(base.get("id"), str) and isinstance(base.get("is_brainfound"), bool)
        has_base = isinstance(base.get("sha256"), str) and (base.get("source") == "folder" or has_hub_id)
    else:
        has_base = base is None and content.get("weights") == "full"
    usable = {
        "task": content.get("task") in tuple(MODEL_CLASSES),
        "weights": content.get("weights") in tuple(WEIGHTS_FILES),
        "base": has_base,
        **{name: isinstance(content.get(name), dict) for name in ("labels", "metadata", "files")},
    }
    if unusable := [name for name, is_usable in usable.items() if not is_usable]:
        text = f"the description lacks {', '.join(unusable)}, or has unusable values there"
        raise ModelError(text, where=path, remedy="Copy the bundle again, or export it again")
    return content


def _verify_files(folder: Path, content: dict[str, Any]) -> None:
    for path in folder.rglob("*"):
        if path.suffix in _PICKLE_SUFFIXES:
            text = "pickled files are refused because they can run code"
            raise ModelError(text, where=path, remedy="Remove the file")
        name = path.relative_to(folder).as_posix()
        is_read = path.suffix in _READ_SUFFIXES and not any(part.startswith(".") for part in Path(name).parts)
        if is_read and name not in (*content["files"], "bundle.json"):
            text, remedy = "this file is not part of the bundle: bundle.json does not list it", "Remove the file"
            raise ModelError(text, where=path, remedy=remedy)
    needed = {"config.json", "preprocessing.json", WEIGHTS_FILES[content["weights"]]}
    for name in sorted(needed | set(content["files"])):
        path = folder / name
        if not path.is_file():
            raise ModelError(f"{name} is missing from the bundle", where=folder, remedy="Copy the whole folder again")
        if file_hash(path) != content["files"].get(name):
            text = f"{name} is damaged or was changed after the bundle was saved"
            raise ModelError(text, where=folder, remedy="Copy the folder again, or export the model again")


def _read_config(path: Path) -> BrainFoundConfig:
    try:
        return BrainFoundConfig.from_json_file(path)
    except LOAD_FAILURES as error:
        raise _unreadable("configuration", path, error) from error


def _load_base(kind: type[Any], config: BrainFoundConfig, base: dict[str, Any], folder: Path) -> Any:
    where = str(folder / "base") if base["source"] == "folder" else base["id"]
    if base["source"] == "folder":
        model = kind.from_pretrained(where, config=config)
    elif base["is_brainfound"]:
        with warnings.catch_warnings():
            # The bundle's head replaces the base's.
            warnings.filterwarnings("ignore", message=".*the head gets new weights")
            model = kind.from_pretrained(where, config=config, ignore_mismatched_sizes=True)
    else:
        model = kind(config, backbone=load_backbone(where))
    fingerprint = tensors_hash(base_encoder_state(model))
    if base["sha256"] != fingerprint:
        text = "these are not the base weights that the adapter was trained on"
        remedy = "Use the original base, or save the bundle with copy_base=True"
        raise ModelError(text, where=where, got=f"hash {fingerprint[:12]}", expected=base["sha256"][:12], remedy=remedy)
    return model


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except LOAD_FAILURES as error:
        raise _unreadable("weights", path, error) from error
    require_finite(path, tensors)
    return tensors


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
        raise _unreadable("weights", path, error) from error
    return adapted


def _load_trained(model: Any, folder: Path) -> Any:
    path = folder / TRAINED_FILE
    own = {name: value for name, value in model.state_dict().items() if not is_encoder_key(name)}
    saved = _read_tensors(path)
    _require_same_keys(path, set(saved), set(own))
    with torch.no_grad():
        for name, value in own.items():
            got, expected = tuple(saved[name].shape), tuple(value.shape)
            if got != expected:
                what, remedy = f"{name} has another shape", "Export the model again"
                raise ModelError(what, where=path, got=got, expected=expected, remedy=remedy)
            value.copy_(saved[name])
    return model


def _unreadable(part: str, path: Path, error: Exception) -> ModelError:
    return ModelError(f"the {part} cannot be read: {first_line(error)}", where=path, remedy="Copy the bundle again")


def _require_same_keys(path: Path, saved: set[str], expected: set[str]) -> None:
    for problem, keys in (("the file lacks", expected - saved), ("the model has no place for", saved - expected)):
        if keys:
            text = f"{problem} {len(keys)} weights: {list_keys(keys)}"
            raise ModelError(text, where=path, remedy="Export the model again")


Member = TypeVar("Member")


class NamedSet(Generic[Member]):
    """What is loaded for each adapter, by its name; an unknown name is a UsageError."""

    def __init__(self, members: Mapping[str, Member]) -> None:
        self._members = dict(members)

    def __getitem__(self, name: str) -> Member:
        if name not in self._members:
            raise UsageError(f"no adapter named {name!r}", remedy=did_you_mean(name, self._members))
        return self._members[name]

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {member.task}" for name, member in self._members.items())  # type: ignore[attr-defined]
        return f"{type(self).__name__}({parts})"


class AdapterSet(NamedSet[Bundle]):
    """Bundles whose models share the weights of one backbone.

    `load_adapters` reads and checks them. Each name stands for a whole bundle with its own model, preprocessing and
    labels, so choosing one changes no state: requests for several names may run in any order or concurrently, and give
    the same outputs as a bundle loaded by itself.
    """

    def __repr__(self) -> str:
        return f"{super().__repr__().removesuffix(')')}; {self.num_parameters:,} parameters)"

    @property
    def num_parameters(self) -> int:
        """Parameters of all models; shared ones count once."""
        return sum({id(p): p.numel() for b in self._members.values() for p in b.model.parameters()}.values())

    def to(self, device: str | torch.device) -> Self:
        """Move all models, which keep sharing their backbone; a ModelError if one is merged."""
        for name, bundle in self._members.items():
            _require_unmerged(name, bundle)
        bundles = list(self._members.values())
        for bundle in bundles:
            bundle.model.to(device)
            # Share again: moving a model may replace its parameters.
            _share_backbone(bundles[0], bundle)
        return self


def load_adapters(bundles: Mapping[str, str | Path | Bundle]) -> AdapterSet:
    """Read bundles that were trained on the same backbone, and keep that backbone in memory once.

    `bundles` holds folders or loaded bundles by name; all are moved to the device of the first.

    Raises:
        UsageError: if no bundle is given.
        ModelError: if one cannot be read, has a backbone of its own, or is merged.
    """
    if not bundles:
        raise UsageError("no bundle was given", where="load_adapters")
    loaded: dict[str, Bundle] = {}
    fingerprint = ""
    for name, source in bundles.items():
        bundle = source if isinstance(source, Bundle) else load_bundle(source)
        where, remedy = f"{name} ({bundle.folder})", "Load it by itself with load_bundle"
        if bundle.content["weights"] == "full":
            text = "its encoder itself was trained, so it has a backbone of its own"
            raise ModelError(text, where=where, expected="an adapter, or a head on a frozen backbone", remedy=remedy)
        _require_unmerged(name, bundle)
        own = tensors_hash(base_encoder_state(unwrap_peft(bundle.model)))
        fingerprint = fingerprint or own
        if own != fingerprint:
            text = f"it was trained on another backbone than {next(iter(loaded))}"
            raise ModelError(text, where=where, got=f"hash {own[:12]}", expected=fingerprint[:12], remedy=remedy)
        loaded[name] = bundle
        first = next(iter(loaded.values()))
        # Share before the next one is read, so that this one's copy of the backbone is freed.
        _share_backbone(first, bundle)
        bundle.model.to(next(first.model.parameters()).device)
    return AdapterSet(loaded)


def _require_unmerged(name: str, bundle: Bundle) -> None:
    if is_merged(bundle.model):
        raise ModelError("the adapter is merged", where=f"{name} ({bundle.folder})", remedy="Call unmerge first")


def _share_backbone(first: Bundle, other: Bundle) -> None:
    """Replace the other model's encoder weights with the equal ones of the first."""
    shared = {name: getattr(module, key) for name, module, key in _base_parameters(unwrap_peft(first.model))}
    for name, module, key in _base_parameters(unwrap_peft(other.model)):
        setattr(module, key, shared[name])


def _base_parameters(body: Any) -> Iterator[tuple[str, nn.Module, str]]:
    """The base weights of an encoder: name before adaptation, module, and attribute of the module."""
    for path, module in body.encoder.named_modules():
        for key in list(module._parameters):
            name = strip_adapter_name(f"{path}.{key}")
            if name is not None and module._parameters[key] is not None:
                yield name, module, key
