"""The same weights in every process, from the one that read them, and back to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from gemtune.errors import ModelError

_PIECE_BYTES = 2**28
"""What a tensor of another kind of memory than the collectives' takes of the latter at a time."""


@dataclass(frozen=True)
class Blueprint:
    """What the model of rank 0 is made of: name -> shape and dtype."""

    parameters: dict[str, tuple[torch.Size, torch.dtype]]
    buffers: dict[str, tuple[torch.Size, torch.dtype]]

    @classmethod
    def of(cls, model: nn.Module) -> Blueprint:
        return cls(
            {name: (p.shape, p.dtype) for name, p in model.named_parameters()},
            {name: (b.shape, b.dtype) for name, b in model.named_buffers(remove_duplicate=False)},
        )


def agree_on_blueprint(model: nn.Module) -> Blueprint:
    """Rank 0's, on every rank.

    Raises:
        ModelError: this rank's model has other names or shapes (on such a rank).
    """
    mine = Blueprint.of(model)
    shared: list[Any] = [mine]
    dist.broadcast_object_list(shared, src=0)
    theirs: Blueprint = shared[0]
    for kind in ("parameters", "buffers"):
        here = {name: shape for name, (shape, _) in getattr(mine, kind).items()}
        there = {name: shape for name, (shape, _) in getattr(theirs, kind).items()}
        if here != there:
            odd = sorted({*here.items()} ^ {*there.items()})
            raise ModelError(
                f"rank {dist.get_rank()} has other {kind} than rank 0, such as {odd[0][0]}. All "
                "processes must read one configuration, with the same versions of the libraries."
            )
    return theirs


def give_memory(parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> None:
    """The parameter on `device`; one on meta gets memory of that dtype, without values.

    It stays the same object, so that what is tied stays tied.
    """
    if parameter.is_meta:
        put_in_place_of(parameter, torch.empty(parameter.shape, dtype=dtype, device=device))
    else:
        parameter.data = parameter.data.to(device)


def put_in_place_of(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Let the parameter be this tensor, on whatever device. It stays the same object."""
    torch.utils.swap_tensors(parameter, nn.Parameter(tensor, requires_grad=parameter.requires_grad))


def give_buffers_memory(model: nn.Module, blueprint: Blueprint, device: torch.device) -> None:
    """All buffers on `device`; those on meta without values."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            shape, dtype = blueprint.buffers[f"{prefix}.{name}" if prefix else name]
            moved = (
                torch.empty(shape, dtype=dtype, device=device)
                if buffer.is_meta
                else buffer.to(device)
            )
            module._buffers[name] = moved


@torch.no_grad()
def send_from_first(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """The values of rank 0 in the tensors of every rank, one after the other.

    Collectives move tensors on `device`; others go through it in pieces of 256 MiB.
    """
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        if tensor.device == device and tensor.is_contiguous():
            dist.broadcast(tensor, src=0)
            continue
        if not tensor.is_contiguous():
            _send_piece(tensor, device)
            continue
        for piece in tensor.view(-1).split(max(1, _PIECE_BYTES // tensor.element_size())):
            _send_piece(piece, device)


def _send_piece(piece: torch.Tensor, device: torch.device) -> None:
    staged = piece.to(device, copy=True).contiguous()
    dist.broadcast(staged, src=0)
    if dist.get_rank() != 0:
        piece.copy_(staged)


def whole_on_first(
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(name, the whole tensor on the CPU; None on other ranks than 0), gathered one by one.

    Every rank has to iterate to the end: each step is a collective.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    for name, tensor in tensors:
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        yield name, whole.cpu().clone() if is_first else None
