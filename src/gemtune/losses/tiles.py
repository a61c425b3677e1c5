"""The arithmetic behind linear_cross_entropy: matmuls per row chunk, softmax per cache tile.

Two sizes matter. A chunk is the block of logits that one matmul writes; it is as large as the
byte budget allows, because narrow matmuls waste the hardware. A tile is a few rows of a chunk; it
is as small as the cache, because the softmax reads each logit about ten times.

Shape letters: N supervised rows, R rows of a chunk, T rows of a tile, V vocabulary, H hidden.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemtune.losses.budgets import ACCELERATOR_TILE_BYTES, MIB, tile_bytes
from gemtune.losses.fused import fused_softmax

WIDENED_WEIGHT_BYTES = 16 * MIB  # float32 copy of a slice of a half-precision weight


class Settings(NamedTuple):
    """What one call asks for; `matmul_dtype` is the dtype both operands are brought to."""

    softcap: float | None
    label_smoothing: float
    z_loss_weight: float
    chunk_bytes: int
    metrics: bool
    matmul_dtype: torch.dtype


class Product(NamedTuple):
    """One summand rows_NH @ weight_VH.T of the logits, and which of its gradients are needed.

    The head is the first. A LoRA on it is a second one, with its rank in the place of H.
    """

    rows_NH: Tensor
    weight_VH: Tensor
    needs_rows: bool = False
    needs_weight: bool = False


class Scores(NamedTuple):
    """Per-row losses [N], metric sums (empty unless asked for), and gradients.

    `gradients` has two entries for each product, of its rows and of its weight, None where it was
    not needed.
    """

    losses_N: Tensor
    sums: tuple[Tensor, ...]
    gradients: list[Tensor | None]


class Sliced(NamedTuple):
    """How `score` works on one rank's slice of the vocabulary, in step with the other ranks.

    `softmax` stands in for softmax_chunk. Chunks are planned for `widest` columns, the largest
    slice of all, so that every rank has as many. Losses and metrics are kept of the rows `own`.
    """

    softmax: Callable[..., None]
    widest: int
    own: slice


class RowSums(NamedTuple):
    """What the columns of a row add up to, [T, 1] each: enough for its loss and metrics.

    Logits are in units of the cap. None where the settings do not ask for it.
    """

    total: Tensor  # of the exponentials
    target: Tensor  # the logit of the target
    logits: Tensor | None  # for smoothing
    expected: Tensor | None  # of exponential times logit, for the entropy


class GradientWeights(NamedTuple):
    """What the gradient of a row's logits is made of, [T, 1] each."""

    row: Tensor  # times each exponential
    hit: Tensor  # less this at the target
    spread: Tensor  # less this everywhere: label smoothing


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Logits, losses and gradient sums are kept in float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def mixed_matmul_support(device_type: str, dtype: torch.dtype) -> tuple[bool, bool]:
    """Say whether mm and addmm can write float32 from half operands on this device.

    CUDA has the former since torch 2.8, the latter since 2.10 (pytorch#167931); CPU has neither.
    """
    if device_type != "cuda":
        return False, False
    half = torch.zeros(16, 16, device=device_type, dtype=dtype)
    out = torch.zeros(16, 16, device=device_type, dtype=torch.float32)
    supported = []
    for operation in (torch.mm, functools.partial(torch.addmm, out)):
        try:
            operation(half, half, out_dtype=torch.float32, out=out)
            supported.append(True)
        except (RuntimeError, TypeError):
            supported.append(False)
    return supported[0], supported[1]


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, keep: bool = False):
    """Set out = alpha * a @ b, added to what was there if `keep`, in the precision of `out`."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=int(keep), alpha=alpha)
        return
    _, has_addmm = mixed_matmul_support(out.device.type, a.dtype)
    if has_addmm:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(keep), alpha=alpha, out=out)
    elif not keep:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
        if alpha != 1.0:
            out.mul_(alpha)
    else:
        step = max(1, ACCELERATOR_TILE_BYTES // (out.shape[1] * out.element_size()))
        for part, a_part in zip(out.split(step), a.split(step), strict=True):
            part.add_(torch.mm(a_part, b, out_dtype=out.dtype), alpha=alpha)


def weight_slices(weight_VH: Tensor, dtype: torch.dtype):
    """Yield (columns of the logits, weight rows in `dtype`), converting one slice at a time."""
    vocab_size, hidden_size = weight_VH.shape
    if weight_VH.dtype == dtype:
        yield slice(0, vocab_size), weight_VH
        return
    step = max(1, WIDENED_WEIGHT_BYTES // (max(1, hidden_size) * dtype.itemsize))
    for start in range(0, vocab_size, step):
        columns = slice(start, min(start + step, vocab_size))
        yield columns, weight_VH[columns].to(dtype)


def rows_per_chunk(num_rows: int, vocab_size: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows whose logits fit the budget, evened out so that the last chunk is not a sliver."""
    most = max(1, chunk_bytes // (vocab_size * itemsize))
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // num_chunks))


def score(
    products: Sequence[Product],
    targets_N: Tensor,
    row_scale: Tensor,
    settings: Settings,
    sliced: Sliced | None = None,
) -> Scores:
    """Return losses, and the gradients of sum(row_scale * losses) that the products need.

    One matmul for each product, and one more for each needed gradient. Allocates one chunk of
    logits, one tile, and the gradients in the accumulator dtype.
    """
    head = products[0]
    num_rows, vocab_size = head.rows_NH.shape[0], head.weight_VH.shape[0]
    device_type = head.rows_NH.device.type
    wide = accumulator_dtype(settings.matmul_dtype)
    products = [p._replace(weight_VH=p.weight_VH.to(settings.matmul_dtype)) for p in products]
    has_mm, _ = mixed_matmul_support(device_type, settings.matmul_dtype)
    narrow = settings.matmul_dtype if has_mm or settings.matmul_dtype == wide else wide
    new = functools.partial(torch.empty, device=head.rows_NH.device, dtype=wide)
    fused = None if sliced else fused_softmax(device_type)
    softmax = sliced.softmax if sliced else fused or softmax_chunk
    # Fused, the gradient of the logits has a buffer of its own: kernels write out of order.
    itemsize = wide.itemsize + (narrow.itemsize if fused else 0)
    widest = sliced.widest if sliced else vocab_size
    chunk = rows_per_chunk(num_rows, widest, itemsize, settings.chunk_bytes)
    buffer_RV = new(chunk if num_rows else 0, vocab_size)
    if fused:
        grad_RV = torch.empty_like(buffer_RV, dtype=narrow)
    else:
        # The gradient of the logits goes back where the logits were; rounded to half precision it
        # takes the front half of each row.
        grad_RV = buffer_RV if narrow == wide else buffer_RV.view(narrow)[:, :vocab_size]
    records = new(4 if settings.metrics else 1, num_rows)
    gradients = [gradient for p in products for gradient in new_gradients(p, new)]
    needed = any(gradient is not None for gradient in gradients)
    row_scale_N = row_scale.expand(num_rows)

    for start in range(0, num_rows, chunk):
        at = slice(start, min(start + chunk, num_rows))
        logits_RV, grad_logits_RV = buffer_RV[: at.stop - start], grad_RV[: at.stop - start]
        parts = [p.rows_NH[at].to(settings.matmul_dtype).to(narrow) for p in products]
        fill_logits(logits_RV, parts, products, settings, narrow)
        scale_R = row_scale_N[at] if needed else None
        softmax(logits_RV, grad_logits_RV, targets_N[at], scale_R, records[:, at], settings)
        for i, (rows_RH, p) in enumerate(zip(parts, products, strict=True)):
            grad_rows_NH, grad_weight_VH = gradients[2 * i : 2 * i + 2]
            if grad_rows_NH is not None:
                for columns, weight in weight_slices(p.weight_VH, narrow):
                    keep = columns.start > 0
                    multiply_into(grad_rows_NH[at], grad_logits_RV[:, columns], weight, keep=keep)
            if grad_weight_VH is not None:
                multiply_into(grad_weight_VH, grad_logits_RV.t(), rows_RH, keep=start > 0)
    if sliced:
        records = records[:, sliced.own]
    return Scores(records[0], metric_sums(records), gradients)


def new_gradients(product: Product, new: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of the product's rows and weight; zeros where nothing writes it."""
    num_rows, vocab_size = len(product.rows_NH), len(product.weight_VH)
    grad_rows = new(product.rows_NH.shape) if product.needs_rows else None
    grad_weight = new(product.weight_VH.shape) if product.needs_weight else None
    if grad_weight is not None and not num_rows:
        grad_weight.zero_()
    if grad_rows is not None and not vocab_size:
        grad_rows.zero_()
    return grad_rows, grad_weight


def fill_logits(
    logits_RV: Tensor,
    parts: Sequence[Tensor],
    products: Sequence[Product],
    settings: Settings,
    narrow: torch.dtype,
) -> None:
    """Set the chunk to the sum of the products, divided by the cap."""
    alpha = 1.0 / (settings.softcap or 1.0)
    for i, (rows_RH, product) in enumerate(zip(parts, products, strict=True)):
        for columns, weight in weight_slices(product.weight_VH, narrow):
            multiply_into(logits_RV[:, columns], rows_RH, weight.t(), alpha=alpha, keep=i > 0)


def metric_sums(records: Tensor) -> tuple[Tensor, ...]:
    """Sum the rows (loss, correct, entropy, log-sum-exp) over tokens; nothing if not recorded."""
    if records.shape[0] == 1:
        return ()
    num_tokens = torch.full((), records.shape[1], device=records.device, dtype=torch.int64)
    return num_tokens, records[1].sum(dtype=torch.int64), records[2].sum(), records[3].sum()


def softmax_chunk(logits_RV, grad_RV, targets_R, scale_R, records, settings: Settings) -> None:
    """Run softmax_tile over a chunk, a few rows at a time, all with the same scratch memory."""
    vocab_size = logits_RV.shape[1]
    tiles = tile_slices(logits_RV)
    scratch_TV = torch.empty_like(logits_RV[tiles[0]])
    for at in tiles:
        logits_TV, exps_TV = logits_RV[at], scratch_TV[: at.stop - at.start]
        targets_T1 = targets_R[at].unsqueeze(1)
        lse_T1, total_T1 = softmax_tile(logits_TV, exps_TV, targets_T1, records[:, at], settings)
        if scale_R is not None:
            weights = gradient_weights(
                scale_R[at].unsqueeze(1), lse_T1, total_T1, vocab_size, settings
            )
            gradient_tile(logits_TV, exps_TV, grad_RV[at], targets_T1, weights, settings)


def tile_slices(logits_RV: Tensor) -> list[slice]:
    """Cut the rows of a chunk into tiles, the first one the largest."""
    num_rows, vocab_size = logits_RV.shape
    step = max(1, tile_bytes(logits_RV.device) // (max(1, vocab_size) * logits_RV.element_size()))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def softmax_tile(
    logits_TV: Tensor, exps_TV: Tensor, targets_T1: Tensor, records: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Record the tile's losses and metrics; return log-sum-exp and the sum of the exponentials.

    `logits_TV` arrives divided by the cap and leaves as tanh of that; `exps_TV` is filled with the
    exponentials of the logits, shifted by their maximum where they are not bounded.
    """
    vocab_size = logits_TV.shape[1]
    cap_tile(logits_TV, settings)
    bounded = is_bounded(vocab_size, settings)
    shift_T1 = None if bounded else logits_TV.amax(1, keepdim=True)
    exponentiate_tile(logits_TV, exps_TV, shift_T1, settings)
    sums = sum_columns(logits_TV, exps_TV, targets_T1, settings)
    lse_T1 = record_rows(sums, shift_T1, vocab_size, records, settings)
    if settings.metrics:
        records[1] = logits_TV.argmax(1).eq(targets_T1.squeeze(1))
    return lse_T1, sums.total


def is_bounded(vocab_size: int, settings: Settings) -> bool:
    """Whether exponentials can be added without a shift by the largest logit.

    V * exp(cap) must stay below the float32 maximum, exp(88.7). For the 262,144 words of Gemma this
    skips the pass over the tile for caps up to 75.
    """
    return settings.softcap is not None and settings.softcap + math.log(vocab_size) < 88.0


def cap_tile(logits_TV: Tensor, settings: Settings) -> None:
    """From logits divided by the cap to capped logits in units of the cap."""
    if settings.softcap is not None:
        logits_TV.tanh_()


def exponentiate_tile(
    logits_TV: Tensor, exps_TV: Tensor, shift_T1: Tensor | None, settings: Settings
) -> None:
    """Fill `exps_TV` with the exponentials of the logits less `shift_T1` (in units of the cap)."""
    cap = settings.softcap or 1.0
    if shift_T1 is None:
        torch.mul(logits_TV, cap, out=exps_TV)
    else:
        torch.sub(logits_TV, shift_T1, out=exps_TV)
        if cap != 1.0:
            exps_TV.mul_(cap)
    exps_TV.exp_()


def sum_columns(
    logits_TV: Tensor, exps_TV: Tensor, targets_T1: Tensor, settings: Settings
) -> RowSums:
    """Add up the columns of a tile."""
    smoothing, metrics = settings.label_smoothing, settings.metrics
    return RowSums(
        exps_TV.sum(1, keepdim=True),
        logits_TV.gather(1, targets_T1),
        logits_TV.sum(1, keepdim=True) if smoothing else None,
        (exps_TV * logits_TV).sum(1, keepdim=True) if metrics else None,
    )


def record_rows(
    sums: RowSums, shift_T1: Tensor | None, vocab_size: int, records: Tensor, settings: Settings
) -> Tensor:
    """Record losses and metrics except for `correct`; return log-sum-exp."""
    cap = settings.softcap or 1.0
    lse_T1 = sums.total.log()
    if shift_T1 is not None:
        lse_T1 += shift_T1 * cap
    target_T1 = sums.target * cap
    loss_T1 = lse_T1 - target_T1
    if settings.label_smoothing:
        mean_T1 = sums.logits / vocab_size * cap
        loss_T1 += settings.label_smoothing * (target_T1 - mean_T1)
    if settings.z_loss_weight:
        loss_T1 += settings.z_loss_weight * lse_T1.square()
    records[0] = loss_T1.squeeze(1)
    if settings.metrics:
        expected_T1 = sums.expected * cap / sums.total
        records[2] = (lse_T1 - expected_T1).squeeze(1)
        records[3] = lse_T1.squeeze(1)
    return lse_T1


def gradient_weights(
    scale_T1: Tensor, lse_T1: Tensor, total_T1: Tensor, vocab_size: int, settings: Settings
) -> GradientWeights:
    """What the gradient of scale * loss is made of."""
    return GradientWeights(
        scale_T1 * (1 + 2 * settings.z_loss_weight * lse_T1) / total_T1,
        scale_T1 * (1 - settings.label_smoothing),
        scale_T1 * (settings.label_smoothing / vocab_size),
    )


def gradient_tile(
    logits_TV: Tensor,
    exps_TV: Tensor,
    grad_TV: Tensor,
    targets_T1: Tensor,
    weights: GradientWeights,
    settings: Settings,
) -> None:
    """Write the gradient of the logits before the cap over them: 1 - tanh^2 for each column."""
    row_T1, hit_T1, spread_T1 = weights
    in_place = grad_TV.dtype == logits_TV.dtype
    wide_TV = logits_TV if in_place else exps_TV
    if settings.softcap is None:
        torch.mul(exps_TV, row_T1, out=wide_TV)
        if settings.label_smoothing:
            wide_TV.sub_(spread_T1)
    else:
        hit_T1 = hit_T1 * (1 - logits_TV.gather(1, targets_T1).square())
        exps_TV.mul_(row_T1)
        if settings.label_smoothing:
            exps_TV.sub_(spread_T1)
        # exps * (1 - logits^2) in one pass.
        torch.ops.aten.tanh_backward.grad_input(exps_TV, logits_TV, grad_input=wide_TV)
    wide_TV.scatter_(1, targets_T1, wide_TV.gather(1, targets_T1) - hit_T1)
    if not in_place:
        grad_TV.copy_(wide_TV)
