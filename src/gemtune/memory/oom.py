"""Out of memory: one readable report in place of an allocator's traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gemtune.errors import TrainingError
from gemtune.memory.tracking import GIB

_TEXTS = (
    "can't allocate memory",  # DefaultCPUAllocator
    "cannot allocate memory",
    "out of memory",  # CUDA, and NCCL on it
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "std::bad_alloc",
)


@dataclass(frozen=True)
class Place:
    """Where in a run memory ran out."""

    rank: int
    step: int
    phase: str
    rows: Sequence[str]
    """Of the micro-batch, as error messages name them."""
    shapes: dict[str, Sequence[int]]
    """Of its inputs."""
    num_tokens: int
    peaks_gib: dict[str, float]
    """Of the phases of this step so far."""
    device: torch.device
    advice: Sequence[str] = field(default_factory=list)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _TEXTS)


@contextmanager
def reported_when_out_of_memory(place: Callable[[], Place]) -> Iterator[None]:
    """Within it an out-of-memory error becomes a TrainingError that says where and what to change.

    The run ends: a rank that went on alone, or without a batch, would train something else.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(describe(place(), error)) from error


def describe(place: Place, error: BaseException) -> str:
    """The report, several lines."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in place.shapes.items())
    peaks = ", ".join(f"{phase} {gib:.2f}" for phase, gib in place.peaks_gib.items() if gib == gib)
    lines = [
        f"out of memory on rank {place.rank} in step {place.step}, phase {place.phase}",
        f"  {first_line}",
        f"  micro-batch: {len(place.rows)} rows, {place.num_tokens} tokens; {shapes}",
        f"  rows: {'; '.join(place.rows)}",
        f"  memory: {device_memory(place.device)}",
        f"  peaks of this step's phases so far, GiB: {peaks or 'none'}",
        "No step was done with part of the rows; the newest checkpoint is from before this step.",
        "What to change, the cheapest first:",
    ]
    return "\n".join(lines + [f"  {number}. {text}" for number, text in enumerate(place.advice, 1)])


def device_memory(device: torch.device) -> str:
    """In use, reserved and in all, GiB."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (
            f"{torch.cuda.memory_allocated(device) / GIB:.2f} GiB in tensors now, "
            f"{torch.cuda.max_memory_reserved(device) / GIB:.2f} reserved at most, "
            f"{free / GIB:.2f} free of {total / GIB:.2f} ({torch.cuda.get_device_name(device)})"
        )
    used = _kib("/proc/self/status", "VmRSS:")
    total = _kib("/proc/meminfo", "MemTotal:")
    free = _kib("/proc/meminfo", "MemAvailable:")
    return f"{used:.2f} GiB resident now, {free:.2f} free of {total:.2f} (this machine's)"


def _kib(path: str, key: str) -> float:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(x.split()[1]) / 2**20 for x in lines if x.startswith(key)), float("nan"))


def advice(
    *,
    micro_batch_size: int,
    max_length: int,
    gradient_checkpointing: bool,
    patches_off: Sequence[str],
    adapter: bool,
    world_size: int,
    sharded: bool,
    mixed_precision: bool,
) -> list[str]:
    """What makes a step smaller, in the order to try it, given what is on already.

    First what changes no result, then what changes what is learned.
    """
    found: list[str] = []
    if micro_batch_size > 1:
        found.append(
            f"loop.micro_batch_size={max(1, micro_batch_size // 2)} (now {micro_batch_size}): the "
            "same gradient in more, smaller passes"
        )
    if not gradient_checkpointing:
        found.append("model.gradient_checkpointing=true: activations are computed twice, not kept")
    if patches_off:
        found.append(f"patches that are off and save memory: {', '.join(patches_off)}")
    if world_size > 1 and not sharded:
        found.append("parallel=fsdp2: parameters, gradients and optimizer are split over the ranks")
    if world_size == 1:
        found.append("more devices with parallel=fsdp2: each holds a part of the model")
    found.append(f"data.max_length below {max_length}: longer rows are refused, or cut on request")
    if not adapter:
        found.append("recipe=gemma4_lora: gradients and optimizer of the adapters alone")
    if mixed_precision:
        found.append("model.dtype=bfloat16 without autocast: weights in half the bytes")
    return found
