"""The table of per-layer embeddings stays in host memory; a batch fetches the rows it needs.

from gemtune.patches.ple_offload import prefetch
prefetch(model, batch["input_ids"])   # on the CPU, before the batch goes to the GPU
loss = model(**to_gpu(batch)).loss    # finds the rows there; the CPU waits for nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from gemtune.errors import PatchError
from gemtune.patches.base import APPLIED, NOT_APPLICABLE, Change, Edit, Plan
from gemtune.patches.fingerprint import require_known
from gemtune.patches.host_memory import HostMemory, stay_on_host

_PREFETCHED = "_gemtune_prefetched_rows"
_TABLE = "embed_tokens_per_layer"

_KNOWN = frozenset({"40d585f5fccf"})  # Gemma4TextScaledWordEmbedding.forward, 5.5.2 to 5.23


@dataclass(frozen=True)
class FetchedRows:
    """Rows of a table on a device, and which ones they are."""

    ids: torch.Tensor
    """[U] int64, ascending, each once."""
    rows: torch.Tensor
    """[U, W] in the dtype of the table."""
    asked_for: torch.Size
    """The shape of the ids that were asked for."""
    copied: torch.cuda.Event | None
    """Where the copy runs beside the computation: its end."""


def fetch_rows(
    table: torch.Tensor,
    input_ids: torch.Tensor,
    device: torch.device,
    *,
    besides: int | None = None,
    stream: torch.cuda.Stream | None = None,
) -> FetchedRows:
    """Begin to copy the rows of `table` [R, W] that `input_ids` name, each once, to `device`.

    `table` and `input_ids`, of any shape, are on the CPU; row `besides` comes along. The CPU
    gathers the rows in pinned memory and waits for nothing; with a `stream` the copy runs in it.
    Costs the memory of the rows, 17.5 KiB each for E2B in bfloat16, here and there.

    Raises:
        IndexError: an id beyond the table.
    """
    on_gpu = device.type == "cuda"
    wanted = input_ids.flatten().long()
    if besides is not None:
        wanted = torch.cat([wanted, wanted.new_tensor([besides])])
    unique = torch.unique(wanted)  # ascending
    staged_ids = torch.empty_like(unique, pin_memory=on_gpu).copy_(unique)
    shape = (unique.numel(), table.shape[1])
    staged_rows = torch.empty(shape, dtype=table.dtype, pin_memory=on_gpu)
    torch.index_select(table.detach(), 0, unique, out=staged_rows)
    if stream is None:
        ids = staged_ids.to(device, non_blocking=True)
        rows = staged_rows.to(device, non_blocking=True)
        return FetchedRows(ids, rows, input_ids.shape, None)
    with torch.cuda.stream(stream):
        ids = staged_ids.to(device, non_blocking=True)
        rows = staged_rows.to(device, non_blocking=True)
        return FetchedRows(ids, rows, input_ids.shape, stream.record_event())


def places_of(fetched: FetchedRows, input_ids: torch.Tensor) -> torch.Tensor:
    """Which fetched row belongs to each id: [...] integers, on the device, without waiting for it.

    Raises:
        RuntimeError: an id that was not fetched (on CUDA: a device-side assertion, which ends the
            process; the CPU cannot look without waiting).
    """
    if fetched.copied is not None:
        now = torch.cuda.current_stream(input_ids.device)
        now.wait_event(fetched.copied)
        for tensor in (fetched.ids, fetched.rows):  # they belong to the stream of the copy
            tensor.record_stream(now)
    wanted = input_ids.long()
    places = torch.searchsorted(fetched.ids, wanted).clamp_(max=fetched.ids.numel() - 1)
    torch._assert_async(
        (fetched.ids[places] == wanted).all(),
        "ple_offload: this forward asks for tokens that prefetch() was not given.",
    )
    return places


@dataclass(eq=False)
class Prefetched:
    """The rows that wait for the next forward. A copy of it (`copy.deepcopy`) has none."""

    waiting: FetchedRows | None = field(default=None, repr=False)
    _stream: torch.cuda.Stream | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"waiting": None, "_stream": None}

    def stream_on(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def take(self, input_ids: torch.Tensor) -> FetchedRows | None:
        """What was fetched for ids of this shape on this device, once."""
        waiting = self.waiting
        if waiting is None or waiting.asked_for != input_ids.shape:
            return None
        if waiting.rows.device != input_ids.device:
            return None
        self.waiting = None
        return waiting


def _is_elsewhere(device: torch.device) -> bool:
    return device.type != "cpu"


def prefetch(model: nn.Module, input_ids: torch.Tensor) -> None:
    """Begin to fetch the rows for the next forward of `model` with these ids, [B, S] on the CPU.

    Without it that forward waits for the GPU to learn the ids. Call it before each forward, with
    the ids of that forward: the next forward with ids of this shape takes the rows, once, and
    fails where its ids are others. A second call replaces the first. Does nothing where no table
    is offloaded, or the model is on the CPU.

    Raises:
        ValueError: ids on another device than the CPU.
        IndexError: an id beyond the table.
    """
    if input_ids.device.type != "cpu":
        raise ValueError(
            f"prefetch() reads the ids on the CPU; these are on {input_ids.device}. Call it before "
            "the batch is moved."
        )
    for module in model.modules():
        prefetched = vars(module).get(_PREFETCHED)
        if prefetched is not None and _is_elsewhere(device := module.embed_scale.device):
            # The model puts padding in the place of image, video and audio tokens.
            prefetched.waiting = fetch_rows(
                module.weight,
                input_ids,
                device,
                besides=module.padding_idx,
                stream=prefetched.stream_on(device),
            )


def _forward(self: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """[...] ids -> [..., W], on the device of the ids."""
    table, device = self.weight, input_ids.device
    if table.requires_grad and torch.is_grad_enabled():
        raise PatchError(
            "ple_offload: the table of per-layer embeddings requires a gradient, but only copies "
            "of its rows are on the device. Freeze it (model.freeze=[ple]), or leave ple_offload "
            "out of patches=[...]."
        )
    scale = self.embed_scale.to(device, table.dtype)
    if not _is_elsewhere(device):
        return F.embedding(input_ids, table.detach()) * scale
    fetched = vars(self)[_PREFETCHED].take(input_ids)
    if fetched is None:
        fetched = fetch_rows(table, input_ids.cpu(), device)
    places = places_of(fetched, input_ids)
    # Each row is scaled once instead of once for each token: the same products.
    return F.embedding(places, fetched.rows * scale)


@dataclass(frozen=True)
class PleOffload:
    """The per-layer-embedding table off the GPU (transformers#47705): 46% of E2B, 4.4 GiB.

    It stays in host memory whatever moves the model, frozen. A forward fetches the rows of the
    tokens of its batch, each once, through pinned memory: at most 17.5 KiB a token for E2B. Same
    values. Without `prefetch` a forward waits for the GPU once, to learn which rows.
    """

    name: ClassVar[str] = "ple_offload"

    def plan(self, model: nn.Module) -> Plan:
        """One table for each language model: moved to the host, its `forward` replaced."""
        tables = [
            (site, module)
            for site, module in model.named_modules()
            if site.rpartition(".")[2] == _TABLE
        ]
        if not tables:
            return Plan(NOT_APPLICABLE, "the model has no per-layer embeddings")
        for _, table in tables:
            if type(table).__name__ != "Gemma4TextScaledWordEmbedding":
                raise PatchError(
                    f"ple_offload: the table of per-layer embeddings is a {type(table).__name__}, "
                    "which is not known here. Leave the patch out of patches=[...]."
                )
            require_known(self.name, type(table).forward, _KNOWN)
        if any(table.weight.requires_grad for _, table in tables):
            return Plan(NOT_APPLICABLE, "the table is trained; freeze it: model.freeze=[ple]")
        changes = tuple(change for site, table in tables for change in _changes(site, table))
        return Plan(APPLIED, "the table stays in host memory, rows are fetched", changes)


def _changes(site: str, table: nn.Module) -> Iterator[Change]:
    yield from stay_on_host(table, HostMemory(), site)
    yield Edit(table, _PREFETCHED, Prefetched(), site)
    yield Edit(table, "forward", MethodType(_forward, table), site)
