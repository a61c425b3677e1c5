"""A head whose vocabulary is cut into slices, one on each rank: the loss without gathering it.

Every rank scores the supervised rows of all ranks with its own slice. The ranks then add up what
their columns come to, and each has the softmax over the whole vocabulary.

Shape letters: N supervised rows of this rank, A those of all ranks, P the most of any; R rows of a
chunk, T of a tile; V rows of this rank's slice, H hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gemtune.losses.functions import take_gradients
from gemtune.losses.supervision import to_device
from gemtune.losses.tiles import (
    GradientWeights,
    Product,
    RowSums,
    Scores,
    Settings,
    Sliced,
    accumulator_dtype,
    cap_tile,
    exponentiate_tile,
    gradient_tile,
    gradient_weights,
    is_bounded,
    record_rows,
    score,
    sum_columns,
    tile_slices,
)

# torch 2.13 has new names for both, and warns of the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Peers(NamedTuple):
    """The ranks that hold the slices of one weight, and what they told each other."""

    group: dist.ProcessGroup
    replicas: dist.ProcessGroup | None  # those that hold the same slice as this rank (HSDP)
    rank: int  # in `group`
    counts: tuple[int, ...]  # supervised rows of each rank
    scales: tuple[float, ...]  # what the summed loss of each rank is multiplied by
    needs: tuple[bool, bool]  # gradient of hidden, of weight
    metrics: bool  # whether some rank asks for them
    offset: int  # of this rank's slice
    widest: int  # rows of the largest slice
    vocab_size: int  # of all slices

    @property
    def own(self) -> slice:
        """Where this rank's rows are among those of all ranks."""
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])


class SlicedLoss(torch.autograd.Function):
    """scale * sum of the losses of this rank's rows; its gradients are made in forward.

    The rows of all ranks share one matmul with the slice, so its gradient, made for an upstream
    factor of 1, can be scaled in backward where all ranks with rows have the same factor: losses
    added up, divided by num_items, or by how often gradients accumulate. Where the factors differ
    (a mean that each rank multiplies by its own token count), the logits and the gradient of the
    slice are made again, 2 matmuls more, rather than kept apart for each rank, which would take the
    memory of the whole weight. The gradient of hidden always has the factor of its own rank.
    """

    @staticmethod
    def forward(ctx, rows_NH, weight_VH, targets_N, scale, settings, peers):
        tensors = (rows_NH, weight_VH, targets_N)
        joint = settings._replace(metrics=peers.metrics)
        scores, ctx.late = score_slice(tensors, peers.scales, peers.needs, joint, peers)
        grad_rows_AH, grad_weight_VH = scores.gradients
        grad_rows_NH = None if grad_rows_AH is None else give_back(grad_rows_AH, peers)
        ctx.gradients = [grad_rows_NH, grad_weight_VH]
        ctx.dtypes = (rows_NH.dtype, weight_VH.dtype)
        ctx.settings, ctx.peers = settings._replace(metrics=False), peers
        if grad_weight_VH is not None:
            ctx.save_for_backward(*tensors)
        sums = scores.sums if settings.metrics else ()
        ctx.mark_non_differentiable(*sums)
        return scores.losses_N.sum() * scale, *sums

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (grad_rows, grad_weight), peers = take_gradients(ctx), ctx.peers
        if grad_rows is not None:
            grad_rows = grad_rows.mul_(grad_loss * ctx.late).to(ctx.dtypes[0])
        if grad_weight is not None:
            factors = factors_of_all(grad_loss, peers)
            of_rows = {f for f, count in zip(factors, peers.counts, strict=True) if count}
            if len(of_rows) <= 1:
                factor = ctx.late * of_rows.pop() if of_rows else 1.0
            else:
                weights = [f * s for f, s in zip(factors, peers.scales, strict=True)]
                needs = (False, True)
                scores, factor = score_slice(ctx.saved_tensors, weights, needs, ctx.settings, peers)
                grad_weight = scores.gradients[1]
            grad_weight = average(grad_weight, factor, peers).to(ctx.dtypes[1])
        return grad_rows, grad_weight, None, None, None, None


def score_slice(
    tensors: tuple[Tensor, Tensor, Tensor],
    weights: Sequence[float],
    needs: tuple[bool, bool],
    settings: Settings,
    peers: Peers,
) -> tuple[Scores, float]:
    """Score the rows of all ranks, those of a rank weighted by its number in `weights`.

    `tensors` are this rank's rows [N, H], slice [V, H] and targets [N]. Also return a factor that
    the gradients still need: 1 but for float16, whose smallest number is above 1 / num_items.
    """
    rows_NH, weight_VH, targets_N = tensors
    device, late = rows_NH.device, 1.0
    if settings.matmul_dtype == torch.float16:
        of_rows = [abs(w) for w, count in zip(weights, peers.counts, strict=True) if count]
        late = max(of_rows, default=1.0) or 1.0
    weights_A = (torch.tensor(weights, dtype=torch.float64) / late).repeat_interleave(
        torch.tensor(peers.counts)
    )
    with torch.autocast(device.type, enabled=False):
        rows_AH = collect(rows_NH.to(settings.matmul_dtype), peers)
        scores = score(
            [Product(rows_AH, weight_VH, *needs)],
            collect(targets_N, peers),
            to_device(weights_A.to(accumulator_dtype(settings.matmul_dtype)), device),
            settings,
            Sliced(functools.partial(softmax_of_slice, peers=peers), peers.widest, peers.own),
        )
    return scores, late


def factors_of_all(grad_loss: Tensor, peers: Peers) -> list[float]:
    """The upstream gradient of each rank; a GPU is waited for."""
    factors = grad_loss.new_empty(len(peers.counts))
    all_gather(factors, grad_loss.reshape(1), group=peers.group)
    return factors.tolist()


def average(grad_VH: Tensor, factor: float, peers: Peers) -> Tensor:
    """The sum over all ranks' rows, times `factor`, as a mean over the ranks of the mesh."""
    if peers.replicas is None:
        return grad_VH.mul_(factor / len(peers.counts))
    grad_VH.mul_(factor / len(peers.counts) / dist.get_world_size(peers.replicas))
    dist.all_reduce(grad_VH, group=peers.replicas)
    return grad_VH


def collect(tensor_N: Tensor, peers: Peers) -> Tensor:
    """[A, ...]: the rows of all ranks, in the order of the ranks."""
    most_rows = max(peers.counts)
    if not most_rows:
        return tensor_N
    padded_P = tensor_N.contiguous()
    if len(tensor_N) < most_rows:
        padded_P = tensor_N.new_zeros(most_rows, *tensor_N.shape[1:])
        padded_P[: len(tensor_N)] = tensor_N
    found = tensor_N.new_empty(len(peers.counts) * most_rows, *tensor_N.shape[1:])
    all_gather(found, padded_P, group=peers.group)
    if min(peers.counts) == most_rows:
        return found
    parts = zip(found.split(most_rows), peers.counts, strict=True)
    return torch.cat([part[:count] for part, count in parts])


def give_back(grad_AH: Tensor, peers: Peers) -> Tensor:
    """[N, H]: the sum over the slices of the gradient of this rank's rows."""
    most_rows = max(peers.counts)
    if not most_rows:
        return grad_AH
    padded = grad_AH
    if min(peers.counts) < most_rows:
        padded = grad_AH.new_zeros(len(peers.counts) * most_rows, grad_AH.shape[1])
        parts = zip(padded.split(most_rows), grad_AH.split(peers.counts), strict=True)
        for part, rows in parts:
            part[: len(rows)] = rows
    found_PH = grad_AH.new_empty(most_rows, grad_AH.shape[1])
    reduce_scatter(found_PH, padded, group=peers.group)
    return found_PH[: peers.counts[peers.rank]]


def softmax_of_slice(
    logits_RV: Tensor,
    grad_RV: Tensor,
    targets_R: Tensor,
    scale_R: Tensor | None,
    records: Tensor,
    settings: Settings,
    *,
    peers: Peers,
) -> None:
    """Stand in for `tiles.softmax_chunk`, with a slice of the vocabulary as columns.

    One all-reduce of the sums over the columns: two numbers a row, one more with smoothing, two
    more with metrics. Before it one of the largest logit, with metrics or where logits are not
    bounded. The exponentials are made again for the gradient: to keep them takes a second chunk.
    """
    width = logits_RV.shape[1]
    tiles = tile_slices(logits_RV) if width else []  # a rank may hold no vocabulary at all
    scratch_TV = torch.empty_like(logits_RV[tiles[0]]) if tiles else logits_RV
    columns_R1 = (targets_R - peers.offset).unsqueeze(1)
    owned_R1 = (columns_R1 >= 0) & (columns_R1 < width)
    columns_R1 = columns_R1.clamp(0, max(0, width - 1))
    for at in tiles:
        cap_tile(logits_RV[at], settings)
    largest_R1 = shift_R1 = None
    bounded = is_bounded(peers.vocab_size, settings)
    if settings.metrics or not bounded:
        largest_R1, beaten_R = largest_of_all(logits_RV, targets_R, tiles, peers)
        shift_R1 = None if bounded else largest_R1

    def exponentials(at: slice) -> Tensor:
        exps_TV = scratch_TV[: at.stop - at.start]
        shift_T1 = None if bounded else shift_R1[at]
        exponentiate_tile(logits_RV[at], exps_TV, shift_T1, settings)
        return exps_TV

    smoothing, metrics = bool(settings.label_smoothing), settings.metrics
    added = logits_RV.new_zeros(2 + smoothing + 2 * metrics, len(targets_R))
    for at in tiles:
        sums = sum_columns(logits_RV[at], exponentials(at), columns_R1[at], settings)
        sums = sums._replace(target=sums.target.where(owned_R1[at], 0.0))
        asked = [sum_T1 for sum_T1 in sums if sum_T1 is not None]
        added[: len(asked), at] = torch.cat(asked, 1).t()
    if metrics:
        added[-1] = beaten_R
    dist.all_reduce(added, group=peers.group)
    total_R1, target_R1, *others = added.unsqueeze(2)
    logit_sum_R1 = others[0] if smoothing else None
    expected_R1 = others[-2] if metrics else None
    sums = RowSums(total_R1, target_R1, logit_sum_R1, expected_R1)
    lse_R1 = record_rows(sums, shift_R1, peers.vocab_size, records, settings)
    if metrics:
        records[1] = ((target_R1 == largest_R1) & (others[-1] == 0)).squeeze(1)

    if scale_R is None:
        return
    scale_R1 = scale_R.unsqueeze(1)
    weights = gradient_weights(scale_R1, lse_R1, total_R1, peers.vocab_size, settings)
    weights = weights._replace(hit=weights.hit.where(owned_R1, 0.0))
    for at in tiles:
        of_tile = GradientWeights(*(weight_R1[at] for weight_R1 in weights))
        gradient_tile(
            logits_RV[at], exponentials(at), grad_RV[at], columns_R1[at], of_tile, settings
        )


def largest_of_all(
    logits_RV: Tensor, targets_R: Tensor, tiles: list[slice], peers: Peers
) -> tuple[Tensor, Tensor]:
    """Return the largest logit of all slices, and whether this one has it left of the target.

    Of equal logits argmax takes the first, and so does this.
    """
    largest_R = logits_RV.new_full(targets_R.shape, -torch.inf)
    first_R = torch.zeros_like(targets_R)
    for at in tiles:
        largest_R[at], first_R[at] = logits_RV[at].max(1)
    of_all_R = largest_R.clone()
    dist.all_reduce(of_all_R, dist.ReduceOp.MAX, group=peers.group)
    beaten_R = (largest_R == of_all_R) & (first_R + peers.offset < targets_R)
    return of_all_R.unsqueeze(1), beaten_R
