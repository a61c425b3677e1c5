"""The parts of a Gemma 4 by name, so that nothing else has to know its module tree."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# Prefixes below Gemma4ForConditionalGeneration. The per-layer-embedding table ("ple") is a part of
# its own because it holds 46% of E2B and is rarely trained; its projections belong to the decoder.
PARTS: dict[str, tuple[str, ...]] = {
    "embeddings": ("model.language_model.embed_tokens.", "lm_head."),
    "ple": ("model.language_model.embed_tokens_per_layer.",),
    "language": ("model.language_model.",),
    "vision": ("model.vision_tower.",),
    "audio": ("model.audio_tower.",),
    "projector": ("model.embed_vision.", "model.embed_audio."),
}


def part_of(parameter_name: str) -> str:
    """The part that a parameter of the unwrapped model belongs to ("language" comes last)."""
    for part, prefixes in PARTS.items():
        if part != "language" and parameter_name.startswith(prefixes):
            return part
    return "language"


def part_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part -> (parameters, trainable parameters), parts without parameters left out."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        total, trainable = counts.get(part_of(name), (0, 0))
        size = num_values(parameter)
        counts[part_of(name)] = (total + size, trainable + size * parameter.requires_grad)
    return counts


def num_values(parameter: nn.Parameter) -> int:
    """How many numbers it stands for; bitsandbytes packs two of 4 bits into one."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Take the named parts out of training. A part that the model lacks is nothing to freeze."""
    parts = set(parts)
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)


def trained_modalities(model: nn.Module) -> set[str]:
    """Of "vision" and "audio", those with a parameter, adapter or not, that is trained."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return {kind for kind in ("vision", "audio") if any(kind in name for name in trained)}


def base_model(model: nn.Module) -> nn.Module:
    """The model below the LM head: its output is the last hidden state."""
    return model.model
