"""Weights that stay in host memory wherever the model goes: `.to()`, `.cuda()`, `prepare()`."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

from gemtune.errors import PatchError
from gemtune.patches.base import Change, Edit, Relocation

HOST_MEMORY = "_gemtune_host_memory"
"""The attribute of a module whose parameters, those of its children included, stay."""

ORDINARY, PINNED, MAPPED = "ordinary", "pinned", "mapped"

_ALIGNMENT = 256  # bytes, as CUDA's allocator has it; no instruction of a CPU asks for more
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of this process


def can_map() -> bool:
    """Whether this system can give the pages of a mapped file back and read them again."""
    return hasattr(mmap, "MADV_DONTNEED") and hasattr(mmap.mmap, "madvise")


def packed(tensors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins when all lie in one block, and the size of the block, in bytes."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class _Region(mmap.mmap):
    """Whole pages of memory, which tensors made with `torch.frombuffer` keep alive."""

    pinned_at: int | None = None
    process: int = -1

    def pin(self, address: int) -> None:
        # Not Tensor.pin_memory(): its allocator rounds each block up to a power of two.
        error = torch.cuda.cudart().cudaHostRegister(address, len(self), _PORTABLE)
        if int(error) != 0:
            raise OSError(
                f"CUDA could not pin {len(self) / 2**20:.0f} MiB of host memory ({error!r}): the "
                "limit on locked memory (ulimit -l) is one reason"
            )
        self.pinned_at, self.process = address, os.getpid()

    def __del__(self) -> None:
        # Before the pages go. A forked loader worker has no CUDA, and a process that ends has
        # its pages unpinned for it.
        if self.pinned_at is None or self.process != os.getpid() or sys.is_finalizing():
            return
        torch.cuda.synchronize()  # a copy from these pages may be under way
        torch.cuda.cudart().cudaHostUnregister(self.pinned_at)


def pinned_block(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8 that a GPU reads and writes without the CPU's help.

    Raises:
        OSError: CUDA could not pin it.
    """
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    region = _Region(-1, num_bytes)
    block = torch.frombuffer(region, dtype=torch.uint8)  # keeps the region
    region.pin(block.data_ptr())
    return block


@dataclass(eq=False)
class HostMemory:
    """Memory of the host for the parameters of one module, its children included.

    `ordinary`: as the CPU's tensors have it. `pinned`: the GPU reads it without the CPU's help,
    so that copies run beside computation. `mapped`: a file without a name, whose pages can be
    given back and are read again when they are touched; it is gone with the process, however
    that ends.

    A copy of it (`copy.deepcopy`, pickle) has no memory yet: the parameters of a deep copy lie in
    ordinary memory until their dtype changes.
    """

    kind: str = ORDINARY
    folder: str | None = None
    """Where the file of `mapped` lies; None: $TMPDIR, else /var/tmp, which is on disk where /tmp
    may be memory itself."""
    follows: frozenset[str] = frozenset()
    """Parameters, by name within the module, that may go to a device all the same."""
    _region: _Region | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_region": None}

    def hold(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The values in memory of this kind; what was held before is free once it is unused.

        Raises:
            PatchError: no space in the folder, or memory that cannot be pinned.
        """
        if any(value.is_meta for value in values):
            return list(values)  # there is nothing to hold
        if self.kind == ORDINARY or not values:
            return [value.cpu() for value in values]
        offsets, size = packed(values)
        region = _mapped_region(size, self.folder) if self.kind == MAPPED else _Region(-1, size)
        held = [
            torch.frombuffer(region, dtype=v.dtype, count=v.numel(), offset=offset).view(v.shape)
            for v, offset in zip(values, offsets, strict=True)
        ]
        if self.kind == PINNED:
            try:
                region.pin(held[0].data_ptr())
            except OSError as error:
                raise PatchError(f"{error}. Raise it, or use memory: mapped.") from error
        for target, value in zip(held, values, strict=True):
            target.copy_(value)
        self._region = region
        if self.kind == MAPPED:
            region.flush()  # pages that the file has already cost nothing to give back
            self.release()
        return held

    def release(self) -> None:
        """Give mapped pages back: they stay in the file, and do not count as resident."""
        if self.kind == MAPPED and self._region is not None:
            self._region.madvise(mmap.MADV_DONTNEED)

    def prefetch(self) -> None:
        """Let the system read mapped pages from the file while something else is computed."""
        if self.kind == MAPPED and self._region is not None:
            self._region.madvise(mmap.MADV_WILLNEED)

    def parameters_of(self, owner: nn.Module) -> list[nn.Parameter]:
        """Those that lie in this memory. What may follow the model is worth mapping, not pinning:
        it leaves for the GPU anyhow."""
        return [
            parameter
            for name, parameter in owner.named_parameters()
            if name not in self.follows or (self.kind == MAPPED and parameter.device.type == "cpu")
        ]


def _mapped_region(size: int, folder: str | None) -> _Region:
    where = folder or os.environ.get("TMPDIR") or "/var/tmp"
    try:
        with tempfile.TemporaryFile(prefix="gemtune-", dir=where) as file:
            # Space is taken now: a write to a mapped page with none left would end the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                os.ftruncate(file.fileno(), size)
            return _Region(file.fileno(), size)
    except OSError as error:
        raise PatchError(
            f"{size / 2**20:.0f} MiB of weights could not be put into a file in {where}: {error}. "
            "Name another folder (option `folder` of the patch)."
        ) from error


def stay_on_host(owner: nn.Module, memory: HostMemory, site: str) -> Iterator[Change]:
    """The changes that move the parameters of `owner` to `memory` and keep them there.

    The parameters stay the same objects, and follow every change of dtype; buffers go where the
    model goes. `owner` must be reached by `_apply` of the modules above it, as every module is.
    """
    yield Edit(owner, HOST_MEMORY, memory, site)
    yield Edit(owner, "_apply", MethodType(_apply_on_host, owner), site)
    parameters = tuple(memory.parameters_of(owner))
    if memory.kind != ORDINARY or any(p.device.type != "cpu" for p in parameters):
        yield Relocation(parameters, memory.hold, site)


def _apply_on_host(
    self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    """`nn.Module._apply`, through which `.to()` and its like go, without a change of device."""
    memory: HostMemory = vars(self)[HOST_MEMORY]
    stays = {id(p) for name, p in self.named_parameters() if name not in memory.follows}

    def without_moving(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in stays:
            return fn(tensor)
        return tensor.to(fn(tensor.new_empty(0)).dtype)

    before = _places(self)
    type(self)._apply(self, without_moving, recurse)
    if _places(self) != before:
        parameters = memory.parameters_of(self)
        values = memory.hold([parameter.data for parameter in parameters])
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
    return self


def _places(module: nn.Module) -> list[tuple[torch.device, int]]:
    return [(parameter.device, parameter.data_ptr()) for parameter in module.parameters()]


def host_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters that patches keep in host memory, in the order of the model.

    DDP takes parameters on one type of device only: it has to be told to ignore these.
    """
    names: list[str] = []
    for prefix, module in model.named_modules():
        memory = vars(module).get(HOST_MEMORY)
        if memory is not None:
            follow = {f"{prefix}.{name}" if prefix else name for name in memory.follows}
            found = (name for name, _ in module.named_parameters(prefix=prefix))
            names += [name for name in found if name not in follow]
    return names
