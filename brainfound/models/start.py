"""Where a model starts: a plain ViT, or a BrainFound model that was trained before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, PreTrainedConfig

from brainfound.errors import UsageError
from brainfound.models.backbones import INIT_MODEL_TYPES, LOAD_FAILURES, get_patch_size, unreadable_model_error
from brainfound.models.configuration import BrainFoundConfig
from brainfound.models.model import BrainFoundPreTrainedModel

AnyModel = TypeVar("AnyModel", bound=BrainFoundPreTrainedModel)


def is_brainfound(source: str | Path) -> bool:
    """Whether a Hub id or folder holds a BrainFound model (else it should be a plain ViT).

    Raises:
        ModelError: if its configuration cannot be read.
    """
    try:
        content, _ = PreTrainedConfig.get_config_dict(str(source))
    except LOAD_FAILURES as error:
        raise unreadable_model_error(str(source), error) from error
    return content.get("model_type") == BrainFoundConfig.model_type


def read_patch_size(source: str | Path, contrasts: Sequence[str]) -> int | None:
    """The patch size of a model to start from, which only its configuration is read for.

    Returns:
        None where the source is of no family that a model can start from; `load_initial_model` says so.

    Raises:
        ModelError: if the configuration cannot be read.
        UsageError: if it is a BrainFound model of other contrasts.
    """
    ours = is_brainfound(source)
    folder = Path(source)
    if (folder / "bundle.json").is_file() and not (folder / "model.safetensors").is_file():
        raise unreadable_model_error(str(source), FileNotFoundError())
    try:
        config = (BrainFoundConfig if ours else AutoConfig).from_pretrained(str(source))
    except LOAD_FAILURES as error:
        raise unreadable_model_error(str(source), error) from error
    if ours:
        _require_contrasts(source, config.contrasts, contrasts)
        config = config.backbone_config
    return get_patch_size(config) if config.model_type in INIT_MODEL_TYPES else None


def load_initial_model(kind: type[AnyModel], source: str | Path, contrasts: Sequence[str], **fields: Any) -> AnyModel:
    """A model of a class, with the weights of a plain ViT or of a BrainFound model and new parts around them.

    Args:
        kind: one of the BrainFound models.
        source: Hub id or folder.
        contrasts: those of the data; a BrainFound model must have the same ones in the same order.
        fields: of `BrainFoundConfig`.

    Raises:
        ModelError: if the source cannot be used.
        UsageError: if its contrasts are others.
    """
    if not is_brainfound(source):
        return kind.from_backbone(source, contrasts=contrasts, **fields)
    # A head that answers something else begins anew, and says so.
    model = kind.from_pretrained(source, ignore_mismatched_sizes=True, **fields)
    _require_contrasts(source, model.config.contrasts, contrasts)
    return model


def _require_contrasts(source: str | Path, own: Sequence[str], given: Sequence[str]) -> None:
    if tuple(own) != tuple(given):
        raise UsageError(
            "the model and the data have other contrasts, or the same ones in another order",
            where=source,
            got=", ".join(given),
            expected=", ".join(own),
            remedy=f"Prepare the data with --contrasts {','.join(own)}",
        )
