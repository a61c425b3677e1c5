"""FSDP2: torch's `fully_shard` called directly, the same way on GPUs and on CPUs (gloo).

accelerate would route processes on the CPU to DDP, and wrap by class names (transformers#45663).
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from gemtune.models.stored import StoredTensor
from gemtune.parallel.reading import read_shares
from gemtune.parallel.units import Units, find_units
from gemtune.parallel.weights import (
    Blueprint,
    agree_on_blueprint,
    give_buffers_memory,
    give_memory,
    send_from_first,
)

_NOT_STORED: Mapping[nn.Parameter, StoredTensor] = MappingProxyType({})


def shard_model(
    model: nn.Module,
    base: nn.Module,
    device: torch.device,
    *,
    on_host: Sequence[str],
    mixed_precision: str,
    stored: Mapping[nn.Parameter, StoredTensor] = _NOT_STORED,
) -> None:
    """Shard `base`, which holds all parameters of `model`: itself, or what an adapter is around.

    `on_host` are the names, in `model`, of frozen parameters that stay in host memory. Else as
    `shard`, over the units of `find_units`.
    """
    # Names as the base has them; an adapter puts its own in front.
    names = {id(parameter): name for name, parameter in base.named_parameters()}
    host_names = [names[id(model.get_parameter(name))] for name in on_host]
    units = find_units(base, host_names)
    shard(base, units, device, mixed_precision=mixed_precision, stored=stored)


def shard(
    root: nn.Module,
    units: Units,
    device: torch.device,
    *,
    mixed_precision: str,
    stored: Mapping[nn.Parameter, StoredTensor] = _NOT_STORED,
) -> None:
    """Shard `root` in place over all processes, with the values that rank 0 has, or files.

    A process holds its share of every unit, and buffers and replicated parameters in full. Ranks
    that have the model on meta never hold more of it than that and one unit. Parameters become
    DTensors; what is tied stays tied. Between forward passes `named_parameters` gives shares:
    gathered ones are seen in a forward and its backward only.

    Parameters that are `stored` in files are not sent: those on meta, on every rank alike, are read
    by each rank in the end, and no rank holds more than a share of one of these beside its own.

    Gradients are reduced after every backward, so that no rank keeps one in full. All ranks must
    call it, before an optimizer is made.

    Raises:
        ModelError: on all ranks, where one of them cannot read its part.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blueprint = agree_on_blueprint(root)
    give_buffers_memory(root, blueprint, device)
    buffers = sorted(root.named_buffers(remove_duplicate=False), key=lambda named: named[0])
    send_from_first((buffer for _, buffer in buffers), device)
    files = {name: stored[p] for name, p in root.named_parameters() if p in stored}
    unread = {name: file for name, file in files.items() if root.get_parameter(name).is_meta}
    for name in sorted(units.replicated):
        # What is on the host stays there.
        where = torch.device("cpu") if name in units.on_host else device
        _fill(root, [name], blueprint, where, device, sent=name not in files)
    ignored = {root.get_parameter(name) for name in units.replicated}
    policy = _policy(root, blueprint, mixed_precision)
    waiting = [name for name, _ in root.named_parameters() if name not in units.replicated]
    for path in (*units.modules, ""):
        prefix = f"{path}." if path else ""
        own = [name for name in waiting if name.startswith(prefix)]
        waiting = [name for name in waiting if not name.startswith(prefix)]
        _fill(root, [name for name in own if name not in unread], blueprint, device, device)
        unit = root.get_submodule(path)
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        if isinstance(unit, nn.Embedding) and isinstance(unit, FSDPModule):
            unit.set_unshard_in_backward(False)  # its gradient does not depend on its weight
        if path:
            unit.register_forward_pre_hook(_share_dicts, prepend=True, with_kwargs=True)
    if unread:
        read_shares(root, unread, device)
    root.register_forward_hook(_free_without_backward)


def _fill(
    root: nn.Module,
    names: Iterable[str],
    blueprint: Blueprint,
    where: torch.device,
    device: torch.device,
    *,
    sent: bool = True,
) -> None:
    # Keeps no reference: what is sharded next must have no other owner than its module.
    for name in names:
        parameter = root.get_parameter(name)
        give_memory(parameter, blueprint.parameters[name][1], where)
        if sent:
            send_from_first([parameter.data], device)


def _policy(root: nn.Module, blueprint: Blueprint, mixed_precision: str) -> MixedPrecisionPolicy:
    """Under bf16 weights are gathered in it, and the residual stream is in it. Sums over ranks are
    in float32 or wider: those of bfloat16 gradients would lose what a rank adds."""
    trained = [name for name, p in root.named_parameters() if p.requires_grad]
    narrow = any(blueprint.parameters[name][1].itemsize < 4 for name in trained)
    is_mixed = mixed_precision == "bf16"
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if is_mixed else None,
        reduce_dtype=torch.float32 if is_mixed or narrow else None,
    )


def _share_dicts(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A layer writes the keys and values that others share into a dict of the whole forward.

    FSDP2's hooks look for tensors in dicts and hand the layer a copy, whose entries nobody else
    would see. From transformers 5.9 on the dict is of a kind that they do not open.
    """
    states = kwargs.get("shared_kv_states")
    if not isinstance(states, dict):
        return None
    view: UserDict[Any, Any] = UserDict()
    view.data = states
    return args, kwargs | {"shared_kv_states": view}


def _free_without_backward(root: FSDPModule, *_: Any) -> None:
    """A root keeps its weights for the backward pass; there is none after an evaluation."""
    if not torch.is_grad_enabled():
        root.reshard()
