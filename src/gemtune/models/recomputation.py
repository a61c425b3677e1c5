"""Which layers keep nothing but their input for the backward pass, and are run again in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gemtune.errors import ConfigError

KINDS = ("sliding", "full", "shared", "vision", "audio")
"""Decoder layers with keys and values of their own by how far they see, those that share the keys
and values of others (the upper ones of E2B and E4B, however far they see), layers of the towers."""

_SEEN = {"sliding_attention": "sliding", "full_attention": "full"}


def recompute(model: nn.Module, kinds: Sequence[str] | None = None) -> None:
    """Have the layers of these kinds recomputed in the backward pass; None: all that there are.

    Gradients stay what they are. Layers of other kinds keep their activations. The audio tower's,
    which transformers (5.23) cannot recompute, are too.

    Non-reentrant: the reentrant kind gives wrong gradients with KV sharing (unsloth-zoo#813).

    Raises:
        ConfigError: a kind that this Gemma4ForConditionalGeneration has no layers of.
    """
    require_kinds(kinds, model.config)
    # Its name in new releases, where the old one warns; before, the old one.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for kind, layer in layers_with_kinds(model):
        is_chosen = kinds is None or kind in kinds
        if hasattr(layer, "gradient_checkpointing"):
            layer.gradient_checkpointing = is_chosen
        elif is_chosen:
            vars(layer)["forward"] = MethodType(_forward_recomputed, layer)


def require_kinds(kinds: Iterable[str] | None, model_config: Any) -> None:
    """Raise ConfigError unless a Gemma 4 of this configuration has layers of each of these kinds.

    A ConfigError says which kinds it has.
    """
    present = kinds_of(model_config)
    for kind in kinds or ():
        if kind not in present:
            raise ConfigError(
                f"model.recomputed_layers names {kind}, and this model has no such layers. It has: "
                f"{', '.join(present)}. Leave {kind} out, or say null for all that there are."
            )


def kinds_of(model_config: Any) -> dict[str, int]:
    """Kind -> number of layers, in the order of KINDS, of the kinds that there are."""
    found = _decoder_kinds(model_config.get_text_config())
    for kind in ("vision", "audio"):
        tower = getattr(model_config, f"{kind}_config")
        found += [kind] * (tower.num_hidden_layers if tower is not None else 0)
    return {kind: found.count(kind) for kind in KINDS if kind in found}


def layers_with_kinds(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(kind, layer) of every layer of a Gemma4ForConditionalGeneration, adapters inside or not."""
    inner = model.model
    kinds = _decoder_kinds(model.config.get_text_config())
    yield from zip(kinds, inner.language_model.layers, strict=True)
    if inner.vision_tower is not None:
        yield from (("vision", layer) for layer in inner.vision_tower.encoder.layers)
    if inner.audio_tower is not None:
        yield from (("audio", layer) for layer in inner.audio_tower.layers)


def _decoder_kinds(text_config: Any) -> list[str]:
    num_own = text_config.num_hidden_layers - text_config.num_kv_shared_layers
    own = [_SEEN[seen] for seen in text_config.layer_types[:num_own]]
    return own + ["shared"] * text_config.num_kv_shared_layers


def _forward_recomputed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Looked up at each call: FSDP2 gives a layer another class. Its hooks stay outside.
    forward = type(self).forward
    if not (self.training and torch.is_grad_enabled()):
        return forward(self, *args, **kwargs)
    return checkpoint(forward, self, *args, use_reentrant=False, **kwargs)
