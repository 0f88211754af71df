"""Models: configuration, backbone, stem, encoder, aggregators, decoders and heads."""

from transformers import AutoConfig, AutoModel

from brainfound.models.configuration import BrainFoundConfig
from brainfound.models.encoder import SliceEncoder, SliceEncoding
from brainfound.models.model import BrainFoundModel, BrainFoundModelOutput

AutoConfig.register(BrainFoundConfig.model_type, BrainFoundConfig, exist_ok=True)
AutoModel.register(BrainFoundConfig, BrainFoundModel, exist_ok=True)

__all__ = [
    "BrainFoundConfig",
    "BrainFoundModel",
    "BrainFoundModelOutput",
    "SliceEncoder",
    "SliceEncoding",
]
