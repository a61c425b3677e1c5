"""What memory a piece of a program holds, tensor by tensor, and what held it at the peak."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn
from torch._guards import active_fake_mode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemtune.optim.state_group import shard_of

PARAMETERS, GRADIENTS, INPUTS = "parameters", "gradients", "inputs"
OPTIMIZER_STATE = "optimizer state"
GATHERED = "gathered weights"
"""Whole weights of a unit, for as long as FSDP2 has it gathered."""
STAGING = "staging buffers"
"""What goes into collectives and comes out of them."""
_AROUND_OTHERS = (DTensor, AsyncCollectiveTensor)
_NAMED = (PARAMETERS, GRADIENTS, OPTIMIZER_STATE, INPUTS, GATHERED, STAGING)
CUDA_BLOCK_BYTES = 512
"""What the allocator of CUDA rounds every size up to (c10/cuda/CUDACachingAllocator)."""


@dataclass(frozen=True)
class Peak:
    """The most that was held at once during a phase, and by what."""

    total_bytes: int
    by_kind: dict[str, int]
    """Parameters, gradients, optimizer state, inputs, gathered weights, buffers of collectives; the
    rest by the phase that made it."""
    by_module: dict[str, int]
    """What was made in forward, loss and backward, by the module at work; "" outside of all."""

    def without(self, num_bytes: int, kind: str) -> Peak:
        """The same where so many bytes of a kind were not there."""
        by_kind = self.by_kind | {kind: self.by_kind.get(kind, 0) - num_bytes}
        return replace(self, total_bytes=self.total_bytes - num_bytes, by_kind=by_kind)


@dataclass
class _Entry:
    num_bytes: int
    kind: str
    module: str
    alive: weakref.ref


@dataclass
class StorageFollower(TorchDispatchMode):
    """Counts the storages that exist, each once whatever the number of its views.

    A storage counts from the operator that returns it until nothing refers to it. What an operator
    takes and gives back within itself (the workspace of a matmul) is not seen. A storage that is
    resized, which is how FSDP2 frees gathered weights, counts with the size that it has; of a
    DTensor the shard of this process does. It works on tensors with and without values alike.

    Args:
        block_bytes: sizes are rounded up to a multiple of it.
    """

    block_bytes: int = CUDA_BLOCK_BYTES
    live_bytes: int = field(init=False, default=0)
    _entries: dict[int, _Entry] = field(init=False, default_factory=dict, repr=False)
    _kinds: Counter[str] = field(init=False, default_factory=Counter, repr=False)
    _modules: Counter[str] = field(init=False, default_factory=Counter, repr=False)
    _phase: str = field(init=False, default="")
    _peaks: dict[str, Peak] = field(init=False, default_factory=dict, repr=False)
    _highest: int = field(init=False, default=0)
    _is_rising: bool = field(init=False, default=False)
    _path: list[str] = field(init=False, default_factory=lambda: [""], repr=False)
    _elsewhere: set[int] = field(init=False, default_factory=set, repr=False)

    def __post_init__(self) -> None:
        super().__init__()

    def __enter__(self) -> Self:
        # FSDP2 frees gathered weights by their storages, of which no operator tells.
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, _AROUND_OTHERS) for kind in types):
            return NotImplemented  # it comes again, with what they hold
        kwargs = kwargs or {}
        if active_fake_mode() is not None:  # DTensor asks for the shape of a whole tensor
            return func(*args, **kwargs)
        out = self._run(func, args, kwargs)
        self._see(out)
        self._see_collective(func, args, kwargs)
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _see(self, out: Any) -> None:
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            # What is around another tensor has a storage without memory.
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, _AROUND_OTHERS):
                self._count(leaf.untyped_storage(), self._phase, self._path[-1])

    def _see_collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Name the buffers of collectives, and what FSDP2's operators copy out of them."""
        if func.namespace not in ("fsdp", "c10d"):
            return
        kind, place = STAGING, args
        if func.name() == "fsdp::split_with_sizes_copy":
            kind, place = GATHERED, kwargs["out"]
        elif func.name() == "fsdp::chunk_cat":
            place = kwargs["out"]
        elif func.name() == "fsdp::all_gather_copy_in":
            place = args[1]
        tensors = (leaf for leaf in tree_leaves(place) if isinstance(leaf, torch.Tensor))
        self.add((t for t in tensors if self._kind(t) not in _NAMED), kind)

    def _kind(self, tensor: torch.Tensor) -> str:
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return entry.kind if entry else ""

    def add(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Count these under `kind`, whatever they were counted under before."""
        for tensor in tensors:
            storage = shard_of(tensor).untyped_storage()
            entry = self._entries.get(storage._cdata)
            if entry is None:
                self._count(storage, kind, "")
            elif entry.kind != kind:
                self._move(entry, -1)
                entry.kind, entry.module = kind, ""
                self._move(entry, 1)

    def bytes_of(self, tensors: Iterable[torch.Tensor]) -> int:
        """What these are counted with, each storage once."""
        keys = {shard_of(tensor).untyped_storage()._cdata for tensor in tensors}
        return sum(self._entries[key].num_bytes for key in keys if key in self._entries)

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """These lie in other memory and never count. They must outlive the follower."""
        for tensor in tensors:
            storage = shard_of(tensor).untyped_storage()
            self._elsewhere.add(storage._cdata)
            self._forget(storage._cdata)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is made here is made in this phase; its peak is kept."""
        self._phase, self._highest, self._is_rising = name, 0, False
        self._rise()
        try:
            yield
        finally:
            self._keep_peak()
            self._phase = ""

    def enter(self, name: str) -> None:
        """End the running phase and begin another, within `phase`."""
        self._keep_peak()
        self._phase, self._highest = name, 0
        self._rise()

    @property
    def current_phase(self) -> str:
        """The running phase; "" outside of all."""
        return self._phase

    def peaks(self) -> dict[str, Peak]:
        """The highest peak of each phase, in the order in which they came first."""
        return dict(self._peaks)

    @contextmanager
    def attributing(self, model: nn.Module) -> Iterator[None]:
        """Remember which module is at work."""
        handles = []
        for name, module in model.named_modules():
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self._path.append(name)),
                module.register_forward_hook(lambda *_: self._leave(), always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self) -> None:
        self._path.pop()

    def _count(self, storage: torch.UntypedStorage, kind: str, module: str) -> None:
        key = storage._cdata
        if key in self._entries or key in self._elsewhere:
            return
        num_bytes = self._size(storage)
        if not num_bytes:
            return
        alive = weakref.ref(storage, lambda _: self._forget(key))
        entry = _Entry(num_bytes, kind, module, alive)
        self._entries[key] = entry
        self._move(entry, 1)
        self.live_bytes += num_bytes
        self._rise()

    def _size(self, storage: torch.UntypedStorage) -> int:
        return -(-storage.nbytes() // self.block_bytes) * self.block_bytes

    def _resized(self, storage: torch.UntypedStorage) -> None:
        entry = self._entries.get(storage._cdata)
        if entry is not None and entry.num_bytes != self._size(storage):
            self._forget(storage._cdata)
        self._count(storage, self._phase, self._path[-1])

    def _rise(self) -> None:
        if self.live_bytes > self._highest:
            self._highest, self._is_rising = self.live_bytes, True

    def _forget(self, key: int) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if self._is_rising and self.live_bytes == self._highest:
            self._keep_peak()  # of what is held now, before some of it goes
        self._is_rising = False
        self.live_bytes -= entry.num_bytes
        self._move(entry, -1)

    def _move(self, entry: _Entry, sign: int) -> None:
        self._kinds[entry.kind] += sign * entry.num_bytes
        if entry.kind not in _NAMED:
            self._modules[entry.module] += sign * entry.num_bytes

    def _keep_peak(self) -> None:
        known = self._peaks.get(self._phase)
        is_higher = known is None or self._highest > known.total_bytes
        if self._phase and self.live_bytes == self._highest and is_higher:
            self._peaks[self._phase] = Peak(self._highest, +self._kinds, +self._modules)
