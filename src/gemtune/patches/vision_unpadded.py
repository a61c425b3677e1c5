"""Only real patches go through the layers of the vision tower, in one row (cactus#590)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from gemtune.patches.base import APPLIED, NOT_APPLICABLE, Plan, Wrap, modules_of_class
from gemtune.patches.fingerprint import require_known

# What stands in for two methods, and what has to hold around them: the tower gives the encoder a
# [N, P] mask of real patches, the pooler zeroes what comes back for the others, and a layer hands
# its keyword arguments on to its attention.
_ENCODER_FORWARD = ("f807f6b63baa",)  # 5.5.2-5.23
_ATTENTION_FORWARD = ("4154232bc8c0",)  # 5.5.2-5.23
_LAYER_FORWARD = ("a4a4bcede647",)  # 5.5.2-5.23
_TOWER_FORWARD = (
    "e97664c08040",  # 5.5.2-5.10.0
    "70663d3a0d26",  # 5.10.1-5.17
    "21e62676ae9f",  # 5.18-5.23
)
_POOLER_FORWARD = (
    "9a10dca472dd",  # 5.5.2-5.10.0
    "1d1e04fd762c",  # 5.10.1-5.23
)


@dataclass(frozen=True)
class PackedImages:
    """The real patches of N images in one row: which they are, and where each image lies.

    Images are sorted by size, so that images of one size can share a call of the attention
    kernel. The patches of an image stay in their order.
    """

    patches: torch.Tensor
    """[T] indices into the N * P patches."""
    blocks: tuple[tuple[int, int], ...]
    """(images, patches of each) one after another in the row: ((2, 630), (1, 2520))."""

    @classmethod
    def of(cls, is_real: torch.Tensor) -> PackedImages | None:
        """From the [N, P] mask of real patches; None if all of them are real, or none is.

        One transfer to the host, which stock transformers needs as well (`mask.all()`).
        """
        num_images, num_patches = is_real.shape
        sizes_on_device, image_at = is_real.sum(dim=-1).sort(stable=True)
        sizes = sizes_on_device.tolist()
        total = sum(sizes)
        if total in (0, num_images * num_patches):
            return None
        rank = torch.empty_like(image_at)
        rank[image_at] = torch.arange(num_images, device=is_real.device)
        # Sorting by rank, padding last, finds the patches without asking the device how many.
        key = torch.where(is_real, rank.unsqueeze(-1), num_images).flatten()
        patches = key.argsort(stable=True)[:total]
        blocks = [(len(list(same)), size) for size, same in itertools.groupby(sizes) if size]
        return cls(patches, tuple(blocks))

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """[N, P, ...] -> [1, T, ...]."""
        return states.flatten(0, 1).index_select(0, self.patches).unsqueeze(0)

    def unpack(self, states: torch.Tensor, num_images: int, num_patches: int) -> torch.Tensor:
        """[1, T, H] -> [N, P, H], zeros for padding."""
        padded = states.new_zeros(num_images * num_patches, states.shape[-1])
        padded.index_copy_(0, self.patches, states[0])
        return padded.unflatten(0, (num_images, num_patches))

    def split(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """[1, T, heads, D] -> views [images, heads, patches, D], one for each size of image."""
        lengths = [images * patches for images, patches in self.blocks]
        for part, block in zip(states[0].split(lengths), self.blocks, strict=True):
            yield part.unflatten(0, block).transpose(1, 2)


def _encode_real_patches(
    self: nn.Module,
    inner: Callable[..., Any],
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The encoder on the packed patches, its result padded as the pooler expects it."""
    is_mask_of_patches = (
        attention_mask is not None and attention_mask.shape == (inputs_embeds.shape[:2])
    )
    packed = None
    # Hidden states and attentions that are asked for are those of [N, P] patches.
    if is_mask_of_patches and not _is_recorded(self.config, kwargs):
        packed = PackedImages.of(attention_mask.bool())
    if packed is None:
        return inner(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            pixel_position_ids=pixel_position_ids,
            **kwargs,
        )
    from transformers.modeling_outputs import BaseModelOutputWithPast

    hidden_states = packed.pack(inputs_embeds)
    positions = packed.pack(pixel_position_ids)
    position_embeddings = self.rotary_emb(hidden_states, positions)
    for layer in self.layers[: self.config.num_hidden_layers]:
        hidden_states = layer(
            hidden_states,
            attention_mask=None,
            position_embeddings=position_embeddings,
            position_ids=positions,
            packed_images=packed,
            **kwargs,
        )
    return BaseModelOutputWithPast(
        last_hidden_state=packed.unpack(hidden_states, *inputs_embeds.shape[:2])
    )


def _is_recorded(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `capture_outputs` of transformers records what the layers return."""
    names = ("output_hidden_states", "output_attentions")
    return any(kwargs.get(name, getattr(config, name, False)) for name in names)


def _attend_within_images(
    self: nn.Module,
    inner: Callable[..., Any],
    *args: Any,
    packed_images: PackedImages | None = None,
    **kwargs: Any,
) -> Any:
    if packed_images is None:
        return inner(*args, **kwargs)
    return _packed_attention(self, packed_images, *args, **kwargs)


def _packed_attention(
    self: nn.Module,
    packed_images: PackedImages,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`Gemma4VisionAttention.forward` on a row of images: each attends to itself, without a mask.

    Projections, norms and RoPE are computed for the whole row at once, and the attention kernel
    once for each size of image: what grows with the number of sizes is that kernel alone.
    """
    from transformers.models.gemma4 import modeling_gemma4 as gemma4

    cos, sin = position_embeddings
    heads = (*hidden_states.shape[:-1], -1, self.head_dim)
    queries = self.q_norm(self.q_proj(hidden_states).view(heads))
    queries = gemma4.apply_multidimensional_rope(queries, cos, sin, position_ids)
    keys = self.k_norm(self.k_proj(hidden_states).view(heads))
    keys = gemma4.apply_multidimensional_rope(keys, cos, sin, position_ids)
    values = self.v_norm(self.v_proj(hidden_states).view(heads))

    attend = gemma4.ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, gemma4.eager_attention_forward
    )
    outputs = []
    for block in zip(*map(packed_images.split, (queries, keys, values)), strict=True):
        output, _ = attend(
            self,
            *block,
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        outputs.append(output.flatten(0, 1).flatten(1))  # [images * patches, heads * D]
    return self.o_proj(torch.cat(outputs).unsqueeze(0)), None


@dataclass(frozen=True)
class VisionUnpadded:
    """transformers pads every image to the largest of the batch and encodes the padding as well.

    Here the real patches of all images form one row [1, T, H] for the layers of the tower, with
    RoPE once and attention within each image, without a mask, so that every kernel of
    `scaled_dot_product_attention` can serve. Same soft tokens and gradients. Where nothing is
    padded, and where hidden states or attentions are asked for, the stock encoder runs. The
    patch embedder and the pooler work on padded patches still: under 1% of the tower.
    """

    name: ClassVar[str] = "vision_unpadded"

    def plan(self, model: nn.Module) -> Plan:
        """For each vision tower its encoder and the attention of each layer."""
        towers = modules_of_class(model, "Gemma4VisionModel")
        if not towers:
            return Plan(NOT_APPLICABLE, "the model has no Gemma 4 vision tower")
        wraps = [wrap for site, tower in towers for wrap in self._wraps(site, tower)]
        return Plan(APPLIED, "padding left out of the layers", tuple(wraps))

    def _wraps(self, site: str, tower: nn.Module) -> Iterator[Wrap]:
        encoder, prefix = tower.encoder, f"{site}." if site else ""
        require_known(self.name, type(tower).forward, _TOWER_FORWARD)
        require_known(self.name, type(tower.pooler).forward, _POOLER_FORWARD)
        require_known(self.name, type(encoder).forward, _ENCODER_FORWARD)
        yield Wrap(encoder, "forward", _encode_real_patches, f"{prefix}encoder")
        for index, layer in enumerate(encoder.layers):
            require_known(self.name, type(layer).forward, _LAYER_FORWARD)
            require_known(self.name, type(layer.self_attn).forward, _ATTENTION_FORWARD)
            where = f"{prefix}encoder.layers.{index}.self_attn"
            yield Wrap(layer.self_attn, "forward", _attend_within_images, where)
