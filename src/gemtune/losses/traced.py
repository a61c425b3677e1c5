"""linear_cross_entropy as operators of fixed shapes, for torch.compile, torch.export and make_fx.

Eager code looks at the labels to drop ignored rows, and what follows has as many rows as it found:
a graph cannot hold that. An operator can, because its results have the shapes of its inputs. It
does the same work, and costs the gradient of `hidden` for all rows in the accumulator dtype where
eager code keeps that of the supervised ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, library
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from gemtune.losses.checks import is_dtensor
from gemtune.losses.functions import NO_SECOND_DERIVATIVE, products_of
from gemtune.losses.supervision import keep_supervised
from gemtune.losses.tiles import Settings, accumulator_dtype, score

_METRIC_DTYPES = (torch.int64, torch.int64, None, None)


def is_tracing() -> bool:
    """Whether what runs now is recorded into a graph."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def loss(
    tensors: Sequence[Tensor | None],
    labels: Tensor,
    ignore_index: int,
    reduction: str,
    num_items: int | Tensor | None,
    settings: Settings,
) -> tuple[Tensor, ...]:
    """The loss (0-d, or shaped as labels), then the four metric sums where they are asked for.

    `tensors` are hidden [..., H], weight [V, H] and a LoRA on the head (None, None without).
    """
    if any(is_dtensor(tensor) for tensor in tensors):
        raise TypeError(
            "weight: received a DTensor under torch.compile; only plain tensors are allowed there. "
            "Leave the loss out with torch.compiler.disable, or call it in the forward of the FSDP "
            "unit that owns the weight."
        )
    hidden, weight, low_rows, low_weight = tensors
    rows = hidden.reshape(-1, hidden.shape[-1])
    low_rows = None if low_rows is None else low_rows.reshape(-1, low_rows.shape[-1])
    inputs = (rows, weight, low_rows, low_weight, labels.reshape(-1))
    if reduction == "none":
        losses, *sums = torch.ops.gemtune.linear_cross_entropy_per_token(
            *inputs, ignore_index, *settings
        )
        return losses.reshape(labels.shape), *sums[: 4 * settings.metrics]
    divisor = num_items
    if isinstance(num_items, int):
        divisor = torch.full((), float(num_items), device=hidden.device)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    found = torch.ops.gemtune.linear_cross_entropy(
        *inputs, divisor, reduction == "mean", needs, ignore_index, *settings
    )
    return found[: 1 + 4 * settings.metrics]


def _supervised(
    tensors: Sequence[Tensor | None], labels: Tensor, ignore_index: int
) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
    """(positions or None for all, targets, tensors with the rows at these positions)."""
    rows, weight, low_rows, low_weight = tensors
    kept, targets = keep_supervised(labels, ignore_index, weight.shape[0], rows.device)
    if kept is not None:
        rows = rows.index_select(0, kept)
        low_rows = None if low_rows is None else low_rows.index_select(0, kept)
    return kept, targets, [rows, weight, low_rows, low_weight]


def _spread(values: Tensor, kept: Tensor | None, num_rows: int) -> Tensor:
    """Values of the supervised rows among zeros for all rows."""
    if kept is None:
        return values
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, kept, values)


def _whole(
    gradients: Sequence[Tensor | None], kept: Tensor | None, like: Tensor, wide: torch.dtype
) -> tuple[Tensor, ...]:
    """Four gradients of fixed shapes; an empty tensor stands for one that is not needed."""
    found = []
    for i in range(4):
        gradient = gradients[i] if i < len(gradients) else None
        if gradient is None:
            found.append(torch.empty(0, device=like.device, dtype=wide))
        else:
            found.append(_spread(gradient, kept, len(like)) if i % 2 == 0 else gradient)
    return tuple(found)


def _metric_sums(sums: Sequence[Tensor], device: torch.device, wide: torch.dtype) -> list[Tensor]:
    if sums:
        return list(sums)
    return [torch.empty((), device=device, dtype=dtype or wide) for dtype in _METRIC_DTYPES]


@library.custom_op("gemtune::linear_cross_entropy", mutates_args=())
def _reduced(
    rows: Tensor,
    weight: Tensor,
    low_rows: Tensor | None,
    low_weight: Tensor | None,
    labels: Tensor,
    divisor: Tensor | None,
    mean: bool,
    needs: Sequence[bool],
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss_weight: float,
    chunk_bytes: int,
    metrics: bool,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, four metric sums, four gradients of the loss."""
    settings = Settings(softcap, label_smoothing, z_loss_weight, chunk_bytes, metrics, matmul_dtype)
    wide = accumulator_dtype(matmul_dtype)
    tensors = (rows, weight, low_rows, low_weight)
    kept, targets, supervised = _supervised(tensors, labels, ignore_index)
    scale = torch.ones((), device=rows.device, dtype=wide)
    if len(targets):
        if divisor is not None:
            scale = divisor.to(device=rows.device, dtype=wide).reciprocal()
        elif mean:
            scale /= len(targets)
    # float16: a weight of 1 / num_items would push gradients of logits below its smallest number.
    late = matmul_dtype == torch.float16
    with torch.autocast(rows.device.type, enabled=False):
        products = products_of(supervised, needs)
        scores = score(products, targets, torch.ones_like(scale) if late else scale, settings)
    gradients = [g if g is None or not late else g.mul_(scale) for g in scores.gradients]
    return (
        scores.losses_N.sum() * scale,
        *_metric_sums(scores.sums, rows.device, wide),
        *_whole(gradients, kept, rows, wide),
    )


@_reduced.register_fake
def _(rows, weight, low_rows, low_weight, labels, divisor, mean, needs, ignore_index, *settings):
    settings = Settings(*settings)
    wide = accumulator_dtype(settings.matmul_dtype)
    tensors = (rows, weight, low_rows, low_weight)
    gradients = [
        tensor.new_empty(tensor.shape if needed else (0,), dtype=wide)
        if tensor is not None
        else rows.new_empty(0, dtype=wide)
        for tensor, needed in zip(tensors, needs, strict=True)
    ]
    sums = _metric_sums((), rows.device, wide)
    return (rows.new_empty((), dtype=wide), *sums, *gradients)


def _keep_gradients(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[5:])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:4]]
    ctx.needed = inputs[7]
    ctx.mark_non_differentiable(*output[1:])


def _give_gradients(ctx, grad_loss, *_):
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    finished = [
        (gradient * grad_loss).to(dtype) if needed else None
        for gradient, needed, dtype in zip(ctx.saved_tensors, ctx.needed, ctx.dtypes, strict=True)
    ]
    return *finished, *[None] * 11


_reduced.register_autograd(_give_gradients, setup_context=_keep_gradients)


@library.custom_op("gemtune::linear_cross_entropy_per_token", mutates_args=())
def _per_token(
    rows: Tensor,
    weight: Tensor,
    low_rows: Tensor | None,
    low_weight: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss_weight: float,
    chunk_bytes: int,
    metrics: bool,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One loss for each label, 0 where ignored, and four metric sums."""
    settings = Settings(softcap, label_smoothing, z_loss_weight, chunk_bytes, metrics, matmul_dtype)
    tensors = (rows, weight, low_rows, low_weight)
    kept, targets, supervised = _supervised(tensors, labels, ignore_index)
    with torch.autocast(rows.device.type, enabled=False):
        products = products_of(supervised, (False,) * 4)
        scores = score(products, targets, torch.ones((), device=rows.device), settings)
    sums = _metric_sums(scores.sums, rows.device, accumulator_dtype(matmul_dtype))
    return (_spread(scores.losses_N, kept, len(rows)).clone(), *sums)


@_per_token.register_fake
def _(rows, weight, low_rows, low_weight, labels, ignore_index, *settings):
    settings = Settings(*settings)
    wide = accumulator_dtype(settings.matmul_dtype)
    return (
        rows.new_empty(rows.shape[:1], dtype=wide),
        *_metric_sums((), rows.device, wide),
    )


@library.custom_op("gemtune::linear_cross_entropy_per_token_backward", mutates_args=())
def _per_token_backward(
    grad_losses: Tensor,
    rows: Tensor,
    weight: Tensor,
    low_rows: Tensor | None,
    low_weight: Tensor | None,
    labels: Tensor,
    needs: Sequence[bool],
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss_weight: float,
    chunk_bytes: int,
    metrics: bool,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four gradients, from the upstream gradient of each loss."""
    settings = Settings(softcap, label_smoothing, z_loss_weight, chunk_bytes, False, matmul_dtype)
    tensors = (rows, weight, low_rows, low_weight)
    kept, targets, supervised = _supervised(tensors, labels, ignore_index)
    weights = grad_losses if kept is None else grad_losses.index_select(0, kept)
    with torch.autocast(rows.device.type, enabled=False):
        scores = score(products_of(supervised, needs), targets, weights, settings)
    return _whole(scores.gradients, kept, rows, accumulator_dtype(matmul_dtype))


@_per_token_backward.register_fake
def _(grad_losses, rows, weight, low_rows, low_weight, labels, needs, ignore_index, *settings):
    settings = Settings(*settings)
    wide = accumulator_dtype(settings.matmul_dtype)
    return tuple(
        rows.new_empty(tensor.shape if needed and tensor is not None else (0,), dtype=wide)
        for tensor, needed in zip((rows, weight, low_rows, low_weight), needs, strict=True)
    )


def _keep_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])


def _recompute(ctx, grad_losses, *_):
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    *tensors, labels = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    ignore_index, *settings = ctx.options
    gradients = torch.ops.gemtune.linear_cross_entropy_per_token_backward(
        grad_losses, *tensors, labels, needs, ignore_index, *settings
    )
    finished = [
        gradient.to(tensor.dtype) if needed else None
        for gradient, tensor, needed in zip(gradients, tensors, needs, strict=True)
    ]
    return *finished, *[None] * 8


_per_token.register_autograd(_recompute, setup_context=_keep_inputs)
