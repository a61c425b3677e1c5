"""How many bytes a forward pass keeps alive for the backward pass, exactly, on any device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Storages(TorchDispatchMode):
    """Every storage that an operation returned, by references that keep none of them alive."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                # The reference also keeps the address from being used for another storage.
                reference = StorageWeakRef(value.untyped_storage())
                self._seen.setdefault(reference.cdata, reference)
        return result

    def alive(self) -> dict[int, int]:
        """Identity -> bytes of those that something still holds."""
        gc.collect()
        found = {}
        for cdata in self._seen:
            storage = torch.UntypedStorage._new_with_weak_ptr(cdata)
            if storage is not None:
                found[cdata] = storage.nbytes()
        return found


def saved_for_backward(
    forward: Callable[[], torch.Tensor], release: Callable[[torch.Tensor], object]
) -> int:
    """Bytes that are alive after `forward` and no longer after the backward pass.

    `forward` returns the loss and must let go of everything else that it made. `release` gets the
    detached loss after the backward pass, reads what it wants, and drops the gradients.

    This counts what is held, by whatever holds it: autograd's saved tensors, attributes of custom
    functions, what saved-tensor hooks packed. The other ways miss something: counting in
    `saved_tensors_hooks` changes code that looks for such hooks (the patch geglu) and sees no
    attribute; a walk over `grad_fn._saved_*` would run the hooks that recompute. Each storage
    counts once, whatever views there are; weights, inputs and caches that outlive the step do not.
    """
    with _Storages() as storages:
        loss = forward()
    before = storages.alive()
    value = loss.detach()
    loss.backward()
    del loss  # the graph goes with it, and with the graph what custom functions hold
    release(value)
    after = storages.alive()
    return sum(num_bytes for cdata, num_bytes in before.items() if cdata not in after)
