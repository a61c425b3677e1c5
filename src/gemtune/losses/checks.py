"""What linear_cross_entropy refuses, before any work: one error each, with the remedy."""

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


ROWS_OF_ONE_RANK = (
    "only plain tensors are allowed, with the rows of this rank: the weight alone may be sharded. "
    "Pass to_local() of a tensor that is sharded over rows, full_tensor() of any other."
)


def is_dtensor(tensor: Tensor | None) -> bool:
    """Asked without importing torch.distributed.tensor, which takes half a second."""
    return hasattr(tensor, "device_mesh")


def check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: received {type(tensor).__name__}; pass a torch.Tensor.")
        if is_dtensor(tensor) and name != "weight":
            raise TypeError(f"{name}: received a DTensor; {ROWS_OF_ONE_RANK}")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name}: received {tensor.dtype}; allowed are {FLOAT_DTYPES}. Convert it first."
            )
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(
            f"labels: received {labels.dtype}; allowed are {LABEL_DTYPES}. Pass class indices."
        )
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"weight: received shape {list(weight.shape)}; allowed is [V, H] with V > 0. Pass the "
            "weight of the head as nn.Linear stores it."
        )
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden: received shape {list(hidden.shape)} for weight {list(weight.shape)}; the "
            "last dimensions must be equal. Pass weight as [V, H], not transposed."
        )
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels: received shape {list(labels.shape)} for hidden {list(hidden.shape)}; allowed "
            f"is {list(hidden.shape[:-1])}. Shift labels so that each is the target of its row."
        )
    allowed = (hidden.device, torch.device("cpu"))
    if hidden.device != weight.device or labels.device not in allowed:
        raise ValueError(
            f"devices: hidden on {hidden.device}, weight on {weight.device}, labels on "
            f"{labels.device}; hidden and weight must be on one device, labels there or on the "
            "CPU. Move them with .to(hidden.device)."
        )


def check_low_rank(hidden: Tensor, weight: Tensor, low_rank: tuple[Tensor, Tensor]) -> None:
    rows, low_weight = low_rank
    rank = low_weight.shape[-1]
    wanted = ([*hidden.shape[:-1], rank], [weight.shape[0], rank])
    found = (list(rows.shape), list(low_weight.shape))
    if low_weight.dim() != 2 or found != wanted:
        raise ValueError(
            f"low_rank: received shapes {found[0]} and {found[1]} for hidden {list(hidden.shape)} "
            f"and weight {list(weight.shape)}; allowed are [..., R] with the leading dimensions of "
            "hidden, and [V, R]."
        )
    if is_dtensor(rows):
        raise TypeError(f"low_rank[0]: received a DTensor; {ROWS_OF_ONE_RANK}")
    for name, tensor in (("low_rank[0]", rows), ("low_rank[1]", low_weight)):
        if tensor.device != hidden.device or not tensor.is_floating_point():
            raise ValueError(
                f"{name}: received {tensor.dtype} on {tensor.device}; it must be a float tensor on "
                f"{hidden.device}, where hidden is."
            )


def check_options(
    softcap, reduction, num_items, label_smoothing, z_loss_weight, chunk_bytes
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: received {reduction!r}; use 'mean', 'sum' or 'none'.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(
            f"softcap: received {softcap}; it must be positive and finite. Pass None for no cap."
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(
            f"label_smoothing: received {label_smoothing}; allowed is [0, 1). Pass 0 for none."
        )
    if not 0 <= z_loss_weight < math.inf:
        raise ValueError(
            f"z_loss_weight: received {z_loss_weight}; it must be 0 or more. Pass 0 for none."
        )
    if chunk_bytes is not None and (not isinstance(chunk_bytes, int) or chunk_bytes <= 0):
        raise ValueError(
            f"chunk_bytes: received {chunk_bytes}; it must be a positive int of bytes. Pass None "
            "for the default."
        )
    if num_items is None:
        return
    if reduction == "none":
        raise ValueError(
            f"num_items: received {num_items} with reduction='none', which divides nothing. Divide "
            "the summed losses yourself, or use reduction='sum'."
        )
    if not (isinstance(num_items, int) or (isinstance(num_items, Tensor) and num_items.dim() == 0)):
        shape = list(num_items.shape) if isinstance(num_items, Tensor) else num_items
        raise TypeError(
            f"num_items: received {type(num_items).__name__} {shape}; allowed are an int and a "
            "0-d tensor. Pass num_items.sum() for per-device counts."
        )
