"""Stand-ins for a GPU in tests of optimizer state that is moved; everything lies on the CPU."""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from gemtune.optim import AdamW, AdamW8bit, Muon
from gemtune.optim.offloaded import OffloadedOptimizer
from gemtune.optim.state_group import shard_of
from gemtune.optim.transport import Transport

RUBBISH = 0xA5
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
SETTINGS = [
    pytest.param(AdamW, id="adamw"),
    pytest.param(Muon, id="muon"),
    pytest.param(
        AdamW8bit,
        id="adamw_8bit",
        marks=pytest.mark.skipif(
            not HAS_TORCHAO, reason="needs torchao: pip install -e '.[quant]'"
        ),
    ),
]


def block(num_bytes: int) -> Tensor:
    return torch.full((num_bytes,), RUBBISH, dtype=torch.uint8)


def uncounted(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that is made out of sight of whoever follows operators."""
    with _disable_current_modes():
        return torch.zeros(shape, dtype=dtype)


@dataclass
class Counted:
    """Memory of a kind, which knows how much of it is there."""

    live: int = 0
    highest: int = 0
    _storages: set[int] = field(default_factory=set)

    def __call__(self, num_bytes: int) -> Tensor:
        made = block(num_bytes)
        storage = made.untyped_storage()
        self.live += num_bytes
        self.highest = max(self.highest, self.live)
        self._storages.add(storage._cdata)
        weakref.finalize(storage, self._gone, storage._cdata, num_bytes)
        return made

    def _gone(self, key: int, num_bytes: int) -> None:
        self.live -= num_bytes
        self._storages.discard(key)

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in it."""
        return shard_of(tensor).untyped_storage()._cdata in self._storages


class LateTransport(Transport):
    """As late as the streams of a GPU may be: a copy is made when somebody has waited for it.

    Until then there is rubbish in the buffer, or old values in the block.
    """

    def __init__(self, rest: Callable = block, work: Callable = block) -> None:
        super().__init__(rest, work)
        self._coming: dict[int, Tensor] = {}
        self._going: dict[int, Tensor] = {}

    def bring(self, turn: int, block: Tensor) -> None:
        self._finish(turn % 2)
        self.buffer(turn).fill_(RUBBISH)
        self._coming[turn % 2] = block

    def arrive(self, turn: int) -> None:
        if (block := self._coming.pop(turn % 2, None)) is not None:
            super().bring(turn, block)

    def take_back(self, turn: int, block: Tensor) -> None:
        assert turn % 2 not in self._coming, "stepped before it has arrived"
        self._going[turn % 2] = block

    def close(self) -> None:
        self._coming.clear()
        for slot in (0, 1):
            self._finish(slot)
        super().close()

    def _finish(self, slot: int) -> None:
        if (block := self._going.pop(slot, None)) is not None:
            super().take_back(slot, block)
            self.buffer(slot).fill_(RUBBISH)


def moved(
    settings: AdamW,
    model: nn.Module,
    group_bytes: int,
    transport: Transport | None = None,
) -> OffloadedOptimizer:
    """The optimizer of these settings, with its state moved as on a GPU."""
    return OffloadedOptimizer(
        settings.assemble(model),
        group_bytes=group_bytes,
        state_bytes=settings.moment_bytes,
        transport=transport or LateTransport(),
    )


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(40, 64),
        nn.Linear(64, 128),
        nn.Linear(128, 64),
        nn.LayerNorm(64),
        nn.Linear(64, 33),
        nn.Linear(33, 16),
    ).to(dtype)


def feed(model: nn.Module, step: int) -> None:
    """Gradients of a step: those of one layer come late, of another now and then, never of one."""
    torch.manual_seed(step)
    for name, parameter in model.named_parameters():
        gradient = torch.randn_like(parameter)
        unfed = (
            (name.startswith("1.") and step < 2)
            or (name.startswith("4.") and step % 2 == 1)
            or name == "5.bias"
        )
        parameter.grad = None if unfed else gradient


def same_state(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> bool:
    """Slot for slot, in their order, of parameters in theirs."""
    pairs = zip(
        (p for group in ours.param_groups for p in group["params"]),
        (p for group in theirs.param_groups for p in group["params"]),
        strict=True,
    )
    for p, q in pairs:
        mine, other = ours.state.get(p, {}), theirs.state.get(q, {})
        if list(mine) != list(other):
            return False
        if not all(mine[s].dtype == other[s].dtype and mine[s].equal(other[s]) for s in mine):
            return False
    return True


def same_model(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def values_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for slots in optimizer.state.values():
        yield from slots.values()
