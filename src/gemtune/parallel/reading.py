"""Each process reads its part of a checkpoint: no weights travel, and none holds the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor

from gemtune.errors import ModelError, UserError
from gemtune.models.stored import StoredTensor
from gemtune.parallel.weights import give_memory, put_in_place_of

_Value = TypeVar("_Value")
Collect = Callable[[list[Any]], list[Any]]
"""The lists of all ranks joined, in their order."""


def together(collect: Collect, action: Callable[[], _Value]) -> _Value:
    """Run `action` on every rank and wait for all; return its value.

    Raises:
        ModelError: on every rank, if reading failed on one: else the others would wait for it.
    """
    failure: Exception | None = None
    try:
        value = action()
    except (UserError, OSError, ValueError, SafetensorError) as error:
        failure = error
    for text in collect([None if failure is None else _words(failure)]):
        if text is not None:
            raise ModelError(text) from failure
    return value


def _words(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"rank {dist.get_rank()} cannot read its part of the checkpoint: {error}"


@contextmanager
def in_name_only(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it those on meta are on the CPU, each in the memory of a single value, which is none
    of its own.

    What is made to go with a parameter, such as an adapter's factors, is made where that one is,
    with values.
    """
    unread = [parameter for parameter in parameters if parameter.is_meta]
    for parameter in unread:
        put_in_place_of(parameter, torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))
    try:
        yield
    finally:
        for parameter in unread:
            put_in_place_of(parameter, torch.empty_like(parameter, device="meta"))


def read_whole(parameter: nn.Parameter, stored: StoredTensor) -> None:
    """All of a parameter, into memory of the CPU."""
    give_memory(parameter, parameter.dtype, torch.device("cpu"))
    _read(parameter, stored)


def read_shares(root: nn.Module, unread: Mapping[str, StoredTensor], device: torch.device) -> None:
    """Read these parameters of `root`: of what is sharded this rank's share, the others whole.

    Shares on meta get memory on `device`. A rank holds one share of one tensor beside what it
    keeps, or one whole that is replicated. All ranks must call it.

    Raises:
        ModelError: on all ranks, where one of them cannot read its part.
    """
    # As `to_empty` does it, which would take what has values as well.
    root._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)

    def read() -> None:
        for name, stored in unread.items():
            _read(root.get_parameter(name), stored)

    together(gather, read)


def gather(items: list[Any]) -> list[Any]:
    """`Collect` over the default group."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, items)
    return [item for some in found for item in some]


@torch.no_grad()
def _read(parameter: nn.Parameter, stored: StoredTensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(stored.whole())
        return
    share = parameter.to_local()
    if share.numel() == 0:
        return
    num_rows = parameter.shape[0]
    # As torch.chunk cuts: all chunks but the last ones are of one size.
    rows_of_rank = -(-num_rows // parameter.device_mesh.size())
    start = parameter.device_mesh.get_local_rank() * rows_of_rank
    rows = stored.rows(start, min(start + rows_of_rank, num_rows))
    share.copy_(rows)
