"""How a model is spread over the processes of a run: the choice, and how `auto` makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from gemtune.errors import ConfigError
from gemtune.options import option, require_choice, require_range

DDP, FSDP2, AUTO = "ddp", "fsdp2", "auto"

# Of a device's memory; the rest is for activations, the loss, and what the collectives stage.
COMFORTABLE_SHARE = 0.6


@dataclass
class ParallelConfig:
    """How the model is spread over processes."""

    strategy: str = option(
        AUTO,
        "ddp: a full copy in each process; fsdp2: weights, gradients and optimizer state are "
        f"sharded; auto: fsdp2 where a copy of these takes more than {COMFORTABLE_SHARE:.0%} of "
        "the smallest GPU, else ddp",
    )
    mixed_precision: str = option(
        "no", "no, or bf16: matrix products in bfloat16 whatever the weights are (autocast)"
    )
    timeout_seconds: int = option(
        1800, "a rank that makes no progress for so long (in training) ends the run"
    )
    heartbeat_seconds: float = option(120.0, "a rank that does not answer for so long ends the run")

    def __post_init__(self) -> None:
        require_choice("parallel.strategy", self.strategy, [DDP, FSDP2, AUTO])
        require_choice("parallel.mixed_precision", self.mixed_precision, ["no", "bf16"])
        require_range("parallel.timeout_seconds", self.timeout_seconds, at_least=1)
        require_range("parallel.heartbeat_seconds", self.heartbeat_seconds, at_least=1)


@dataclass(frozen=True)
class Strategy:
    """What is used, and why."""

    name: str = DDP
    reason: str = "as asked for"

    @property
    def is_sharded(self) -> bool:
        return self.name == FSDP2

    def describe(self, num_processes: int) -> str:
        """A line for people."""
        if self.is_sharded:
            return f"fsdp2: {num_processes} shards of the model ({self.reason})"
        if num_processes == 1:
            return "one process holds the whole model"
        return f"ddp: each of {num_processes} processes holds the whole model ({self.reason})"


def decide(
    asked: str, *, num_processes: int, copy_bytes: int, device_bytes: int | None
) -> Strategy:
    """The strategy that `asked` stands for; a pure function, so that all ranks agree.

    `copy_bytes` is what `training_bytes` says; `device_bytes` the memory of the smallest device of
    the run, None where the devices are no GPUs.
    """
    if asked != AUTO:
        return Strategy(asked)
    if num_processes == 1:
        return Strategy(DDP, "auto: a single process")
    if device_bytes is None:
        return Strategy(DDP, "auto: not on GPUs")
    need, have = copy_bytes / 2**30, device_bytes / 2**30
    compared = (
        f"weights, gradients and optimizer state of a copy take {need:.1f} GiB, "
        f"{COMFORTABLE_SHARE:.0%} of the smallest GPU are {COMFORTABLE_SHARE * have:.1f} GiB"
    )
    fits = need <= COMFORTABLE_SHARE * have
    return Strategy(DDP if fits else FSDP2, f"auto: {compared}")


def training_bytes(
    parameters: Iterable[nn.Parameter], state_bytes: Callable[[nn.Parameter], int]
) -> int:
    """Bytes on the device: weights, gradients in their dtype, and optimizer state of the trained.

    Parameters on the meta device will do.
    """
    total = 0
    for parameter in parameters:
        own = parameter.numel() * parameter.element_size()
        total += 2 * own + state_bytes(parameter) if parameter.requires_grad else own
    return total


def refuse_sharding(strategy: Strategy, optimizer: str, reason: str) -> None:
    """ConfigError for an optimizer that has a reason not to step shares of parameters."""
    if strategy.is_sharded and reason:
        raise ConfigError(
            f"{optimizer} cannot be used with parallel=fsdp2 ({strategy.reason}): {reason}. Use "
            "optim=adamw, or parallel=ddp."
        )


def smallest_device_bytes(device: torch.device) -> int | None:
    """Total memory of this GPU; None for anything else."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def refuse_foreign_sharding(distributed_type: str) -> None:
    """ConfigError where accelerate itself was configured to shard or to split the model."""
    if distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ConfigError(
            f"accelerate is configured for {distributed_type}, which would wrap the model by rules "
            "of its own. Launch with a plain configuration (distributed_type MULTI_GPU or NO, as "
            "in configs/accelerate), and choose parallel=ddp, fsdp2 or auto here."
        )
