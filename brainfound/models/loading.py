"""Loading of saved BrainFound models, and of the initial model of a training run.

Transformers warns about weights that a file lacks and leaves them random. Here this is an error, except in parts that
the caller wants new. A saved head with different outputs than requested is refused even if its shape fits.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from brainfound.data.splits.training_history import HISTORY_FILE, TrainingHistory
from brainfound.errors import ModelError, UsageError
from brainfound.models.backbones import FAMILIES, get_patch_size
from brainfound.models.configuration import BrainFoundConfig, config_fields
from brainfound.models.model_folder import (
    find_file,
    list_keys,
    reading_model,
    require_coverage,
    require_findable,
    require_finite,
    silence_transformers,
    unreadable_model_error,
)

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)

_OUTPUT_LAYERS = {
    "BrainFoundForClassification": "head.score",
    "BrainFoundForRegression": "head.score",
    "BrainFoundForSegmentation": "decoder.score",
}
# Configuration fields → the parts that are initialised anew if one of them differs.
_CHANGED_PARTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("aggregator", "aggregator_layers", "aggregator_width"): ("aggregator",),
    ("embedding_size",): ("aggregator", "head"),
    ("volume_embedding_size", "head_norm"): ("head",),
    ("decoder", "decoder_slice_mixing", "decoder_width", "resolved_decoder_layers"): ("decoder",),
}


def load_initial_model(kind: type[AnyModel], source: str | Path, contrasts: Sequence[str], **fields: Any) -> AnyModel:
    """Build a model from a plain ViT or a BrainFound model, with new parts around its weights.

    `fields` are those of `BrainFoundConfig`.

    Raises:
        ModelError: if the source cannot be used.
        UsageError: if the contrasts of a BrainFound model, or their order, differ from the data's.
    """
    cls: Any = kind
    if not is_brainfound(source):
        return cls.from_backbone(source, contrasts=contrasts, **fields)
    # A head with different outputs is reinitialised with a warning.
    model = cls.from_pretrained(source, ignore_mismatched_sizes=True, **fields)
    _require_contrasts(source, model.config.contrasts, contrasts)
    return model


def is_brainfound(source: str | Path) -> bool:
    """Whether a Hub id or folder holds a BrainFound model (else it should be a plain ViT)."""
    require_findable(str(source))
    with reading_model(str(source)):
        content, _ = PreTrainedConfig.get_config_dict(str(source))
    return content.get("model_type") == BrainFoundConfig.model_type


def require_start(source: str | Path) -> None:
    """Refuse what is plainly no model to start from, before anything else is read; ModelError as when it is loaded."""
    is_brainfound(source)
    folder = Path(source)
    is_bundle = (folder / "bundle.json").is_file() and not (folder / "model.safetensors").is_file()
    if is_bundle or (folder.is_dir() and not any(folder.glob("*.safetensors"))):
        raise unreadable_model_error(str(source), FileNotFoundError())


def read_history(source: str | Path) -> TrainingHistory:
    """The recorded training of an initial model, a folder or a Hub id; empty if nothing is recorded.

    Without an answer of the Hub and nothing in its cache it is empty too, with a warning for a BrainFound model.
    """
    try:
        found = find_file(str(source), HISTORY_FILE)
    except OSError:
        if is_brainfound(source):
            unknown = "whether it was trained on these subjects is not known"
            warnings.warn(f"{HISTORY_FILE} of {source} cannot be fetched: {unknown}", stacklevel=2)
        return TrainingHistory()
    return TrainingHistory() if found is None else TrainingHistory.load(Path(found).parent)


def read_patch_size(source: str | Path, contrasts: Sequence[str]) -> int | None:
    """The patch size of an initial model, read from its configuration; None if its family is unsupported.

    Raises as `load_initial_model`, which also refuses unsupported families.
    """
    config = read_backbone_config(source, contrasts)
    return get_patch_size(config) if config.model_type in FAMILIES else None


def read_backbone_config(source: str | Path, contrasts: Sequence[str]) -> PreTrainedConfig:
    """The configuration of the 2-D ViT of an initial model; raises as `load_initial_model`."""
    is_ours = is_brainfound(source)
    with reading_model(str(source)):
        config = (BrainFoundConfig if is_ours else AutoConfig).from_pretrained(str(source))
    if not is_ours:
        return config
    _require_contrasts(source, config.contrasts, contrasts)
    return config.backbone_config


def _require_contrasts(source: str | Path, own: Sequence[str], given: Sequence[str]) -> None:
    if tuple(own) != tuple(given):
        raise UsageError(
            "the model and the data have other contrasts, or the same ones in another order",
            where=source,
            got=", ".join(given),
            expected=", ".join(own),
            remedy=f"Prepare the data with --contrasts {','.join(own)}",
        )


def load_checked(
    kind: type[PreTrainedModel], load: Callable[..., Any], source: str, args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """Load with `load`, the transformers `from_pretrained` of `kind`, then check the result.

    Returns and raises as `BrainFoundPreTrainedModel.from_pretrained`; with `output_loading_info` it also returns the
    loading info.
    """
    wants_info = options.pop("output_loading_info", False)
    allows_new_head = options.pop("ignore_mismatched_sizes", False)
    stem = options.pop("stem", None)
    if options.get("use_safetensors") is False:
        remedy = "Leave use_safetensors out, and give a model with safetensors"
        raise ModelError("pickled weights are refused because they can run code", where=source, remedy=remedy)
    options = {"dtype": torch.float32, **options, "use_safetensors": True}
    saved = _read_saved_config(source, options)
    given = options.get("config")
    if isinstance(given, BrainFoundConfig) and given.stem != saved.stem:
        stem = stem or given.stem
        # Weights are loaded with the saved stem, which is changed afterwards.
        options["config"] = copy.deepcopy(given)
        options["config"].stem = saved.stem
    saved_head = requested_head = ""
    if kind.__name__ in (saved.architectures or ()) and kind.__name__ in _OUTPUT_LAYERS:
        saved_head = _describe_head(kind, saved)
        requested_head = _describe_head(kind, _requested_config(saved, options))
    if saved_head != requested_head and not allows_new_head:
        raise ModelError(
            "the saved head has other outputs than requested",
            where=source,
            got=requested_head,
            expected=saved_head,
            remedy="Load it as it was saved, or give ignore_mismatched_sizes=True for a new last layer",
        )
    with reading_model(source), silence_transformers():
        # Mismatched shapes are refused below, with the names of the weights.
        model, info = load(source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    new_parts = _new_parts(kind, model.config, saved)
    if saved_head != requested_head:
        new_parts += (_OUTPUT_LAYERS[kind.__name__],)
        _reinitialise(model, _OUTPUT_LAYERS[kind.__name__])
        heads = f"the saved one has {saved_head}, the requested one {requested_head}"
        warnings.warn(f"{source}: the head gets new weights, because {heads}", stacklevel=3)

    def is_kept(key: str) -> bool:
        name = key.removeprefix("brainfound.")
        return not any(name == part or name.startswith(f"{part}.") for part in new_parts)

    _require_same_shapes(source, sorted(entry for entry in info["mismatched_keys"] if is_kept(entry[0])))
    require_coverage(source, filter(is_kept, info["missing_keys"]), total=len(model.state_dict()))
    left_over = list(filter(is_kept, info["unexpected_keys"]))
    if left_over:
        raise ModelError(
            f"the checkpoint holds {len(left_over)} weights that the model has no place for: {list_keys(left_over)}",
            where=source,
            remedy="Load it with the class and the configuration that it was saved with",
        )
    require_finite(source, model.state_dict())
    _copy_out_of_mmap(model)
    if stem not in (None, saved.stem):
        model.config.stem = stem
        model.config.require_valid()
        model.encoder.change_stem(model.config)
    return (model, info) if wants_info else model


def _requested_config(saved: BrainFoundConfig, options: dict[str, Any]) -> BrainFoundConfig:
    if isinstance(options.get("config"), BrainFoundConfig):
        return options["config"]
    fields = {name: options[name] for name in config_fields() if name in options}
    requested: BrainFoundConfig = BrainFoundConfig.from_dict(saved.to_dict(), **fields)
    requested.require_valid()
    return requested


def _describe_head(kind: type, config: BrainFoundConfig) -> str:
    """Describe the outputs and input of a head; a saved head can be used if the descriptions are the same."""
    if kind.__name__ == "BrainFoundForSegmentation":
        return f"{config.num_classes} {'overlapping labels' if config.overlapping_labels else 'classes'}"
    if kind.__name__ == "BrainFoundForClassification":
        several = config.problem_type == "multi_label_classification"
        outputs = f"{config.num_classes} {'labels of yes or no' if several else 'classes'}"
    elif config.regression_head == "bins":
        assert config.regression_range is not None, "the configuration was checked"
        low, high = config.regression_range
        outputs = f"{config.regression_bins} bins from {low:g} to {high:g}"
    else:
        outputs = f"a {config.regression_head} head"
    features = config.describe_features()
    return outputs if features == "cls" else f"{outputs} on {features}"


@torch.no_grad()
def _reinitialise(model: PreTrainedModel, layer: str) -> None:
    """Initialise the weights of a layer as if they had not been loaded."""
    module = model.get_submodule(layer)
    for parameter in module.parameters():
        # Transformers skips the weights that carry this flag.
        parameter._is_hf_initialized = False  # type: ignore[attr-defined]
    model._init_weights(module)


def _require_same_shapes(source: str, mismatched: list[tuple[Any, ...]]) -> None:
    if mismatched:
        _, saved, wanted = mismatched[0]
        keys = list_keys(key for key, *_ in mismatched)
        raise ModelError(
            f"{len(mismatched)} weights have another shape than the model's: {keys}",
            where=source,
            got=f"{tuple(saved)} for the first",
            expected=tuple(wanted),
            remedy="Load it with the configuration that it was saved with",
        )


@torch.no_grad()
def _copy_out_of_mmap(model: PreTrainedModel) -> None:
    """Copy the weights on the CPU out of the memory-mapped file, which may be overwritten.

    Weights in the file are aligned to four bytes only, and matrix products on such memory round differently.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _read_saved_config(source: str, options: dict[str, Any]) -> BrainFoundConfig:
    require_findable(source)
    names = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
    hub_options = {name: options[name] for name in names if name in options}
    with reading_model(source):
        content, _ = BrainFoundConfig.get_config_dict(source, **hub_options)
    if not content:  # what transformers returns for a folder without config.json
        raise unreadable_model_error(source, FileNotFoundError(source))
    if content.get("model_type") != BrainFoundConfig.model_type:
        raise ModelError(
            f"this is a plain {content.get('model_type') or 'model'}, not a BrainFound model",
            where=source,
            remedy="Train from it first: brainfound finetune or pretrain; in Python: from_backbone",
            usage=True,
        )
    return BrainFoundConfig.from_dict(content)


def _new_parts(kind: type, config: BrainFoundConfig, saved: BrainFoundConfig) -> tuple[str, ...]:
    """The top-level parts that may differ from the file, because another class or configuration is requested."""
    parts: tuple[str, ...] = () if kind.__name__ in (saved.architectures or ()) else ("head", "decoder")
    for fields, changed in _CHANGED_PARTS.items():
        if any(getattr(config, field) != getattr(saved, field) for field in fields):
            parts += changed
    return parts
