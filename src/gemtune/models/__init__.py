"""Gemma 4: reading a checkpoint, or building a model from a seed; naming its parts."""

from gemtune.models.gemma4 import GemmaBundle, ModelConfig, load
from gemtune.models.parts import PARTS, base_model, freeze, part_parameters

__all__ = ["PARTS", "GemmaBundle", "ModelConfig", "base_model", "freeze", "load", "part_parameters"]
