"""Bundles: an adapted model as one folder, saved and loaded as one unit.

A bundle holds the trained weights, the configuration, the preprocessing, the labels, and either its base or the base's
Hub id with a hash of its weights, but no pickles. A new bundle is loaded again and must reproduce the model's outputs.

    bundle.json            schema, task, labels, base, versions, metadata, a hash of every other file but README.md
    config.json            the model's configuration
    preprocessing.json     the preprocessing of the scans
    input_contract.json    statistics of the scans (optional)
    training_history.json  hashes of the subjects of every training (optional)
    adapter_config.json, adapter_model.safetensors   the low-rank updates and the modules trained with them
    trained.safetensors    instead of an adapter: the trained weights, if the encoder stayed frozen
    model.safetensors      instead of both: all weights, if the encoder itself was trained
    frozen_baseline.safetensors   the linear model on the untouched encoder (optional)
    base/                  the encoder that the adapter was trained on, unless it is on the Hub
    README.md              the model card (optional); the only file that may be edited later
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from brainfound.adapters.bundle_reader import (
    BASELINE_FILE,
    MODEL_CLASSES,
    SCHEMA_VERSION,
    TRAINED_FILE,
    base_encoder_state,
    file_hash,
    is_encoder_key,
    load_bundle,
    tensors_hash,
)
from brainfound.adapters.low_rank import convert_pissa_to_lora, principal_start
from brainfound.data.checking.contract import InputContract
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.splits.training_history import TrainingHistory
from brainfound.errors import ModelError
from brainfound.models import BrainFoundConfig, BrainFoundModel
from brainfound.models.model_folder import (
    is_hub_id,
    make_draft_name,
    recover_folder,
    replace_folder,
    silence_transformers,
)
from brainfound.models.stack_prediction import unwrap_peft
from brainfound.report.cards import write_model_card

_TOLERANCE = 1e-5
# A reloaded pissa weight sums the same terms in another order, in every block.
_TOLERANCE_AFTER_PISSA = 1e-3


def save_bundle(
    folder: str | Path,
    model: Any,
    *,
    preprocessing: Preprocessing,
    labels: Mapping[str, Any],
    contract: InputContract | None = None,
    metadata: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
    baseline: Mapping[str, Tensor] | None = None,
    history: TrainingHistory | None = None,
    example: Mapping[str, Tensor] | None = None,
    copy_base: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a bundle, load it again and compare the outputs.

    Args:
        folder: where to write; it appears only when everything is written and checked.
        model: a BrainFound model, with or without an adapter, in float32.
        labels: the meaning of the outputs, as plain values.
        contract: statistics of the training scans.
        metadata: further plain values (metrics, the data's hash).
        card: facts for a model card (see `brainfound.report.cards`); None writes no card.
        baseline: the linear model on the untouched encoder.
        history: the subjects of every training of the weights.
        example: inputs of the model for the comparison; None uses small random ones.
        copy_base: put the base into the bundle even if it came from the Hub.
        overwrite: replace an existing bundle.

    Raises:
        ModelError: if the model cannot be bundled, the folder is taken, or the reloaded outputs differ.
    """
    folder = Path(folder)
    recover_folder(folder)
    is_taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if is_taken and not (overwrite and (folder / "bundle.json").is_file()):
        remedy = "Choose a new folder, or overwrite a bundle"
        raise ModelError("the folder is taken", where=folder, remedy=remedy, usage=True)
    body = unwrap_peft(model)
    _require_bundlable(body, preprocessing)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = make_draft_name(folder)
    draft.mkdir()
    try:
        if contract is not None:
            contract.save(draft)
        if history is not None:
            history.save(draft)
        if baseline:
            save_file({name: tensor.contiguous() for name, tensor in baseline.items()}, draft / BASELINE_FILE)
        preprocessing.save(draft)
        with silence_transformers():
            _write(draft, model, dict(labels), dict(metadata or {}), copy_base)
        if card is not None:
            write_model_card(draft, {"name": folder.resolve().parent.name, **card})
        _require_same_outputs(draft, model, example)
        replace_folder(folder, draft)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _require_bundlable(body: Any, preprocessing: Preprocessing) -> None:
    if type(body) not in MODEL_CLASSES.values():
        expected = ", ".join(kind.__name__ for kind in MODEL_CLASSES.values())
        raise ModelError(f"a {type(body).__name__} cannot be bundled", expected=expected, remedy="Give such a model")
    got, expected = ", ".join(preprocessing.contrasts), ", ".join(body.config.contrasts)
    if got != expected:
        text = "the preprocessing and the model have different contrasts"
        remedy = "Save the preprocessing that the model was trained with"
        raise ModelError(text, got=got, expected=expected, remedy=remedy)
    other = sorted({str(parameter.dtype) for parameter in body.parameters()} - {"torch.float32"})
    if other:
        raise ModelError("a bundle holds float32 weights", got=", ".join(other), remedy="Convert with model.float()")


def _write(draft: Path, model: Any, labels: dict[str, Any], metadata: dict[str, Any], copy_base: bool) -> None:
    body = unwrap_peft(model)
    body.config.architectures = [type(body).__name__]
    body.config.save_pretrained(draft)
    if isinstance(model, PeftModel):
        weights = "adapter"
        _write_adapter(draft, model)
    elif any(parameter.requires_grad for parameter in body.encoder.parameters()):
        weights = "full"
        body.save_pretrained(draft)
    else:
        weights = "trained"
        own = {name: value for name, value in body.state_dict().items() if not is_encoder_key(name)}
        save_file({name: value.detach().cpu().contiguous() for name, value in own.items()}, draft / TRAINED_FILE)
    base = None if weights == "full" else _write_base(draft, body, copy_base)
    files = sorted(path for path in draft.rglob("*") if path.is_file())  # all are written by now
    content = {
        "schema_version": SCHEMA_VERSION,
        "task": next(task for task, kind in MODEL_CLASSES.items() if type(body) is kind),
        "weights": weights,
        "labels": labels,
        "base": base,
        "versions": {name: version(name) for name in ("brainfound", "torch", "transformers", "peft")},
        "metadata": metadata,
        "files": {path.relative_to(draft).as_posix(): file_hash(path) for path in files},
    }
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        what, remedy = (
            f"labels and metadata must be plain values: {error}",
            "Give text, finite numbers, lists and dicts",
        )
        raise ModelError(what, where=draft.name, remedy=remedy) from error
    (draft / "bundle.json").write_text(text + "\n", encoding="utf-8")


def _write_adapter(draft: Path, model: PeftModel) -> None:
    model.save_pretrained(str(draft), safe_serialization=True, save_embedding_layers=False)
    (draft / "README.md").unlink(missing_ok=True)
    convert_pissa_to_lora(draft, unwrap_peft(model))
    path = draft / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # bundle.json describes the base; here it would be a path on the training machine.
    settings["base_model_name_or_path"] = None
    # PEFT keeps a set, whose order differs from process to process.
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_base(draft: Path, body: Any, copy_base: bool) -> dict[str, Any]:
    """Describe the encoder under the adapter, and write it into the bundle unless the Hub has it."""
    encoder = base_encoder_state(body)
    record: dict[str, Any] = {"sha256": tensors_hash(encoder)}
    loaded_from = body.config.name_or_path
    source = loaded_from or body.config.backbone_source
    if source and is_hub_id(source) and not copy_base:
        return {**record, "source": "hub", "id": source, "is_brainfound": bool(loaded_from)}
    # Without aggregator weights: the trained ones are in the adapter.
    config = BrainFoundConfig.from_dict({**body.config.to_dict(), "aggregator": "mean"})
    with torch.device("meta"):
        base = BrainFoundModel(config)
    base.encoder.load_state_dict(encoder, assign=True)
    base.save_pretrained(draft / "base")
    return {**record, "source": "folder"}


def _require_same_outputs(draft: Path, model: Any, example: Mapping[str, Tensor] | None) -> None:
    body = unwrap_peft(model)
    device = next(body.parameters()).device
    was_training = model.training
    if example is None:
        shape = (1, 3, len(body.encoder.contrasts), *2 * [4 * body.encoder.patch_size])
        example = {"pixel_values": torch.rand(shape, generator=torch.Generator().manual_seed(0))}
    inputs = {name: value.cpu() for name, value in example.items() if name != "labels"}
    # Loading draws random weights first; the caller's random state must not change.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        reloaded = load_bundle(draft).model
        model.eval().cpu()
        try:
            expected, got = model(**inputs), reloaded(**inputs)
        finally:
            model.to(device).train(was_training)
    resummed = any(principal_start(module) is not None for module in body.modules())
    tolerance = _TOLERANCE_AFTER_PISSA if resummed else _TOLERANCE
    for name, value in expected.items():
        if not torch.allclose(got[name], value, atol=tolerance, rtol=tolerance, equal_nan=True):
            raise ModelError(
                f"the reloaded bundle answers differently in {name}",
                where=draft.name,
                got=f"a difference of {(got[name] - value).abs().max().item():.2g}",
                expected=f"at most {tolerance:g}",
                remedy="The base changed since it was loaded, or weights outside the adapter were trained; "
                "save with copy_base=True or train with the method 'full'",
            )
