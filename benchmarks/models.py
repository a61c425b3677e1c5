"""Gemma 4 models of a given shape with random weights, and batches with images for them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from settings import Settings
from torch import Tensor, nn

import gemtune
from gemtune.models import PARTS, freeze
from gemtune.models.recomputation import recompute
from gemtune.options import require_choice

SHAPES = Path(__file__).resolve().parent / "shapes"
TINY = Path(gemtune.__file__).parent / "assets" / "tiny" / "config.json"
BATCHES = {
    "tiny": {"rows": 2, "text_tokens": 48, "images_per_row": 2, "soft_tokens": 12},
    "e2b_small": {"rows": 2, "text_tokens": 128, "images_per_row": 1, "soft_tokens": 70},
    "e4b_small": {"rows": 2, "text_tokens": 128, "images_per_row": 1, "soft_tokens": 70},
    "e2b_quarter": {"rows": 2, "text_tokens": 512, "images_per_row": 0, "soft_tokens": 70},
    "e2b": {"rows": 4, "text_tokens": 1024, "images_per_row": 2, "soft_tokens": 280},
    "e4b": {"rows": 4, "text_tokens": 1024, "images_per_row": 2, "soft_tokens": 280},
}
# Width to height. The processor scales each image up to its budget and keeps the ratio.
ASPECT_RATIOS = (4 / 3, 1.0, 3 / 4, 16 / 9, 2 / 3, 3.0)
POOLING = 3  # patches along each side of a soft token
LORA_RANK = 16
LORA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIRST_TEXT_ID = 32  # special tokens of the small shapes are below
LAST_TEXT_ID = 250_000  # those of the real ones are above


def shape(size: str) -> dict[str, Any]:
    """The values of a `config.json` without its audio tower."""
    if size == "tiny":
        return json.loads(TINY.read_text(encoding="utf-8"))
    values = json.loads((SHAPES / f"{size}.json").read_text(encoding="utf-8"))
    if base := values.pop("based_on", None):
        whole = json.loads((SHAPES / f"{base}.json").read_text(encoding="utf-8"))
        for part in ("text_config", "vision_config"):
            values[part] = whole[part] | values[part]
        values = whole | values
    every = values.pop("full_attention_every")
    values.pop("source")
    values["text_config"]["layer_types"] = [
        "sliding_attention" if (layer + 1) % every else "full_attention"
        for layer in range(values["text_config"]["num_hidden_layers"])
    ]
    return values | {"audio_config": None}


def build(settings: Settings, device: torch.device, dtype: torch.dtype) -> Any:
    """The model in training mode on `device`, made there from seed 0, with parts frozen."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    for part in settings.frozen:
        require_choice("frozen", part, PARTS)
    config = Gemma4Config.from_dict(shape(settings.size))
    config._attn_implementation = {"text_config": "sdpa", "vision_config": "sdpa"}
    torch.manual_seed(0)
    with torch.device(device):
        model = Gemma4ForConditionalGeneration(config)
    # Parameters only: buffers such as the RoPE frequencies lose accuracy in bfloat16.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if settings.training == "lora":
        model.requires_grad_(False)
        add_adapters(model)
    else:
        freeze(model, settings.frozen)
    if settings.checkpointing:
        recompute(model)
    return model.train()


def add_adapters(model: nn.Module) -> None:
    """LoRA in every projection of the decoder layers, as peft computes and keeps it (Hu 2021).

    `y + (x A') B'`; the scale is in B, which is not zero, so that both get a gradient. A hook, so
    that this needs no peft and every module stays of its class.
    """
    for site, module in model.named_modules():
        inside = ".language_model.layers." in site
        if inside and isinstance(module, nn.Linear) and site.endswith(LORA_PROJECTIONS):
            like = {"dtype": module.weight.dtype, "device": module.weight.device}
            a = torch.randn(LORA_RANK, module.in_features, **like) / math.sqrt(module.in_features)
            b = torch.randn(module.out_features, LORA_RANK, **like) * 0.01
            module.lora_A, module.lora_B = nn.Parameter(a), nn.Parameter(b)
            module.register_forward_hook(_with_adapter)


def _with_adapter(module: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    return output + F.linear(F.linear(arguments[0], module.lora_A), module.lora_B)


def image_grid(soft_tokens: int, ratio: float) -> tuple[int, int]:
    """(width, height) in soft tokens of an image within the budget, as large as the ratio lets."""
    width = max(1, math.floor(math.sqrt(soft_tokens * ratio)))
    height = max(1, math.floor(math.sqrt(soft_tokens / ratio)))
    return width, height


def batch(model: Any, settings: Settings, device: torch.device) -> dict[str, Tensor]:
    """Rows of images and text, padded on the right: images differ in how many tokens they give.

    Of each row's text the last `supervised_percent` has labels.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    num_images = settings.rows * settings.images_per_row
    grids = [
        image_grid(settings.soft_tokens, ASPECT_RATIOS[i % len(ASPECT_RATIOS)])
        for i in range(num_images)
    ]
    last_id = min(config.text_config.vocab_size, LAST_TEXT_ID)
    size = (settings.rows, settings.text_tokens)
    text = torch.randint(FIRST_TEXT_ID, last_id, size, generator=generator).tolist()
    num_supervised = max(1, settings.text_tokens * settings.supervised_percent // 100)
    ids, labels = [], []
    for row, words in enumerate(text):
        first = row * settings.images_per_row
        prefix = [config.text_config.bos_token_id]
        for width, height in grids[first : first + settings.images_per_row]:
            placeholders = [config.image_token_id] * (width * height)
            prefix += [config.boi_token_id, *placeholders, config.eoi_token_id]
        ids.append(torch.tensor(prefix + words))
        ignored = len(prefix) + len(words) - num_supervised
        labels.append(torch.tensor([-100] * ignored + words[-num_supervised:]))
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(ids, batch_first=True, padding_value=0)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "mm_token_type_ids": (input_ids == config.image_token_id).long(),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }
    if grids:
        pixels, positions = images(grids, settings.soft_tokens, generator)
        dtype = next(model.parameters()).dtype
        inputs |= {"pixel_values": pixels.to(dtype), "image_position_ids": positions}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def images(
    grids: list[tuple[int, int]], soft_tokens: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """[N, P, 768] pixels and [N, P, 2] positions (x, y), -1 on padding; P is the whole budget."""
    num_patches = soft_tokens * POOLING**2
    pixels = torch.zeros(len(grids), num_patches, 3 * 16**2)
    positions = torch.full((len(grids), num_patches, 2), -1)
    for i, (width, height) in enumerate(grids):
        count = width * height * POOLING**2
        pixels[i, :count] = torch.rand(count, 3 * 16**2, generator=generator)
        patch = torch.arange(count)
        columns = width * POOLING
        positions[i, :count] = torch.stack([patch % columns, patch // columns], dim=-1)
    return pixels, positions
