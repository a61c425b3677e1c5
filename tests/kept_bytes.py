"""How many bytes a computation leaves alive for its backward pass, exactly and on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Storages(TorchDispatchMode):
    """Every storage that an operation read or returned, by references that do not keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.created: dict[int, tuple[StorageWeakRef, int]] = {}
        self.existed: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        for ref, _ in _storages(tree_leaves((args, kwargs))):
            if ref.cdata not in self.created:
                self.existed[ref.cdata] = ref
        result = func(*args, **(kwargs or {}))
        for ref, num_bytes in _storages(tree_leaves(result)):
            if ref.cdata not in self.existed:
                self.created[ref.cdata] = ref, num_bytes
        return result


def _storages(values: Iterable[Any]) -> Iterator[tuple[StorageWeakRef, int]]:
    for value in values:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            yield StorageWeakRef(storage), storage.nbytes()


def kept_bytes(compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """The result of `compute`, and the bytes of what it created and left alive besides that.

    Memory that existed before, such as weights, does not count. Saved-tensor hooks would see only
    what autograd shows them, and geglu steps back where it finds such hooks.
    """
    with _Storages() as storages:
        result = compute()
    returned = StorageWeakRef(result.untyped_storage()).cdata
    alive = sum(
        num_bytes
        for cdata, (ref, num_bytes) in storages.created.items()
        if cdata != returned and not ref.expired()
    )
    return result, alive


class Alive(TorchDispatchMode):
    """The most bytes that what was created within it holds at once, looked at after each call."""

    def __init__(self) -> None:
        super().__init__()
        self._storages = _Storages()
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = self._storages.__torch_dispatch__(func, types, args, kwargs)
        created = self._storages.created
        for cdata in [cdata for cdata, (ref, _) in created.items() if ref.expired()]:
            del created[cdata]
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in created.values()))
        return result
