"""Where a model starts: a plain ViT, or a BrainFound model that was trained before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from brainfound.errors import ModelError
from brainfound.models.backbone import LOAD_FAILURES, unreadable
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
        raise unreadable(str(source), error) from error
    return content.get("model_type") == BrainFoundConfig.model_type


def start_from(kind: type[AnyModel], source: str | Path, contrasts: Sequence[str], **fields: Any) -> AnyModel:
    """A model of a class, with the weights of a plain ViT or of a BrainFound model and new parts around them.

    Args:
        kind: one of the BrainFound models.
        source: Hub id or folder.
        contrasts: those of the data; a BrainFound model must have the same ones in the same order.
        fields: of `BrainFoundConfig`.

    Raises:
        ModelError: if the source cannot be used, or its contrasts are others.
    """
    if not is_brainfound(source):
        return kind.from_backbone(source, contrasts=contrasts, **fields)
    model = kind.from_pretrained(source, **fields)
    if tuple(model.config.contrasts) != tuple(contrasts):
        raise ModelError(
            "the model and the data have other contrasts",
            where=source,
            got=", ".join(contrasts),
            expected=", ".join(model.config.contrasts),
            remedy=f"Prepare the data with --contrasts {','.join(model.config.contrasts)}",
        )
    return model
