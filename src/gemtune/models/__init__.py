"""Gemma 4: reading a checkpoint, or building a model from a seed; naming its parts."""

from gemtune.models.gemma4 import ModelConfig, Processing, load_model, load_processing
from gemtune.models.parts import (
    PARTS,
    base_model,
    freeze,
    part_parameters,
    trained_modalities,
)

__all__ = [
    "PARTS",
    "ModelConfig",
    "Processing",
    "base_model",
    "freeze",
    "load_model",
    "load_processing",
    "part_parameters",
    "trained_modalities",
]
