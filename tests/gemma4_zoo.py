"""Small random Gemma 4 models of every family, and batches for them. Needs torch and transformers.

float64 models give a reference whose rounding is far below any bound that a test states.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

import gemtune

TINY_CONFIG = Path(gemtune.__file__).parent / "assets" / "tiny" / "config.json"
PATCHES_PER_TOKEN = 9  # pooling 3 x 3


def config_of(family: str) -> Gemma4Config:
    """ "e2b" (the bundled tiny one), "31b" (dense, bidirectional) or "26b_a4b" (experts)."""
    values = json.loads(TINY_CONFIG.read_text())
    text, vision = values["text_config"], values["vision_config"]
    if family != "e2b":
        text |= {
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "use_bidirectional_attention": "vision",
        }
        vision |= {"use_clipped_linears": False, "standardize": True}
    if family == "26b_a4b":
        text |= {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        }
    return Gemma4Config.from_dict(copy.deepcopy(values))


def build(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model in training mode, every parameter moved off its special initial value."""
    torch.manual_seed(seed)
    config = config_of(family)
    config._attn_implementation = "sdpa"
    config.text_config._experts_implementation = "eager"  # grouped matmul knows no float64
    model = Gemma4ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).train()


def batch(
    model: Any, images_per_row: tuple[int, ...] = (1, 0, 2), seed: int = 0
) -> dict[str, torch.Tensor]:
    """Rows of text with images of 4 and 6 soft tokens, padded on the right, half of them labelled.

    Patches are padded to the larger image, as the image processor would.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    vocabulary = config.text_config.vocab_size
    rows, grids = [], []
    for row, num_images in enumerate(images_per_row):
        ids = torch.randint(40, vocabulary, (20 + 3 * row,), generator=generator).tolist()
        for image in range(num_images):
            width, height = (2, 2) if image == 0 else (3, 2)
            grids.append((3 * width, 3 * height))
            ids[4:4] = [config.boi_token_id, *[config.image_token_id] * (width * height)] + [
                config.eoi_token_id
            ]
        rows.append(ids)
    length = max(map(len, rows))
    input_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows])
    is_image = input_ids == config.image_token_id
    labels = torch.where((mask == 1) & ~is_image, input_ids, -100)
    labels[:, : length // 2] = -100
    inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "mm_token_type_ids": is_image.long(),
        "labels": labels,
    }
    if grids:
        num_patches = max(width * height for width, height in grids)
        size = 3 * config.vision_config.patch_size**2
        dtype = next(model.parameters()).dtype
        pixels = torch.zeros(len(grids), num_patches, size, dtype=dtype)
        positions = torch.full((len(grids), num_patches, 2), -1)
        for i, (width, height) in enumerate(grids):
            count = width * height
            pixels[i, :count] = torch.rand(count, size, generator=generator).to(dtype)
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            positions[i, :count] = torch.stack([x.flatten(), y.flatten()], dim=-1)
        inputs["pixel_values"] = pixels
        inputs["image_position_ids"] = positions
    return inputs


def loss_and_gradients(
    model: Any, inputs: dict[str, torch.Tensor], *, reference: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One backward pass; gradients by parameter name.

    With `reference` the loss is computed here from the logits of the stock forward: transformers'
    own loss rounds float64 logits to float32.
    """
    model.zero_grad(set_to_none=True)
    if reference:
        without_labels = {k: v for k, v in inputs.items() if k != "labels"}
        logits = model(**without_labels, use_cache=False).logits[:, :-1]
        targets = inputs["labels"][:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    else:
        loss = model(**inputs, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm().clamp(min=1e-300))
