"""Cross-entropy of a linear head without the logits of the whole batch in memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from gemtune.losses import traced
from gemtune.losses.budgets import default_chunk_bytes
from gemtune.losses.checks import check_low_rank, check_options, check_tensors, is_dtensor
from gemtune.losses.functions import PerTokenLoss, ReducedLoss
from gemtune.losses.supervision import has_values, keep_supervised
from gemtune.losses.tiles import Settings, accumulator_dtype


class LinearCrossEntropyMetrics(NamedTuple):
    """Sums over the supervised tokens of one call, as 0-d tensors on the device of the inputs."""

    num_tokens: Tensor
    num_correct: Tensor
    entropy_sum: Tensor
    logsumexp_sum: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    chunk_bytes: int | None = None,
    metrics: bool = False,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, LinearCrossEntropyMetrics]:
    """Return the loss and exact gradients of cross-entropy over softcap(hidden @ weight.T).

    softcap(x) is softcap * tanh(x / softcap). A token's loss is its cross-entropy, smoothed as in
    torch, plus z_loss_weight * logsumexp^2. `metrics` adds sums over tokens from the same pass.
    `low_rank` (rows [..., R], weight [V, R]) adds rows @ weight.T to the logits before the cap: a
    LoRA on the head, whose product with the head's weight is never made.

    Shapes: hidden [..., H], weight [V, H], labels [...] already shifted; the loss is 0-d, or
    shaped as labels (0 where ignored) with reduction="none".
    Dtypes: hidden and weight alike, float64, float32, bfloat16 or float16; under autocast both
    are brought to its dtype for the matmuls. Logits, loss, metrics and gradient sums are float32
    (float64 for float64); each gradient is rounded once, to the dtype of its input.
    Reduction: "mean" is over the supervised labels of this call. `num_items` (int or 0-d tensor)
    divides the sum instead, with "mean" and "sum" alike: the token count of a whole optimizer
    step. A call without supervised labels gives a zero that is connected to both inputs.
    Work: ignored rows are dropped first. "mean" and "sum" compute the gradients during forward, 3
    matmuls (2 for one gradient, 1 for none), and release them at the first backward. "none" does
    not know the upstream gradient yet, so it recomputes the logits in backward, 4 matmuls.
    Memory: `chunk_bytes` (default 256 MiB on CPU, 1 GiB elsewhere; at least one row) for logits,
    2 MiB on CPU or 64 MiB elsewhere for scratch (twice with metrics), and until backward the
    gradients in the accumulator dtype. CPU widens half-precision weights 16 MiB at a time.
    Waits: labels are counted and checked on the CPU. If they are on an accelerator, that is the one
    wait for it; labels that are on the CPU already spare it.
    Under torch.compile it is one operator of fixed shapes (`gemtune.losses.traced`). On fake
    tensors, whose labels nobody can read, all rows count as supervised: the largest memory.
    Sharded: a weight that is a DTensor placed as FSDP2 does ([Shard(0)], [Replicate(), Shard(0)] or
    [Replicate()]) gets the gradient of each rank's loss, averaged over the mesh as FSDP2 averages.
    All its ranks must call; loss and metrics are of a rank's own labels. It is gathered, or, where
    ranks * (most supervised labels of a rank) < V, stays where it is, and each rank scores the rows
    of all with its slice (`gemtune.losses.sharded`). This holds the rows of all ranks and their
    gradients, waits for an accelerator once more in forward and once in backward, and makes 2
    matmuls more where ranks multiply their losses by different factors. reduction="none" and
    `low_rank` always gather.
    Refused: shapes, dtypes or devices that do not fit, labels outside [0, V) other than
    ignore_index, DTensors placed otherwise, given as rows or labels, or under torch.compile, a
    second backward with "mean" and "sum", double differentiation.

    Sources: Liger-Kernel#1203 (float32 head gradient), TRL, Cut Cross-Entropy (arXiv:2411.09009).
    """
    check_tensors(hidden, weight, labels)
    check_options(softcap, reduction, num_items, label_smoothing, z_loss_weight, chunk_bytes)
    if low_rank is not None:
        check_low_rank(hidden, weight, low_rank)
    matmul_dtype = choose_matmul_dtype(hidden, weight)
    chunk_bytes = chunk_bytes or default_chunk_bytes(hidden.device)
    settings = Settings(softcap, label_smoothing, z_loss_weight, chunk_bytes, metrics, matmul_dtype)
    low_rows, low_weight = low_rank or (None, None)
    if traced.is_tracing():
        tensors = (hidden, weight, low_rows, low_weight)
        loss, *sums = traced.loss(tensors, labels, ignore_index, reduction, num_items, settings)
        return (loss, LinearCrossEntropyMetrics(*sums)) if metrics else loss

    kept, targets = keep_supervised(labels, ignore_index, weight.shape[0], hidden.device)
    scale = reduction_scale(reduction, num_items, targets, accumulator_dtype(matmul_dtype))
    rows = supervised_rows(hidden, kept)
    low_rows = None if low_rows is None else supervised_rows(low_rows, kept)
    peers = None
    if is_dtensor(weight) or is_dtensor(low_weight):
        from gemtune.losses import sharded, slices  # half a second: torch.distributed.tensor

        weight, low_weight, peers = sharded.localize(
            weight, low_weight, rows, scale, settings, per_token=reduction == "none"
        )
    if peers is not None:
        loss, *sums = slices.SlicedLoss.apply(rows, weight, targets, scale, settings, peers)
    elif reduction == "none":
        losses, *sums = PerTokenLoss.apply(rows, weight, low_rows, low_weight, targets, settings)
        if kept is not None:
            losses = losses.new_zeros(labels.numel()).index_copy(0, kept, losses)
        loss = losses.reshape(labels.shape)
    else:
        # Inside forward() grad mode is off and needs_input_grad ignores it, so it is asked here.
        recording = torch.is_grad_enabled()
        loss, *sums = ReducedLoss.apply(
            rows, weight, low_rows, low_weight, targets, scale, settings, recording
        )
    return (loss, LinearCrossEntropyMetrics(*sums)) if metrics else loss


def supervised_rows(hidden: Tensor, kept: Tensor | None) -> Tensor:
    """[N, H]: the rows at the positions `kept`, or all of them."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows if kept is None else rows.index_select(0, kept)


def reduction_scale(
    reduction: str, num_items: int | Tensor | None, targets: Tensor, dtype: torch.dtype
) -> Tensor:
    """What the summed loss is multiplied by, as a 0-d tensor."""
    count = targets.numel() if reduction == "mean" else 1
    if num_items is not None:
        count = num_items
    if targets.numel() == 0:
        count = 1  # nothing to divide: zero, not 0 / 0
    if isinstance(count, Tensor) and (count.device.type != "cpu" or not has_values(count)):
        return count.to(device=targets.device, dtype=dtype).reciprocal()
    if count <= 0:
        raise ValueError(
            f"num_items: received {int(count)} with {targets.numel()} supervised labels; it must "
            "be positive. Pass the supervised tokens of the whole optimizer step."
        )
    return torch.full((), 1.0 / float(count), device=targets.device, dtype=dtype)


def choose_matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of both matmul operands: autocast's if on, else the one they share."""
    dtypes = (hidden.dtype, weight.dtype)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}; they must be equal (autocast "
            "would cast all but float64). Pass hidden.to(weight.dtype), or call under "
            "torch.autocast."
        )
    return hidden.dtype
