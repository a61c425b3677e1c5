"""What the tensors of this process belong to: for the report after an out-of-memory error."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def holdings(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> Counter[str]:
    """Bytes on `device` by owner, modules that differ by a number taken together.

    Weights, gradients and optimizer state under the names of their modules, then what else Python
    refers to, by shape. What autograd alone keeps for the backward pass is no object of Python: on
    a GPU it is the rest of what the allocator says, and stands here as `kept for backward`.
    """
    found: Counter[str] = Counter()
    seen: set[int] = set()

    def add(owner: str, tensor: Tensor | None) -> None:
        tensor = getattr(tensor, "_local_tensor", tensor)  # the shard of a DTensor
        if tensor is None or tensor.device.type != device.type:
            return
        if hasattr(tensor, "__tensor_flatten__"):  # a library's own, in few bits
            for name in tensor.__tensor_flatten__()[0]:
                add(owner, getattr(tensor, name))
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            found[owner] += storage.nbytes()

    for name, parameter in model.named_parameters():
        module = _NUMBER.sub(".*", name.rpartition(".")[0]) or "(root)"
        add(f"weights of {module}", parameter)
        add(f"gradients of {module}", parameter.grad)
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor):
                add(f"optimizer state of {module}", value)
    for name, buffer in model.named_buffers():
        add(f"buffers of {_NUMBER.sub('.*', name.rpartition('.')[0]) or '(root)'}", buffer)
    for tensor in _tensors_of_python():
        shape = " x ".join(map(str, tensor.shape)) or "1"
        add(f"tensors of {shape} {str(tensor.dtype).removeprefix('torch.')}", tensor)
    if device.type == "cuda":
        hidden = torch.cuda.memory_allocated(device) - found.total()
        if hidden > 0:
            found["kept for backward, or by libraries"] = hidden
    return found


def _tensors_of_python() -> Iterator[Tensor]:
    objects: Iterable[object] = gc.get_objects()
    for item in objects:
        # By type: `isinstance` would ask proxies for their class, and wake them.
        if issubclass(type(item), Tensor) and not issubclass(type(item), nn.Parameter):
            tensor: Tensor = item  # type: ignore[assignment]
            if not tensor.is_meta and tensor.layout == torch.strided:
                yield tensor
