"""Loading of saved BrainFound models, with every weight accounted for.

The library warns about weights that a file lacks and goes on with random ones. Here they are refused,
except those of parts that the caller asked to be new.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from brainfound.errors import ModelError
from brainfound.models.backbone import LOAD_FAILURES, list_keys, require_coverage, require_findable, unreadable
from brainfound.models.configuration import BrainFoundConfig
from brainfound.models.quiet import transformers_quiet


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
        ModelError: if the model cannot be read, or weights are missing or left over.
    """
    wants_info = options.pop("output_loading_info", False)
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
    try:
        with transformers_quiet():
            model, info = load(source, *args, output_loading_info=True, **options)
    except LOAD_FAILURES as error:
        raise unreadable(source, error) from error
    new_parts = _new_parts(kind, model.config, saved)
    missing = [key for key in info["missing_keys"] if not _is_part(key, new_parts)]
    require_coverage(source, missing, total=len(model.state_dict()))
    left_over = [key for key in info["unexpected_keys"] if not _is_part(key, new_parts)]
    if left_over:
        raise ModelError(
            f"the checkpoint holds {len(left_over)} weights that the model has no place for: {list_keys(left_over)}",
            where=source,
            remedy="Load it with the class and the configuration that it was saved with",
        )
    _move_off_the_file(model)
    if stem not in (None, saved.stem):
        model.config.stem = stem
        model.config.require_valid()
        model.encoder.change_stem(model.config)
    return (model, info) if wants_info else model


@torch.no_grad()
def _move_off_the_file(model: PreTrainedModel) -> None:
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
        raise unreadable(source, error) from error
    if not content:  # what the library answers for a folder without config.json
        raise unreadable(source, FileNotFoundError(source))
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
    if (config.aggregator, config.aggregator_layers) != (saved.aggregator, saved.aggregator_layers):
        parts += ("aggregator",)
    fields = ("decoder", "decoder_slice_mixing", "decoder_width", "resolved_decoder_layers")
    if any(getattr(config, field) != getattr(saved, field) for field in fields):
        parts += ("decoder",)
    return parts


def _is_part(key: str, parts: tuple[str, ...]) -> bool:
    return key.removeprefix("brainfound.").split(".")[0] in parts
