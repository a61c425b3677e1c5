"""The softmax of a chunk of logits, and its gradient, as compiled kernels for a GPU.

Eager tiles (`gemtune.losses.tiles`) read each logit about ten times, which a CPU's cache hides and
a GPU's does not. torch.compile turns the two functions below into one reduction and one pointwise
kernel: three reads and one write. Where that is not to be had the tiles do the same.

Shape letters: R rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gemtune.losses.tiles import Settings


@functools.cache
def fused_softmax(device_type: str) -> Callable[..., None] | None:
    """Stands in for `tiles.softmax_chunk` on this kind of device; None: it cannot be compiled.

    It is tried once on a small chunk before it is handed out.
    """
    if device_type != "cuda" or not _can_compile():
        return None
    try:
        _try_out(torch.device(device_type))
    except Exception as error:  # whatever a compiler may raise
        warnings.warn(
            "linear_cross_entropy: its kernels could not be compiled, so it works tile by tile, "
            f"which is slower and equally exact ({type(error).__name__}: {error})",
            stacklevel=2,
        )
        return None
    return softmax_chunk


def _can_compile() -> bool:
    from torch.utils._triton import has_triton

    # Uncompiled, the functions below would hold several chunks at once.
    return has_triton() and not torch._dynamo.config.disable


def _try_out(device: torch.device) -> None:
    from gemtune.losses.tiles import Settings

    settings = Settings(30.0, 0.0, 0.0, 1, True, torch.float32)
    logits = torch.linspace(-1, 1, 6 * 500, device=device).reshape(6, 500)
    targets = torch.arange(6, device=device)
    grad = torch.empty_like(logits)
    records = torch.empty(4, 6, device=device)
    softmax_chunk(logits, grad, targets, torch.ones(6, device=device), records, settings)
    expected = torch.nn.functional.cross_entropy(30 * torch.tanh(logits), targets, reduction="none")
    torch.testing.assert_close(records[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad.sum(1).isfinite().all().item(), True)


def softmax_chunk(
    logits_RV: Tensor,
    grad_RV: Tensor,
    targets_R: Tensor,
    scale_R: Tensor | None,
    records: Tensor,
    settings: Settings,
) -> None:
    """Record losses and metrics of the chunk, and set `grad_RV` (own memory) to its gradient.

    `logits_RV` arrives divided by the cap and is left as it is. Without `scale_R`, no gradient.
    """
    targets_R1 = targets_R.unsqueeze(1)
    cap, capped = settings.softcap or 1.0, settings.softcap is not None
    # As in tiles.softmax_tile: the sum of the exponentials stays below the largest float32.
    bounded = capped and cap + math.log(logits_RV.shape[1]) < 88.0
    smoothing, z = settings.label_smoothing, settings.z_loss_weight
    found, lse_R1 = _compiled(_statistics)(
        logits_RV, targets_R1, cap, capped, bounded, smoothing, z, settings.metrics
    )
    records.copy_(found)
    if scale_R is not None:
        scale_R1 = scale_R.unsqueeze(1)
        row_R1 = scale_R1 * (1 + 2 * z * lse_R1)
        _compiled(_write_gradient)(
            logits_RV, grad_RV, targets_R1, lse_R1, scale_R1, row_R1, cap, capped, smoothing
        )


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _statistics(
    logits_RV: Tensor,
    targets_R1: Tensor,
    cap: float,
    capped: bool,
    bounded: bool,
    smoothing: float,
    z: float,
    metrics: bool,
) -> tuple[Tensor, Tensor]:
    """[1 or 4, R]: loss, and with metrics correct, entropy, log-sum-exp; and the latter [R, 1]."""
    values_RV = (torch.tanh(logits_RV) if capped else logits_RV) * cap
    shift_R1 = 0.0 if bounded else values_RV.amax(1, keepdim=True)
    exps_RV = torch.exp(values_RV - shift_R1)
    total_R1 = exps_RV.sum(1, keepdim=True)
    lse_R1 = total_R1.log() + shift_R1
    target_R1 = logits_RV.gather(1, targets_R1)
    target_R1 = (torch.tanh(target_R1) if capped else target_R1) * cap
    loss_R1 = lse_R1 - target_R1
    if smoothing:
        loss_R1 = loss_R1 + smoothing * (target_R1 - values_RV.mean(1, keepdim=True))
    if z:
        loss_R1 = loss_R1 + z * lse_R1.square()
    if not metrics:
        return loss_R1.t(), lse_R1
    correct_R1 = (logits_RV.argmax(1, keepdim=True) == targets_R1).to(loss_R1.dtype)
    entropy_R1 = lse_R1 - (exps_RV * values_RV).sum(1, keepdim=True) / total_R1
    return torch.cat((loss_R1, correct_R1, entropy_R1, lse_R1), dim=1).t(), lse_R1


def _write_gradient(
    logits_RV: Tensor,
    grad_RV: Tensor,
    targets_R1: Tensor,
    lse_R1: Tensor,
    scale_R1: Tensor,
    row_R1: Tensor,
    cap: float,
    capped: bool,
    smoothing: float,
) -> None:
    """d loss / d logits before the cap, 1 - tanh^2 for each column, the target's as well."""
    scaled_RV = torch.tanh(logits_RV) if capped else logits_RV
    vocab_size = logits_RV.shape[1]
    columns_V = torch.arange(vocab_size, device=logits_RV.device)
    hit_RV = torch.where(columns_V == targets_R1, scale_R1 * (1 - smoothing), 0.0)
    gradient_RV = torch.exp(scaled_RV * cap - lse_R1) * row_R1 - hit_RV
    if smoothing:
        gradient_RV = gradient_RV - scale_R1 * (smoothing / vocab_size)
    if capped:
        gradient_RV = gradient_RV * (1 - scaled_RV * scaled_RV)
    grad_RV.copy_(gradient_RV)
