"""What an exported model is tried on: a text, an image, and every expert."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from gemtune.export.stock_reader import logits_of, patches_of, rendered, routed, routers
from gemtune.models import Processing

MESSAGES = [
    {"role": "user", "content": "Which numbers are prime: 7, 21, 97? Réponds in one line. 你好!"}
]
_RANDOM_IDS = 48
_IMAGE_SIZE = (96, 144)  # height, width: whole soft tokens for every patch size in use
_SEED = 20


@dataclass
class Pass:
    """One row through the model."""

    name: str
    inputs: dict[str, torch.Tensor]
    routes: list[torch.Tensor] = field(default_factory=list)
    """[T, K] experts of each token, for each layer with experts."""
    evenly: bool = False
    """Whether those weigh alike, whatever the router says."""


@dataclass
class Probe:
    """What both sides compute."""

    ids: list[int]
    """Of `MESSAGES`."""
    image: np.ndarray | None
    """[H, W, 3] bytes."""
    patches: dict[str, torch.Tensor]
    passes: list[Pass]

    def logits(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Pass -> [S, V] float32, by the routes of the probe."""
        found = {}
        for each in self.passes:
            with routed(model, each.routes or None, evenly=each.evenly):
                found[each.name] = logits_of(model, each.inputs)
        return found


def make_probe(model: nn.Module, processing: Processing) -> Probe:
    """A conversation and random tokens; an image where the model sees; and for a mixture of experts
    a row in which every expert of every layer is used, each with the same weight.

    A text and an image reach the experts that the training model sends them to; others would go
    untried, or weigh nothing.
    """
    config, generator = processing.model_config, np.random.default_rng(_SEED)
    num_experts = getattr(config.text_config, "num_experts", None) or 0
    per_token = getattr(config.text_config, "top_k_experts", None) or 1
    num_random = max(_RANDOM_IDS, math.ceil(num_experts / per_token))
    ids = rendered(processing.tokenizer, MESSAGES)
    text = [*ids, *_random_ids(processing, generator, num_random)]
    passes = [Pass("text", _inputs(text, config))]
    image, patches = None, {}
    if getattr(config, "vision_config", None) is not None:
        image = generator.integers(0, 256, (*_IMAGE_SIZE, 3), dtype=np.uint8)
        patches = patches_of(processing.image_processor, image)
        pooled = processing.image_processor.pooling_kernel_size**2
        num_soft = int((patches["image_position_ids"][0, :, 0] >= 0).sum()) // pooled
        row = [config.boi_token_id, *[config.image_token_id] * num_soft, config.eoi_token_id]
        passes.append(Pass("image", _inputs([*row, *text], config) | patches))
    if routers(model):
        for each in passes:
            with routed(model, None) as chosen:
                logits_of(model, each.inputs)
            each.routes = list(chosen)
        passes.append(_every_expert(passes[0], num_experts))
    return Probe(ids, image, patches, passes)


def _every_expert(text: Pass, num_experts: int) -> Pass:
    """The tokens of the text, dealt out to the experts in turn."""
    routes = [
        (torch.arange(route.numel()) % num_experts).reshape(route.shape) for route in text.routes
    ]
    return Pass("experts", text.inputs, routes, evenly=True)


def _random_ids(processing: Processing, generator: np.random.Generator, count: int) -> list[int]:
    """Tokens of the vocabulary that stand for no medium and for no turn."""
    tokenizer, config = processing.tokenizer, processing.model_config
    kept_out = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    names = [f"{kind}_token_id" for kind in ("image", "video", "audio", "boi", "eoi")]
    kept_out |= {getattr(config, name, None) for name in names}
    size = min(len(tokenizer), config.text_config.vocab_size)
    usable = np.array([number for number in range(size) if number not in kept_out])
    return generator.choice(usable, count).tolist()


def _inputs(ids: list[int], config: Any) -> dict[str, torch.Tensor]:
    row = torch.tensor([ids])
    return {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "mm_token_type_ids": (row == config.image_token_id).long(),
    }
