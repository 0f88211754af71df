"""Models: configuration, backbone, stem, encoder, aggregators, decoders and heads."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForSemanticSegmentation

from brainfound.models.configuration import BrainFoundConfig
from brainfound.models.encoder import SliceEncoder, SliceEncoding
from brainfound.models.model import (
    BrainFoundClassifierOutput,
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
    BrainFoundModel,
    BrainFoundModelOutput,
    BrainFoundRegressionOutput,
    BrainFoundSegmentationOutput,
)

AutoConfig.register(BrainFoundConfig.model_type, BrainFoundConfig, exist_ok=True)
AutoModel.register(BrainFoundConfig, BrainFoundModel, exist_ok=True)
AutoModelForImageClassification.register(BrainFoundConfig, BrainFoundForClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(BrainFoundConfig, BrainFoundForSegmentation, exist_ok=True)

__all__ = [
    "BrainFoundClassifierOutput", "BrainFoundConfig", "BrainFoundForClassification", "BrainFoundForRegression",
    "BrainFoundForSegmentation", "BrainFoundModel", "BrainFoundModelOutput", "BrainFoundRegressionOutput",
    "BrainFoundSegmentationOutput", "SliceEncoder", "SliceEncoding",
]  # fmt: skip
