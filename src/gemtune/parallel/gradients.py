"""Gradients as they lie: whole under DDP, shares under FSDP2."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """The norm of all gradients together, [] on the device, equal on all ranks.

    Gradients are scaled down to `max_norm`; None leaves them. A collective where they are shares.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm or math.inf, norm)
    return norm
