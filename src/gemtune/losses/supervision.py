"""Which labels are learned: counted, checked and compacted on the CPU, so that no GPU waits."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class HostLabels:
    """The labels of a batch, which stay on the CPU.

    DDP and accelerate move every tensor they find in the inputs of a model to the GPU. A plain
    object they leave alone, so that the labels can be read without waiting for the GPU.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def keep_supervised(
    labels: Tensor, ignore_index: int, vocab_size: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Return (positions of supervised labels, None for all of them; the labels there) on `device`.

    Raises:
        ValueError: a label that is neither in [0, vocab_size) nor ignore_index.
    """
    if not has_values(labels):  # nothing can be left out
        return None, labels.reshape(-1).to(device, torch.int64)
    flat = labels.reshape(-1).to("cpu", torch.int64)
    supervised = flat != ignore_index
    kept = supervised.nonzero().squeeze(1)
    targets = flat if len(kept) == len(flat) else flat[kept]
    stray = targets[(targets < 0) | (targets >= vocab_size)]
    if len(stray):
        raise ValueError(
            f"labels: {len(stray)} outside the vocabulary, such as {stray[:3].tolist()}; "
            f"allowed are 0 to {vocab_size - 1} (rows of weight) and ignore_index={ignore_index}. "
            "Set labels that carry no loss to ignore_index."
        )
    if len(kept) == len(flat):
        return None, to_device(flat, device)
    return to_device(kept, device), to_device(targets, device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without waiting for a GPU."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def has_values(tensor: Tensor) -> bool:
    """False for a fake tensor: there is nothing to read."""
    return not isinstance(tensor, FakeTensor)
