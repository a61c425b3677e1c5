"""An optimizer whose state lies in host memory, and visits the device group by group in a step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gemtune.errors import ConfigError
from gemtune.memory.readings import GIB, machine_memory
from gemtune.optim.state_group import StateGroup, largest_share, shard_of, state_groups
from gemtune.optim.transport import CudaTransport, Transport

HOST = torch.device("cpu")
_PADDING_BYTES = 5 * 256
"""What packing adds to the state of a parameter at most: of five slots."""


class OffloadedOptimizer(torch.optim.Optimizer):
    """Any optimizer that treats every parameter for itself, step for step with the same numbers.

    Between steps all of its state rests in host memory. A step takes the parameters in groups:
    their state is brought to the device, the optimizer makes its own step over these parameters,
    and the state is taken back, while that of the next group comes. `param_groups` and `state` are
    the optimizer's own. After `step` has returned, or raised, `state` is in host memory.

    A group is of at most `group_bytes` of state, or one parameter. Memory on the device: two
    groups, in a step; the first step, which makes the state, has one.

    Args:
        state_bytes: of a parameter, given as what the first rank holds of it.
        transport: None where the parameters lie in host memory themselves: nothing moves.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        group_bytes: int,
        state_bytes: Callable[[Tensor], int],
        transport: Transport | None = None,
    ) -> None:
        self._inner, self.transport = inner, transport
        self._groups: list[StateGroup] | None = None
        super().__init__(inner.param_groups, {})
        self._share()
        sizes = state_sizes(inner, state_bytes)
        self._groups = list(state_groups(self.param_groups, sizes, group_bytes))

    @property
    def num_groups(self) -> int:
        """How many a step takes where every parameter has a gradient."""
        return len(self._groups or ())

    @property
    def resting_bytes(self) -> int:
        """Of the memory in which all of the state lies, between steps."""
        slots = chain.from_iterable(each.values() for each in self.state.values())
        storages = (shard_of(v).untyped_storage() for v in slots if isinstance(v, Tensor))
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def _share(self) -> None:
        self.param_groups, self.state = self._inner.param_groups, self._inner.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One step of the parameters that have a gradient; the loss of the closure, called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fed = [g for g in self._groups or () if any(p.grad is not None for p in g.parameters)]
        whole = [group["params"] for group in self.param_groups]
        try:
            if self.transport is None:
                for each in fed:
                    self._step_over(each)
            else:
                self._step_moving(fed, self.transport)
        finally:
            for group, parameters in zip(self.param_groups, whole, strict=True):
                group["params"] = parameters
        return loss

    def _step_over(self, chosen: StateGroup) -> None:
        for group, parameters in zip(self.param_groups, chosen.by_param_group, strict=True):
            group["params"] = parameters
        self._inner.step()

    def _step_moving(self, fed: Sequence[StateGroup], transport: Transport) -> None:
        for each in fed:  # what a checkpoint has put there since
            each.settle(self.state, transport.rest)
        transport.open([each.num_bytes for each in fed])
        try:
            for turn, each in enumerate(fed):
                # The next one too, before the step is in the queue of the device.
                for ahead in range(turn + bool(turn), min(turn + 2, len(fed))):
                    fed[ahead].bring(self.state, ahead, transport)
                transport.arrive(turn)
                try:
                    self._step_over(each)
                finally:
                    each.take_back(self.state, turn, transport)
        finally:
            for each in fed:
                each.leave(self.state)
            transport.close()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but copies of the state stay in host memory, in the dtype that they have."""
        self._inner.load_state_dict({**state_dict, "state": {}})
        self._share()
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(ids, parameters, strict=True):
            if key in state_dict["state"]:
                self.state[parameter] = {
                    slot: self._at_rest(value, parameter)
                    for slot, value in state_dict["state"][key].items()
                }

    def _at_rest(self, value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        return torch.empty_like(value, device=state_device(self, parameter)).copy_(value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is built: what is stepped together is decided then."""
        if self._groups is not None:
            raise RuntimeError(
                "An optimizer whose state is offloaded takes no further parameters: build another."
            )
        super().add_param_group(param_group)


def offloaded(
    inner: torch.optim.Optimizer, *, group_bytes: int, state_bytes: Callable[[Tensor], int]
) -> OffloadedOptimizer:
    """For parameters on a GPU or on the CPU.

    Raises:
        ConfigError: another device, or more state than this machine has memory.
    """
    devices = {p.device for group in inner.param_groups for p in group["params"]}
    device = devices.pop()
    if devices or device.type not in ("cpu", "cuda"):
        found = ", ".join(sorted(map(str, {device, *devices})))
        raise ConfigError(
            f"optim.offload_state=true needs all trained parameters on one GPU or on the CPU; they "
            f"are on {found}. Use optim.offload_state=false."
        )
    transport = None
    if device.type == "cuda":
        total = sum(state_sizes(inner, state_bytes).values())
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        require_host_memory(total, num_processes, machine_memory()[1])
        transport = CudaTransport(device)
    return OffloadedOptimizer(
        inner, group_bytes=group_bytes, state_bytes=state_bytes, transport=transport
    )


def state_sizes(
    optimizer: torch.optim.Optimizer, state_bytes: Callable[[Tensor], int]
) -> dict[nn.Parameter, int]:
    """Bytes of state in a block, of each parameter as the first rank holds it."""
    return {
        p: state_bytes(largest_share(p)) + _PADDING_BYTES
        for group in optimizer.param_groups
        for p in group["params"]
    }


def require_host_memory(num_bytes: int, num_processes: int, total_gib: float) -> None:
    """Raise ConfigError where the state of this machine's processes cannot lie in its memory."""
    needed_gib = num_processes * num_bytes / GIB
    if needed_gib > total_gib:
        raise ConfigError(
            f"optim.offload_state=true: the optimizer state of {num_processes} processes takes "
            f"{needed_gib:.1f} GiB, and this machine has {total_gib:.1f} GiB of host memory. Shard "
            "it (parallel=fsdp2), train fewer parameters (adapter=lora, model.freeze), or use "
            "optim.offload_state=false."
        )


def state_device(optimizer: torch.optim.Optimizer, parameter: Tensor) -> torch.device:
    """Where the state of a parameter lies between steps."""
    return HOST if isinstance(optimizer, OffloadedOptimizer) else parameter.device
