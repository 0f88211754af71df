"""Loading of saved BrainFound models, with every weight accounted for.

The library warns about weights that a file lacks and goes on with random ones. Here they are refused,
except those of parts that the caller asked to be new. A saved head whose answers mean something else than
those asked for is refused too, also where its shape would fit.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from brainfound.errors import ModelError
from brainfound.models.backbones import (
    LOAD_FAILURES,
    list_keys,
    require_coverage,
    require_findable,
    unreadable_model_error,
)
from brainfound.models.configuration import BrainFoundConfig, config_fields, silence_transformers

_OUTPUT_LAYERS = {
    "BrainFoundForClassification": "head.score",
    "BrainFoundForRegression": "head.score",
    "BrainFoundForSegmentation": "decoder.score",
}


def load_checked(
    kind: type[PreTrainedModel],
    load: Callable[..., Any],
    source: str,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """Load with the library's `from_pretrained`, then check what was loaded.

    Args:
        kind: the class that is loaded.
        load: the library's `from_pretrained`, bound to `kind`.
        source: a Hub id or a folder.
        args, options: the caller's further arguments.

    Returns:
        The model, or with `output_loading_info` the model and the library's account, as the library does.

    Raises:
        ModelError: if the model cannot be read, weights are missing, left over or of another shape, or the saved head
            answers another question than the one asked for and `ignore_mismatched_sizes` is not given.
    """
    wants_info = options.pop("output_loading_info", False)
    may_begin_anew = options.pop("ignore_mismatched_sizes", False)
    stem = options.pop("stem", None)
    if options.get("use_safetensors") is False:
        raise ModelError("pickled weights are refused because they can run code", where=source)
    options = {"dtype": torch.float32, **options, "use_safetensors": True}
    saved = _saved_config(source, options)
    given = options.get("config")
    if isinstance(given, BrainFoundConfig) and given.stem != saved.stem:
        stem = stem or given.stem
        # The weights lie there under the stem that they were saved with; afterwards it is changed.
        options["config"] = copy.deepcopy(given)
        options["config"].stem = saved.stem
    difference = _find_head_mismatch(kind, saved, _asked_config(saved, options))
    if difference and not may_begin_anew:
        raise ModelError(
            "the saved head gives other answers than those asked for",
            where=source,
            got=difference[1],
            expected=difference[0],
            remedy="Load it as it was saved, or give ignore_mismatched_sizes=True: then its last layer begins anew",
        )
    try:
        with silence_transformers():
            # Weights of another shape are looked at below, where they can be named.
            model, info = load(source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except LOAD_FAILURES as error:
        raise unreadable_model_error(source, error) from error
    new_parts = _new_parts(kind, model.config, saved)
    if difference:
        new_parts += (_OUTPUT_LAYERS[kind.__name__],)
        _reinitialise(model, _OUTPUT_LAYERS[kind.__name__])
        warnings.warn(
            f"{source}: the head begins anew, because the saved one has {difference[0]} and {difference[1]} are wanted",
            stacklevel=3,
        )
    _require_same_shapes(source, info["mismatched_keys"], new_parts)
    missing = [key for key in info["missing_keys"] if not _is_part(key, new_parts)]
    require_coverage(source, missing, total=len(model.state_dict()))
    left_over = [key for key in info["unexpected_keys"] if not _is_part(key, new_parts)]
    if left_over:
        raise ModelError(
            f"the checkpoint holds {len(left_over)} weights that the model has no place for: {list_keys(left_over)}",
            where=source,
            remedy="Load it with the class and the configuration that it was saved with",
        )
    _copy_out_of_mmap(model)
    if stem not in (None, saved.stem):
        model.config.stem = stem
        model.config.require_valid()
        model.encoder.change_stem(model.config)
    return (model, info) if wants_info else model


def _asked_config(saved: BrainFoundConfig, options: dict[str, Any]) -> BrainFoundConfig:
    """The configuration that the model will have."""
    given = options.get("config")
    if isinstance(given, BrainFoundConfig):
        return given
    fields = {name: options[name] for name in config_fields() if name in options}
    asked: BrainFoundConfig = BrainFoundConfig.from_dict(saved.to_dict(), **fields)
    asked.require_valid()
    return asked


def _find_head_mismatch(kind: type, saved: BrainFoundConfig, asked: BrainFoundConfig) -> tuple[str, str] | None:
    """What the saved head answers and what is asked for, in words, where the two differ and the head is not new."""
    if kind.__name__ not in (saved.architectures or ()) or kind.__name__ not in _OUTPUT_LAYERS:
        return None
    known, wanted = _describe_head(kind, saved), _describe_head(kind, asked)
    return None if known == wanted else (known, wanted)


def _describe_head(kind: type, config: BrainFoundConfig) -> str:
    """What the last layer of a head class gives, of what; where the words are the same, saved scores can be used."""
    if kind.__name__ == "BrainFoundForSegmentation" or config.slice_features == "cls":
        return _describe_output(kind, config)
    return f"{_describe_output(kind, config)} on {config.slice_features}"


def _describe_output(kind: type, config: BrainFoundConfig) -> str:
    if kind.__name__ == "BrainFoundForRegression":
        if config.regression_head == "bins":
            assert config.regression_range is not None, "the configuration was checked"
            low, high = config.regression_range
            return f"{config.regression_bins} bins from {low:g} to {high:g}"
        return f"a {config.regression_head} head"
    if kind.__name__ == "BrainFoundForSegmentation":
        return f"{config.num_classes} {'overlapping labels' if config.overlapping_labels else 'classes'}"
    several = config.problem_type == "multi_label_classification"
    return f"{config.num_classes} {'labels of yes or no' if several else 'classes'}"


@torch.no_grad()
def _reinitialise(model: PreTrainedModel, layer: str) -> None:
    """Draw the weights of a layer as if no file had held them."""
    module = model.get_submodule(layer)
    for parameter in module.parameters():
        # The flag by which the library leaves weights alone that it has read.
        parameter._is_hf_initialized = False  # type: ignore[attr-defined]
    model._init_weights(module)


def _require_same_shapes(source: str, mismatched: set[tuple[Any, ...]], new_parts: tuple[str, ...]) -> None:
    others = sorted(entry for entry in mismatched if not _is_part(entry[0], new_parts))
    if others:
        _, saved, wanted = others[0]
        raise ModelError(
            f"{len(others)} weights have another shape than the model's: {list_keys(key for key, *_ in others)}",
            where=source,
            got=f"{tuple(saved)} for the first",
            expected=tuple(wanted),
            remedy="Load it with the configuration that it was saved with",
        )


@torch.no_grad()
def _copy_out_of_mmap(model: PreTrainedModel) -> None:
    """Give each weight that is a view into the mapped file memory of its own.

    In the file weights lie at any multiple of four bytes, and matrix products round differently there:
    a reloaded model would differ in the last bit. A model must also outlive an overwritten file.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _saved_config(source: str, options: dict[str, Any]) -> BrainFoundConfig:
    require_findable(source)
    names = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
    hub_options = {name: options[name] for name in names if name in options}
    try:
        content, _ = BrainFoundConfig.get_config_dict(source, **hub_options)
    except LOAD_FAILURES as error:
        raise unreadable_model_error(source, error) from error
    if not content:  # what the library answers for a folder without config.json
        raise unreadable_model_error(source, FileNotFoundError(source))
    if content.get("model_type") != BrainFoundConfig.model_type:
        raise ModelError(
            f"this is a {content.get('model_type')!r} model, not a BrainFound model",
            where=source,
            remedy="Start from a plain ViT with from_backbone",
        )
    return BrainFoundConfig.from_dict(content)


def _new_parts(kind: type, config: BrainFoundConfig, saved: BrainFoundConfig) -> tuple[str, ...]:
    """The top-level parts that may differ from the file, because another class or configuration was asked for."""
    parts: tuple[str, ...] = ()
    if kind.__name__ not in (saved.architectures or ()):
        parts += ("head", "decoder")
    sizes = ("aggregator", "aggregator_layers", "aggregator_width")
    if any(getattr(config, field) != getattr(saved, field) for field in sizes):
        parts += ("aggregator",)
    if config.embedding_size != saved.embedding_size:
        parts += ("aggregator", "head")
    fields = ("decoder", "decoder_slice_mixing", "decoder_width", "resolved_decoder_layers")
    if any(getattr(config, field) != getattr(saved, field) for field in fields):
        parts += ("decoder",)
    return parts


def _is_part(key: str, parts: tuple[str, ...]) -> bool:
    name = key.removeprefix("brainfound.")
    return any(name == part or name.startswith(f"{part}.") for part in parts)
