"""Gemma 4: reading a checkpoint, or building a model from a seed; naming its parts."""

from gemtune.models.audio_tower import has_audio_tower
from gemtune.models.gemma4 import (
    ModelConfig,
    Processing,
    leaves_out_audio,
    load_model,
    load_processing,
    put_back_audio_tower,
)
from gemtune.models.neftune import EmbeddingNoise
from gemtune.models.parts import (
    PARTS,
    base_model,
    freeze,
    part_of,
    part_parameters,
    trained_modalities,
)
from gemtune.models.recomputation import kinds_of
from gemtune.models.stand_in import StandIns, encode_images_in_forward

__all__ = [
    "PARTS",
    "EmbeddingNoise",
    "ModelConfig",
    "Processing",
    "StandIns",
    "base_model",
    "encode_images_in_forward",
    "freeze",
    "has_audio_tower",
    "kinds_of",
    "leaves_out_audio",
    "load_model",
    "load_processing",
    "part_of",
    "part_parameters",
    "put_back_audio_tower",
    "trained_modalities",
]
