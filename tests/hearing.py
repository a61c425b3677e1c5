"""A small checkpoint that hears, for runs which do not."""

from __future__ import annotations

from pathlib import Path

import torch
from exported import processing_of
from gemma4_zoo import build, model_folder
from safetensors.torch import load_file

from gemtune.export import export_model

WITHOUT = "model.audio_tower=false"


def hearing_checkpoint(parent: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A small E2B with an audio tower, every tensor off its initial value, in several shards."""
    processing = processing_of(model_folder("e2b", parent, hears=True))
    return export_model(
        build("e2b", dtype, hears=True),
        processing.tokenizer,
        processing.image_processor,
        parent / "base",
        processing.processor_file,
        shard_bytes=400_000,
    )


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of every safetensors file of a folder."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def is_audio(name: str) -> bool:
    return "audio" in name
