"""Parameters that are stepped together, and their state in one block of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from gemtune.optim.transport import MakeMemory, Transport
from gemtune.patches.host_memory import packed

State = Mapping[Tensor, dict[str, Any]]
"""As of an optimizer: by parameter, then by slot."""
_Key = tuple[int, str]
"""A parameter by its place in the group, and a slot."""


@dataclass(eq=False)
class StateGroup:
    """The state of some parameters: between steps in one block, for a step in a buffer.

    In `state` there are views of the one or of the other, so that whoever reads an optimizer's
    state between steps, or puts another tensor into it, need not know of the block.
    """

    by_param_group: list[list[nn.Parameter]]
    """The parameters, those of each group of the optimizer in a list."""
    parameters: list[nn.Parameter] = field(init=False)
    """All of them."""
    block: Tensor | None = None
    """uint8, where state rests; None before there is any."""
    _offsets: dict[_Key, int] = field(default_factory=dict)
    _resting: dict[_Key, Tensor] = field(default_factory=dict)
    _working: dict[_Key, Tensor] = field(default_factory=dict)
    _stays: set[_Key] = field(default_factory=set)
    """What the optimizer itself keeps on the CPU."""

    def __post_init__(self) -> None:
        self.parameters = [p for parameters in self.by_param_group for p in parameters]

    @property
    def num_bytes(self) -> int:
        """Of the block."""
        return 0 if self.block is None else self.block.numel()

    def settle(self, state: State, rest: MakeMemory) -> None:
        """Everything of these parameters into one block, if it does not lie there already."""
        if not _are_same(self._found(state), self._resting):
            self._pack(state, rest)

    def bring(self, state: State, turn: int, transport: Transport) -> None:
        """Begin to copy the block; `state` has what will be in the buffer."""
        if self.block is None:
            return
        transport.bring(turn, self.block)
        buffer = transport.buffer(turn)
        self._working = {
            key: _around(value, _view(buffer, self._offsets[key], shard_of(value)))
            for key, value in self._resting.items()
        }
        self._write(state, self._working)

    def take_back(self, state: State, turn: int, transport: Transport) -> None:
        """Begin to copy it back as a step has left it; `state` has the block again.

        Slots that the step has made, or has put other tensors into, go to a new block. That copy
        is waited for, so that not more than this group's state is on the device meanwhile.
        """
        working, self._working = self._working, {}
        for key, value in self._found(state).items():
            on_device = self.parameters[key[0]].device.type != "cpu"
            if key not in working and on_device and value.device.type == "cpu":
                self._stays.add(key)
        if not _are_same(self._found(state), working):
            self._pack(state, transport.rest)
        elif self.block is not None:
            transport.take_back(turn, self.block)
            self._write(state, self._resting)

    def leave(self, state: State) -> None:
        """As if it had not been brought: `state` has the block, in which nothing has changed."""
        if self._working:
            self._working = {}
            self._write(state, self._resting)

    def _found(self, state: State) -> dict[_Key, Tensor]:
        return {
            (place, slot): value
            for place, parameter in enumerate(self.parameters)
            for slot, value in state.get(parameter, {}).items()
            if isinstance(value, Tensor) and (place, slot) not in self._stays
        }

    def _write(self, state: State, values: Mapping[_Key, Tensor]) -> None:
        for (place, slot), value in values.items():
            state[self.parameters[place]][slot] = value

    def _pack(self, state: State, rest: MakeMemory) -> None:
        found = self._found(state)
        shards = [shard_of(value) for value in found.values()]
        offsets, size = packed(shards)
        self.block = rest(size) if found else None
        self._offsets = dict(zip(found, offsets, strict=True))
        self._resting = {}
        for (key, value), shard in zip(found.items(), shards, strict=True):
            assert self.block is not None
            place = _view(self.block, self._offsets[key], shard)
            place.copy_(shard)
            self._resting[key] = _around(value, place)
        self._write(state, self._resting)


def state_groups(
    param_groups: Sequence[Mapping[str, Any]],
    sizes: Mapping[nn.Parameter, int],
    group_bytes: int,
) -> Iterator[StateGroup]:
    """The parameters in their order, as many at a time as keep within `group_bytes`, at least one.

    Args:
        sizes: bytes of state of each; the same on all ranks, and so are the groups then.
    """
    held, lists = 0, [[] for _ in param_groups]
    for number, group in enumerate(param_groups):
        for parameter in group["params"]:
            if held and held + sizes[parameter] > group_bytes:
                yield StateGroup(lists)
                held, lists = 0, [[] for _ in param_groups]
            held += sizes[parameter]
            lists[number].append(parameter)
    if held:
        yield StateGroup(lists)


def largest_share(parameter: nn.Parameter) -> Tensor:
    """Without memory, a tensor of the shape that the first rank has of a parameter."""
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                shape[placement.dim] = -(-shape[placement.dim] // parameter.device_mesh.size(dim))
    return torch.empty(shape, dtype=parameter.dtype, device="meta")


def shard_of(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _around(value: Tensor, shard: Tensor) -> Tensor:
    """A tensor like `value` that holds `shard`, on whatever device that is.

    `DTensor.from_local` would move it to the device of the mesh.
    """
    if isinstance(value, DTensor):
        return DTensor(shard, value._spec, requires_grad=False)
    return shard


def _view(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor of shape, strides and dtype of a dense one, in memory from an offset on."""
    end = offset + like.numel() * like.element_size()
    return memory[offset:end].view(like.dtype).as_strided(like.shape, like.stride())


def _are_same(found: Mapping[_Key, Tensor], known: Mapping[_Key, Tensor]) -> bool:
    return found.keys() == known.keys() and all(found[key] is known[key] for key in found)
