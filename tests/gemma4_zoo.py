"""Small random Gemma 4 models of every family, and batches for them. Needs torch and transformers.

float64 models give a reference whose rounding is far below any bound that a test states. Stock
transformers rounds to float32 in places even there: `exact_float64` switches that off.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import Gemma4Config, Gemma4ForConditionalGeneration
from transformers.models.gemma4 import modeling_gemma4

import gemtune

TINY_CONFIG = Path(gemtune.__file__).parent / "assets" / "tiny" / "config.json"
MEDIA_TEMPLATE = Path(__file__).parent / "fixtures" / "templates" / "gemma4_small.jinja"
FAMILIES = ("e2b", "e4b", "26b_a4b", "31b")
# Where rounding decides which experts a token goes to, the result jumps, in stock transformers as
# well. With every token at every expert it does not.
CONTINUOUS_FAMILIES = ("e2b", "e4b", "26b_a4b_all_experts", "31b")
# Their upper layers share keys and values, and each layer has embeddings of its own.
SHARING_FAMILIES = ("e2b", "e4b")
IMAGE_GRIDS = ((2, 2), (3, 2), (2, 4), (1, 3))  # soft tokens: width, height
FRAME_GRID = (2, 3)
FRAMES_PER_VIDEO = 3
AUDIO_FRAMES = (13, 30, 22)  # log-mel frames; a soft token takes four
NUM_MEL_BINS = 128
_AUDIO = {
    "model_type": "gemma4_audio",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [NUM_MEL_BINS, 4],
    "output_proj_dims": 48,
    "initializer_range": 0.1,
}


def config_of(family: str, hears: bool = False) -> Gemma4Config:
    """ "e2b" (the bundled tiny one), "e4b", "26b_a4b" (experts) or "31b" (dense, bidirectional).

    "26b_a4b_all_experts" sends every token to every expert. `hears`: with an audio tower, which the
    bundled one has not.
    """
    values = json.loads(TINY_CONFIG.read_text())
    if hears:
        values["audio_config"] = dict(_AUDIO)
    text, vision = values["text_config"], values["vision_config"]
    if family == "e4b":
        text |= {"num_key_value_heads": 2, "use_double_wide_mlp": False}
    if family.startswith(("26b_a4b", "31b")):
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
    if family.startswith("26b_a4b"):
        text |= {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 4 if family.endswith("all_experts") else 2,
            "moe_intermediate_size": 32,
        }
    return Gemma4Config.from_dict(copy.deepcopy(values))


def model_folder(family: str, parent: Path, hears: bool = False) -> str:
    """The bundled tiny model's tokenizer, template and processor with the config of a family.

    `hears`: with an audio tower, and a template that knows audio and video.
    """
    folder = parent / family
    shutil.copytree(TINY_CONFIG.parent, folder)
    (folder / "config.json").write_text(json.dumps(config_of(family, hears).to_dict()))
    if hears:
        shutil.copy(MEDIA_TEMPLATE, folder / "chat_template.jinja")
    return str(folder)


def build(
    family: str,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    frozen: tuple[str, ...] = (),
    attention: str = "sdpa",
    hears: bool = False,
) -> Any:
    """A model in training mode, every parameter and buffer moved off its special initial value.

    Parameters whose name contains one of `frozen` are not trained.
    """
    torch.manual_seed(seed)
    config = config_of(family, hears)
    config._attn_implementation = {"text_config": attention, "vision_config": attention}
    config.text_config._experts_implementation = "eager"  # grouped matmul knows no float64
    model = Gemma4ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            parameter.requires_grad_(not any(part in name for part in frozen))
        for name, buffer in model.named_buffers():
            if name.endswith(("std_bias", "std_scale", "layer_scalar")):
                buffer += 0.1 * torch.rand(buffer.shape, generator=generator)
            elif name.endswith(("input_max", "output_max")):
                buffer.fill_(2.5)  # clipped linears do clip
            elif name.endswith(("input_min", "output_min")):
                buffer.fill_(-2.5)
    return cast(model, dtype).train()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model in `dtype`, its RoPE frequencies as they were."""
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    ]
    model.to(dtype)
    for module, name, buffer in kept:
        setattr(module, name, buffer)
    return model


@contextlib.contextmanager
def exact_float64() -> Iterator[None]:
    """Stock Gemma 4 without its roundings to float32: what its formulas say, in float64.

    They are `.float()` and `softmax(dtype=float32)` on float64 tensors, and a pooler whose weights
    are float32. A patched model runs in it as well, because it has the unpatched ones left.
    """
    to_float32, softmax = torch.Tensor.float, F.softmax

    def keep(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor if tensor.dtype == torch.float64 else to_float32(tensor, *args, **kwargs)

    def exact_softmax(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.dtype == torch.float64:
            kwargs.pop("dtype", None)
        return softmax(tensor, *args, **kwargs)

    pooler = modeling_gemma4.Gemma4VisionPooler
    with (
        mock.patch.object(torch.Tensor, "float", keep),
        mock.patch.object(F, "softmax", exact_softmax),
        mock.patch.object(pooler, "_avg_pool_by_positions", _average_patches),
    ):
        yield


def _average_patches(
    self: Any, hidden_states: torch.Tensor, pixel_position_ids: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pooler's averages as a loop over images and cells. Padding comes in as zeros."""
    side = int((hidden_states.shape[1] // length) ** 0.5)
    pooled, valid = [], torch.zeros(len(hidden_states), length, dtype=torch.bool)
    for image, (states, positions) in enumerate(
        zip(hidden_states, pixel_position_ids, strict=True)
    ):
        columns = (int(positions[:, 0].max()) + 1) // side
        cells: list[torch.Tensor] = [states.new_zeros(states.shape[-1])] * length
        for patch, (x, y) in enumerate(positions.tolist()):
            if x >= 0:
                cell = x // side + columns * (y // side)
                cells[cell] = cells[cell] + states[patch] / side**2
                valid[image, cell] = True
        pooled.append(torch.stack(cells))
    return torch.stack(pooled), valid


def batch(
    model: Any,
    images_per_row: tuple[int, ...] = (1, 0, 2),
    videos_per_row: tuple[int, ...] = (),
    seed: int = 0,
    audios_per_row: tuple[int, ...] = (),
) -> dict[str, torch.Tensor]:
    """Rows of text with media in them, padded on the right, half of them labelled.

    Images have several aspect ratios and are padded to the largest, as the image processor would.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    videos = videos_per_row or (0,) * len(images_per_row)
    audios = audios_per_row or (0,) * len(images_per_row)
    rows, image_grids, frame_grids, audio_frames = [], [], [], []
    for row, num_images in enumerate(images_per_row):
        vocabulary = config.text_config.vocab_size
        ids = torch.randint(40, vocabulary, (20 + 3 * row,), generator=generator).tolist()
        for image in range(num_images):
            grid = IMAGE_GRIDS[(image + row) % len(IMAGE_GRIDS)]
            image_grids.append(grid)
            ids[4 + image : 4 + image] = _placeholders(config, config.image_token_id, grid)
        for _ in range(videos[row]):
            frame_grids += [FRAME_GRID] * FRAMES_PER_VIDEO
            frame = _placeholders(config, config.video_token_id, FRAME_GRID)
            ids[2:2] = frame * FRAMES_PER_VIDEO
        for number in range(audios[row]):
            frames = AUDIO_FRAMES[(number + row) % len(AUDIO_FRAMES)]
            audio_frames.insert(len(audio_frames) - number, frames)
            run = [config.audio_token_id] * (-(-frames // 4))
            ids[1:1] = [config.boa_token_id, *run, config.eoa_token_index]
        rows.append(ids)
    length = max(map(len, rows))
    input_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows])
    is_image = input_ids == config.image_token_id
    is_video = input_ids == config.video_token_id
    is_audio = input_ids == config.audio_token_id
    labels = torch.where((mask == 1) & ~is_image & ~is_video & ~is_audio, input_ids, -100)
    labels[:, : length // 2] = -100
    inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "mm_token_type_ids": is_image.long() + 2 * is_video.long() + 3 * is_audio.long(),
        "labels": labels,
    }
    if image_grids:
        pixels, positions = _patches(model, image_grids, generator)
        inputs |= {"pixel_values": pixels, "image_position_ids": positions}
    if frame_grids:
        inputs |= _video_inputs(model, *_patches(model, frame_grids, generator))
    if audio_frames:
        inputs |= _audio_inputs(model, audio_frames, generator)
    return inputs


def _placeholders(config: Any, token_id: int, grid: tuple[int, int]) -> list[int]:
    return [config.boi_token_id, *[token_id] * (grid[0] * grid[1]), config.eoi_token_id]


def _patches(
    model: Any, grids: list[tuple[int, int]], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, P, 768] pixels and [N, P, 2] positions of images of so many soft tokens."""
    grids = [(3 * width, 3 * height) for width, height in grids]  # pooling is 3 x 3
    num_patches = max(width * height for width, height in grids)
    size = 3 * model.config.vision_config.patch_size**2
    dtype = next(model.parameters()).dtype
    pixels = torch.zeros(len(grids), num_patches, size, dtype=dtype)
    positions = torch.full((len(grids), num_patches, 2), -1)
    for i, (width, height) in enumerate(grids):
        count = width * height
        pixels[i, :count] = torch.rand(count, size, generator=generator).to(dtype)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        positions[i, :count] = torch.stack([x.flatten(), y.flatten()], dim=-1)
    return pixels, positions


def _audio_inputs(
    model: Any, lengths: list[int], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """[A, T, 128] log-mel features and [A, T] which of them are of sound."""
    shape = (len(lengths), max(lengths) + 2)
    mask = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(-1)
    features = torch.randn(*shape, NUM_MEL_BINS, generator=generator) * mask.unsqueeze(-1)
    dtype = next(model.parameters()).dtype
    return {"input_features": features.to(dtype), "input_features_mask": mask}


def _video_inputs(
    model: Any, pixels: torch.Tensor, positions: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Frames of all videos in one axis from transformers 5.19 on, an axis of videos before."""
    if "num_frames_per_video" in inspect.signature(model.model.forward).parameters:
        num_videos = len(pixels) // FRAMES_PER_VIDEO
        return {
            "pixel_values_videos": pixels,
            "video_position_ids": positions,
            "num_frames_per_video": torch.full((num_videos,), FRAMES_PER_VIDEO),
        }
    return {
        "pixel_values_videos": pixels.unflatten(0, (-1, FRAMES_PER_VIDEO)),
        "video_position_ids": positions.unflatten(0, (-1, FRAMES_PER_VIDEO)),
    }


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


def brings_its_loss(choice: Collection[str], family: str) -> bool:
    """Whether a model with these patches computes its loss without transformers' own."""
    at_positions = "supervised_positions" in choice and family in SHARING_FAMILIES
    return at_positions or "linear_cross_entropy" in choice


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm().clamp(min=1e-300))
