"""Adapters by peft: which modules they go to, and merging them back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from gemtune.errors import ConfigError
from gemtune.options import option, require_choice, require_range

# Linear layers by part. The towers wrap theirs in a clipped layer whose inner `.linear` is what
# peft can adapt (peft#3129); router, per-layer-embedding projections and head are left out.
_PART_PREFIX = {
    "language": "model.language_model.layers.",
    "vision": "model.vision_tower.encoder.layers.",
    "projector": "model.embed_vision.",
}
_LANGUAGE_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Adapter:
    """No adapter: the parameters themselves are trained."""


@dataclass
class Lora(Adapter):
    """LoRA (arXiv:2106.09685); everything else is frozen."""

    rank: int = option(16, "rank of the update")
    alpha: float = option(32.0, "the update is scaled by alpha / rank")
    dropout: float = option(0.0, "dropout in front of the update")
    parts: list[str] = option(["language"], "language, vision, projector")

    def __post_init__(self) -> None:
        require_range("adapter.rank", self.rank, at_least=1)
        require_range("adapter.alpha", self.alpha, above=0)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter.dropout={self.dropout} must be in [0, 1).")
        if not self.parts:
            raise ConfigError(f"adapter.parts is empty. Parts: {', '.join(_PART_PREFIX)}.")
        for part in self.parts:
            require_choice("adapter.parts", part, _PART_PREFIX)


def attach(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The model with its adapter: peft's wrapper, or the model itself where there is none.

    Raises:
        ConfigError: a part has no linear layer in this model.
    """
    if not isinstance(adapter, Lora):
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=lora_targets(model, adapter.parts),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks for it under its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = get_peft_model(model, config)
    # peft before 0.21 calls the forward of the model inside, past the hooks by which FSDP2 gathers.
    tuner = adapted.base_model
    vars(tuner)["forward"] = MethodType(_call_inside, tuner)
    return adapted


def _call_inside(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self.model(*args, **kwargs)


def lora_targets(model: nn.Module, parts: Iterable[str]) -> list[str]:
    """Full paths of the linear layers of these parts; names alone would hit the towers too."""
    targets: list[str] = []
    for part in parts:
        found = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and name.startswith(_PART_PREFIX[part])
            and (part != "language" or name.rpartition(".")[2] in _LANGUAGE_LAYERS)
        ]
        if not found:
            raise ConfigError(f"adapter.parts names '{part}', but this model has no such layers.")
        targets += found
    return targets


def merge(model: nn.Module) -> nn.Module:
    """The plain model with the adapter added into its weights; a plain model as it is."""
    from peft import PeftModel

    return model.merge_and_unload() if isinstance(model, PeftModel) else model
