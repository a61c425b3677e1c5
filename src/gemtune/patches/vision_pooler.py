"""Soft tokens by summing patches into cells instead of one-hot x patches (transformers#46277)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gemtune.patches.base import APPLIED, NOT_APPLICABLE, Edit, Plan, modules_of_class
from gemtune.patches.fingerprint import fingerprint, require_known

# Gemma4VisionModel.forward in every release that was read, with the class of what it returns.
_TOWER_FORWARD = {
    "e97664c08040": "BaseModelOutputWithPast",  # 5.5.2-5.10.0
    "70663d3a0d26": "BaseModelOutputWithPast",  # 5.10.1-5.17: scaled and standardised in float32
    "21e62676ae9f": "BaseModelOutputWithPooling",  # 5.18-5.23
}
_POOLER_FORWARD = (
    "9a10dca472dd",  # 5.5.2-5.10.0: scaled in the dtype of the tower
    "1d1e04fd762c",  # 5.10.1-5.23
)
_AVG_POOL = ("f9eb0d3c90c9",)  # 5.5.2-5.23
_EMBEDDER_FORWARD = ("4b462fe5a99a",)  # 5.5.2-5.23


class _SumByCell(torch.autograd.Function):
    """`sums[c]` = the sum of `states[p]` over all patches p with `cells[p] == c`, in `sums`' dtype.

    `index_add` computes the same from a copy of `states` in the wider dtype, and on CUDA in an
    order that differs from run to run. Here the wider dtype is only ever as large as the sums,
    and the order is that of the patches: repeated runs agree to the last bit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        cells: torch.Tensor,
        order: torch.Tensor,
        starts: torch.Tensor,
        largest_cell: int,
    ) -> torch.Tensor:
        first, end = starts[:-1], starts[1:]
        sums = states.new_zeros(
            len(first), states.shape[-1], dtype=torch.promote_types(states.dtype, torch.float32)
        )
        for slot in range(largest_cell):
            place = first + slot
            patches = states.index_select(0, order[place.clamp(max=len(order) - 1)])
            sums += patches.masked_fill_((place >= end).unsqueeze(-1), 0.0)
        ctx.save_for_backward(cells)
        ctx.states_dtype = states.dtype
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (cells,) = ctx.saved_tensors
        # A patch has the gradient of its cell: rounding before the lookup or after it is the same.
        grad_cells = F.pad(grad_sums.to(ctx.states_dtype), (0, 0, 0, 1))  # padding: zeros
        return grad_cells.index_select(0, cells), None, None, None, None


def sum_patches(
    states: torch.Tensor, positions: torch.Tensor, padding: torch.Tensor, length: int, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the patches in each cell of `side` x `side` patches, and which cells have any.

    Args:
        states: [N, P, H].
        positions: [N, P, 2] integers, (x, y) of each patch, (-1, -1) for padding.
        padding: [N, P] bool; these patches are left out of the sums.
        length: L, the number of cells. Cells are numbered row by row in each image.
        side: patches along the side of a cell.

    Returns:
        [N, L, H] sums in float32, or in the dtype of `states` if that is wider, and [N, L] bool.
        As in transformers, padding counts as a patch at (0, 0) for the latter.

    Raises:
        RuntimeError: a patch of a cell beyond `length` (on CUDA: a device-side assertion).
    """
    num_images, _, hidden_size = states.shape
    clamped = positions.clamp(min=0).long()
    columns = (clamped[..., 0].max(dim=-1, keepdim=True)[0] + 1) // side
    cells = clamped[..., 0] // side + columns * (clamped[..., 1] // side)  # [N, P]
    has_patches = torch.zeros(num_images, length, dtype=torch.bool, device=states.device)
    has_patches.scatter_(1, cells, True)

    # Patches sorted by cell, cell c from starts[c] to starts[c + 1]; padding after the last cell.
    num_cells = num_images * length
    images = torch.arange(num_images, device=states.device).unsqueeze(-1)
    cells = (cells + length * images).masked_fill(padding, num_cells).flatten()
    in_order, order = cells.sort(stable=True)
    starts = torch.searchsorted(in_order, torch.arange(num_cells + 1, device=states.device))
    # A whole grid has side^2 patches in each cell, but any positions are summed as transformers
    # would. This waits for the GPU, which the caller does next in any case to drop empty cells.
    largest_cell = int(starts.diff().max())
    sums = _SumByCell.apply(states.flatten(0, 1), cells, order, starts, largest_cell)
    return sums.view(num_images, length, hidden_size), has_patches


def _pooler_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    pixel_position_ids: torch.Tensor,
    padding_positions: torch.Tensor,
    output_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, P, H] patches -> [N, L, H] averages times sqrt(H), never below float32; [N, L] bool."""
    num_patches = hidden_states.shape[1]
    if output_length > num_patches:
        raise ValueError(
            f"Cannot output more soft tokens (requested {output_length}) than there are patches"
            f" ({num_patches}). Change the value of `num_soft_tokens` when processing."
        )
    if num_patches == output_length:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        wide = wide.masked_fill(padding_positions.unsqueeze(-1), 0.0)
        return wide * self.root_hidden_size, padding_positions
    side = int((num_patches // output_length) ** 0.5)
    if side**2 * output_length != num_patches:
        raise ValueError(
            f"Cannot pool {hidden_states.shape} to {output_length}: {side=}^2 times "
            f"{output_length=} must be {num_patches}."
        )
    sums, mask = sum_patches(
        hidden_states, pixel_position_ids, padding_positions, output_length, side
    )
    return sums * (self.root_hidden_size / side**2), mask


def _tower_forward(stock_forward: Any) -> Any:
    """The tower's forward with the pooler's dtype kept until the soft tokens are standardised."""
    original = inspect.unwrap(stock_forward)
    names = original.__globals__
    output_class = names[_TOWER_FORWARD[fingerprint(original)]]

    def forward(
        self: nn.Module,
        pixel_values: torch.Tensor,
        pixel_position_ids: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        output_length = pixel_values.shape[-2] // self.config.pooling_kernel_size**2
        padding_positions = (pixel_position_ids == -1).all(dim=-1)
        inputs_embeds = self.patch_embedder(pixel_values, pixel_position_ids, padding_positions)
        output = self.encoder(
            inputs_embeds=inputs_embeds,
            attention_mask=~padding_positions,
            pixel_position_ids=pixel_position_ids,
            **kwargs,
        )
        features, is_token = self.pooler(
            hidden_states=output.last_hidden_state,
            pixel_position_ids=pixel_position_ids,
            padding_positions=padding_positions,
            output_length=output_length,
        )
        tokens = features[is_token]
        if self.config.standardize:
            tokens = (tokens - self.std_bias.to(tokens.dtype)) * self.std_scale.to(tokens.dtype)
        # float16 ends at 65504, which sqrt(H) x activation passes. The next thing done to the
        # tokens is a norm, so float32 is kept until then.
        if inputs_embeds.dtype != torch.float16:
            tokens = tokens.to(inputs_embeds.dtype)
        return output_class(last_hidden_state=tokens)

    # The decorators of the original: they record hidden states and attentions on request.
    return names["merge_with_config_defaults"](names["capture_outputs"](forward))


def _embedder_forward(self: nn.Module, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Soft tokens [T, H] -> [T, text H]; float32 ones of a float16 tower become float16 here."""
    normed = self.embedding_pre_projection_norm(inputs_embeds)
    # Quantised weights have other dtypes and cast by themselves; so does autocast.
    if self.embedding_projection.weight.dtype == torch.float16:
        normed = normed.to(torch.float16)
    return self.embedding_projection(normed)


@dataclass(frozen=True)
class VisionPooler:
    """transformers averages patches by a matmul with a one-hot [N, P, L], int64 and float32.

    For one image of 1,120 soft tokens (10,080 patches) that is 86 MiB and 86 MiB more. It also
    multiplies by sqrt(H) in the dtype of the tower (until 5.10.0), or rounds to it afterwards: in
    float16 what passes 65504 becomes inf. Here nothing larger than the patches is made, and
    averages, scale and standardisation are in float32, or float64 for a float64 tower. A float16
    tower returns float32 soft tokens; `embed_vision` rounds them after its norm.
    """

    name: ClassVar[str] = "vision_pooler"

    def plan(self, model: nn.Module) -> Plan:
        """Two edits for each vision tower, and one for the embedder that stands beside it."""
        towers = modules_of_class(model, "Gemma4VisionModel")
        if not towers:
            return Plan(NOT_APPLICABLE, "the model has no Gemma 4 vision tower")
        edits = [edit for site, tower in towers for edit in self._edits(model, site, tower)]
        return Plan(APPLIED, "one-hot replaced, scaled in float32", tuple(edits))

    def _edits(self, model: nn.Module, site: str, tower: nn.Module) -> Iterator[Edit]:
        pooler = tower.pooler
        require_known(self.name, type(tower).forward, _TOWER_FORWARD)
        require_known(self.name, type(pooler).forward, _POOLER_FORWARD)
        require_known(self.name, type(pooler)._avg_pool_by_positions, _AVG_POOL)
        forward = _tower_forward(type(tower).forward)
        tower_site = site or type(tower).__name__
        yield Edit(tower, "forward", MethodType(forward, tower), tower_site)
        pooler_site = f"{site}.pooler" if site else "pooler"
        yield Edit(pooler, "forward", MethodType(_pooler_forward, pooler), pooler_site)

        beside = site.rpartition(".")[0]
        embedder = getattr(model.get_submodule(beside), "embed_vision", None)
        if embedder is not None:
            require_known(self.name, type(embedder).forward, _EMBEDDER_FORWARD)
            embedder_site = f"{beside}.embed_vision" if beside else "embed_vision"
            yield Edit(embedder, "forward", MethodType(_embedder_forward, embedder), embedder_site)
