"""linear_cross_entropy where the head's weight is a DTensor, as FSDP2's fully_shard leaves it.

Either the whole weight is gathered, or each rank keeps its slice of the vocabulary and scores the
rows of all ranks with it (`gemtune.losses.slices`). Both ways each rank gets the loss of its own
rows, and the weight the gradient that FSDP2 would make: that of each rank's loss, averaged over the
mesh.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gemtune.losses.checks import FLOAT_DTYPES, is_dtensor
from gemtune.losses.slices import Peers, all_gather
from gemtune.losses.supervision import to_device
from gemtune.losses.tiles import Settings

_ALLOWED = ((Shard(0),), (Replicate(), Shard(0)), (Replicate(),))
_EQUAL_ON_ALL_RANKS = (
    "softcap (0 for None)",
    "label_smoothing",
    "z_loss_weight",
    "chunk_bytes",
    f"dtype of the matmuls, as an index of {FLOAT_DTYPES}",
    "hidden.requires_grad",
    "weight.requires_grad",
)


def slices_pay_off(num_ranks: int, most_rows: int, vocab_size: int) -> bool:
    """Whether moving rows is cheaper than moving the weight.

    Gathering moves V vectors of H numbers, and their gradients back. Slices move `most_rows` such
    vectors of each rank (collectives pad to the fullest one), and their gradients back. They break
    even at num_ranks * most_rows = V; a rule, because the gradients of half-precision rows travel
    in float32. A single rank has nothing to move.
    """
    return num_ranks > 1 and num_ranks * most_rows < vocab_size


def localize(
    weight: Tensor,
    low_weight: Tensor | None,
    rows_NH: Tensor,
    scale: Tensor,
    settings: Settings,
    *,
    per_token: bool,
) -> tuple[Tensor, Tensor | None, Peers | None]:
    """Return plain weights and None, or this rank's slice of `weight`, None and its peers.

    With peers the loss is `SlicedLoss`. `slices_pay_off` chooses, after a small all-gather of what
    each rank brings, for which a GPU is waited once; a loss per token, and one with `low_weight`,
    gather without asking. All ranks of the mesh must make the same call.

    Raises:
        ValueError: a layout that FSDP2 does not make (before anything is sent), or options that
            must be equal on all ranks and are not (on all ranks).
    """
    for name, tensor in (("weight", weight), ("low_rank[1]", low_weight)):
        if is_dtensor(tensor):
            check_layout(name, tensor)
    may_slice = is_dtensor(weight) and Shard(0) in weight.placements
    if may_slice and low_weight is None and not per_token:
        peers, most_rows = agree(weight, rows_NH, scale, settings)
        if slices_pay_off(len(peers.counts), most_rows, peers.vocab_size):
            return weight.to_local(grad_placements=weight.placements), None, peers
    return gather(weight), gather(low_weight), None


def gather(weight: Tensor | None) -> Tensor | None:
    """Return the whole weight; its gradient is averaged over the mesh, in the weight's dtype."""
    if not is_dtensor(weight):
        return weight
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


def check_layout(name: str, weight: DTensor) -> None:
    """ValueError unless the layout is one that FSDP2 makes, and this rank takes part in it."""
    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if placements not in _ALLOWED:
        allowed = " or ".join(str(list(choice)) for choice in _ALLOWED)
        raise ValueError(
            f"{name}: received a DTensor placed {list(placements)}; allowed are {allowed}, as "
            "fully_shard places it. Call its redistribute with one of them."
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{name}: received a DTensor on {mesh}, to which rank {dist.get_rank()} does not "
            "belong; only the ranks of the mesh may call. Pass a weight that this rank holds."
        )
    shape, _ = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    found = list(weight.to_local().shape)
    if found != list(shape):
        raise ValueError(
            f"{name}: received a DTensor of shape {list(weight.shape)} with {found} on this rank; "
            f"allowed is {list(shape)}, the even cut by which its rows are told. Make it with "
            "distribute_tensor or fully_shard."
        )


def agree(weight: DTensor, rows_NH: Tensor, scale: Tensor, settings: Settings) -> tuple[Peers, int]:
    """Tell the ranks of each other. Also return the most rows of any rank of the mesh."""
    mesh, dim = weight.device_mesh, weight.placements.index(Shard(0))
    group, replicas = mesh.get_group(dim), mesh.get_group(0) if dim else None
    recording = torch.is_grad_enabled()
    needs = (recording and rows_NH.requires_grad, recording and weight.requires_grad)
    mine = [settings.softcap or 0.0, settings.label_smoothing, settings.z_loss_weight]
    mine += [settings.chunk_bytes, FLOAT_DTYPES.index(settings.matmul_dtype), *needs]
    mine += [settings.metrics, len(rows_NH)]
    numbers = to_device(torch.tensor(mine, dtype=torch.float64), rows_NH.device)
    numbers = torch.cat((numbers, scale.reshape(1).double()))
    num_ranks = dist.get_world_size(group)
    everyone = numbers.new_empty(num_ranks * len(numbers))
    all_gather(everyone, numbers, group=group)
    most = everyone[len(numbers) - 2 :: len(numbers)].max().reshape(1)
    if replicas is not None:  # their collectives are joint, so their choice must be
        dist.all_reduce(most, dist.ReduceOp.MAX, group=replicas)
    *flat, most_rows = torch.cat((everyone, most)).tolist()  # the one wait for a GPU
    *options, metrics, counts, scales = (flat[i :: len(numbers)] for i in range(len(numbers)))
    for name, values in zip(_EQUAL_ON_ALL_RANKS, options, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"{name}: received {values} on the ranks that hold the weight; it must be equal, "
                "because they score their rows together. Pass the same on each rank."
            )
    _, offsets = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    peers = Peers(
        group=group,
        replicas=replicas,
        rank=dist.get_rank(group),
        counts=tuple(int(count) for count in counts),
        scales=tuple(scales),
        needs=needs,
        metrics=any(metrics),
        offset=offsets[0],
        widest=-(-weight.shape[0] // num_ranks),
        vocab_size=weight.shape[0],
    )
    return peers, int(most_rows)
