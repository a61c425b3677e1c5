"""Cross-entropy of a linear head without the logits of the whole batch in memory."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemtune.losses.tiles import MIB, Settings, accumulator_dtype, score

CPU_CHUNK_BYTES = 256 * MIB
ACCELERATOR_CHUNK_BYTES = 1024 * MIB
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
) -> Tensor | tuple[Tensor, LinearCrossEntropyMetrics]:
    """Return the loss and exact gradients of cross-entropy over softcap(hidden @ weight.T).

    softcap(x) is softcap * tanh(x / softcap). A token's loss is its cross-entropy, smoothed as in
    torch, plus z_loss_weight * logsumexp^2. `metrics` adds sums over tokens from the same pass.

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
    Waits for an accelerator once, to count the supervised labels and find labels out of range.
    Refused: shapes, dtypes or devices that do not fit, labels outside [0, V) other than
    ignore_index, DTensors, a second backward with "mean" and "sum", double differentiation.

    Sources: Liger-Kernel#1203 (float32 head gradient), TRL, Cut Cross-Entropy (arXiv:2411.09009).
    """
    check_tensors(hidden, weight, labels)
    check_options(softcap, reduction, num_items, label_smoothing, z_loss_weight, chunk_bytes)
    matmul_dtype = choose_matmul_dtype(hidden, weight)
    kept, targets = keep_supervised(labels, ignore_index, weight.shape[0])
    scale = reduction_scale(reduction, num_items, targets, accumulator_dtype(matmul_dtype))
    default_bytes = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    chunk_bytes = chunk_bytes or default_bytes
    settings = Settings(softcap, label_smoothing, z_loss_weight, chunk_bytes, metrics, matmul_dtype)
    rows = hidden.reshape(-1, weight.shape[1])
    if kept is not None:
        rows = rows.index_select(0, kept)
    if reduction == "none":
        losses, *sums = PerTokenLoss.apply(rows, weight, targets, settings)
        if kept is not None:
            losses = losses.new_zeros(labels.numel()).index_copy(0, kept, losses)
        loss = losses.reshape(labels.shape)
    else:
        # Inside forward() grad mode is off and needs_input_grad ignores it, so it is asked here.
        recording = torch.is_grad_enabled()
        loss, *sums = ReducedLoss.apply(rows, weight, targets, scale, settings, recording)
    return (loss, LinearCrossEntropyMetrics(*sums)) if metrics else loss


class ReducedLoss(torch.autograd.Function):
    """scale * sum of losses; gradients are made in forward and given away in backward."""

    @staticmethod
    def forward(ctx, rows, weight, targets, scale, settings, recording):
        # A weight of 1 / num_items would push float16 gradients of logits below the smallest
        # float16, so there it is applied at the end.
        late = settings.matmul_dtype == torch.float16
        row_scale = torch.ones_like(scale) if late else scale
        needs = ctx.needs_input_grad[:2] if recording else (False, False)
        with torch.autocast(rows.device.type, enabled=False):
            scores = score(rows, weight, targets, row_scale, settings, needs)
        ctx.gradients = (scores.grad_rows_NH, scores.grad_weight_VH)
        ctx.dtypes = (rows.dtype, weight.dtype)
        ctx.late_scale = scale if late else None
        ctx.mark_non_differentiable(*scores.sums)
        return scores.losses_N.sum() * scale, *scores.sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: second backward through one loss; its gradients are "
                "released at the first, to free their memory. Call linear_cross_entropy again, "
                "add losses before backward, or use reduction='none' with retain_graph=True."
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad_loss if ctx.late_scale is None else grad_loss * ctx.late_scale
        # Only the CPU can read the factor without waiting; elsewhere the multiplication is cheaper.
        if factor.device.type == "cpu" and factor.item() == 1.0:
            factor = None
        finished = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            if gradient is not None:
                gradient = gradient if factor is None else gradient.mul_(factor)
                gradient = gradient.to(dtype)
            finished.append(gradient)
        return finished[0], finished[1], None, None, None, None


class PerTokenLoss(torch.autograd.Function):
    """One loss per row; backward scores the rows again, weighted by the upstream gradient."""

    @staticmethod
    def forward(ctx, rows, weight, targets, settings):
        ctx.settings = settings
        ctx.save_for_backward(rows, weight, targets)
        with torch.autocast(rows.device.type, enabled=False):
            no_scale = torch.ones((), device=rows.device)
            scores = score(rows, weight, targets, no_scale, settings, (False, False))
        ctx.mark_non_differentiable(*scores.sums)
        return scores.losses_N, *scores.sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses, *_):
        rows, weight, targets = ctx.saved_tensors
        settings = ctx.settings._replace(metrics=False)
        needs = ctx.needs_input_grad[:2]
        with torch.autocast(rows.device.type, enabled=False):
            scores = score(rows, weight, targets, grad_losses, settings, needs)
        grad_rows, grad_weight = scores.grad_rows_NH, scores.grad_weight_VH
        grad_rows = None if grad_rows is None else grad_rows.to(rows.dtype)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_rows, grad_weight, None, None


def keep_supervised(
    labels: Tensor, ignore_index: int, vocab_size: int
) -> tuple[Tensor | None, Tensor]:
    """Return (positions of supervised labels, None for all of them; the labels there)."""
    flat = labels.reshape(-1).to(torch.int64)
    supervised = flat != ignore_index
    stray = supervised & ((flat < 0) | (flat >= vocab_size))
    # One wait on an accelerator answers both questions.
    num_supervised, num_stray = torch.stack((supervised.sum(), stray.sum())).tolist()
    if num_stray:
        raise ValueError(
            f"labels: {num_stray} outside the vocabulary, such as {flat[stray][:3].tolist()}; "
            f"allowed are 0 to {vocab_size - 1} (rows of weight) and ignore_index={ignore_index}. "
            "Set labels that carry no loss to ignore_index."
        )
    if num_supervised == flat.numel():
        return None, flat
    # A stable sort puts the supervised positions first, in order; nonzero() would wait again.
    kept = supervised.to(torch.uint8).argsort(descending=True, stable=True)[:num_supervised]
    return kept, flat[kept]


def reduction_scale(
    reduction: str, num_items: int | Tensor | None, targets: Tensor, dtype: torch.dtype
) -> Tensor:
    """What the summed loss is multiplied by, as a 0-d tensor."""
    count = targets.numel() if reduction == "mean" else 1
    if num_items is not None:
        count = num_items
    if targets.numel() == 0:
        count = 1  # nothing to divide: zero, not 0 / 0
    if isinstance(count, Tensor) and count.device.type != "cpu":
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


def check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: received {type(tensor).__name__}; pass a torch.Tensor.")
        if hasattr(tensor, "device_mesh"):
            raise TypeError(
                f"{name}: received a DTensor; only plain tensors are allowed. Call inside the "
                "forward of the FSDP unit that owns it, or pass the gathered tensor "
                "(full_tensor with grad_placements, or the gradient of other ranks is lost)."
            )
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
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"devices: hidden on {hidden.device}, weight on {weight.device}, labels on "
            f"{labels.device}; they must be equal. Move the labels with labels.to(hidden.device)."
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
