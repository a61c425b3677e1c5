"""Out of memory: a short message and `oom.md`, in place of an allocator's traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gemtune.errors import TrainingError
from gemtune.memory.readings import GIB, machine_memory, resident_gib
from gemtune.run_files import OOM_FILE

_SHOWN = 12
_ROWS_SHOWN = 4

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
    source: str = "unknown"
    """Where the peaks come from."""
    facts: RunFacts = field(default_factory=lambda: RunFacts())


@dataclass(frozen=True)
class RunFacts:
    """What the run knows beside the step itself."""

    folder: Path | None = None
    """Where `oom.md` goes; None: nowhere."""
    checkpoint: str = ""
    """The newest that is whole, "" where there is none."""
    plan: Mapping[str, Any] | None = None
    """As `scripts/plan_memory.py` writes it."""
    plan_command: str = ""
    """What plans the changes that would fit, to be typed."""
    advice: Sequence[str] = field(default_factory=list)
    holdings: Callable[[], Mapping[str, int]] = dict
    """Owner -> bytes, read when the report is written."""


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
        found = place()
        written = _write(found, error)
        raise TrainingError(message(found, error, written)) from error


def message(place: Place, error: BaseException, report: Path | None = None) -> str:
    """A few lines for the terminal."""
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in place.shapes.items())
    behind = place.facts
    lines = [
        f"out of memory on rank {place.rank} in step {place.step}, phase {place.phase}",
        f"  {_first_line(error)}",
        f"  micro-batch: {len(place.rows)} rows, {place.num_tokens} tokens; {shapes}",
        f"  rows: {_first(place.rows)}",
        f"  memory: {device_memory(place.device)}",
        f"  peaks of this step's phases so far, GiB: {_peaks(place.peaks_gib) or 'none'} "
        f"({place.source})",
    ]
    if behind.plan is not None:
        planned = f"{_size(behind.plan['peak_bytes'])} of tensors, in {behind.plan['phase']}"
        lines.append(f"  planned: {planned}")
    lines.append(
        "No step was done with part of the rows. "
        + (f"The newest checkpoint is {behind.checkpoint}." if behind.checkpoint else "")
        + ("" if behind.checkpoint else "There is no checkpoint yet.")
    )
    lines.append("What to change, the cheapest first:")
    lines += [f"  {number}. {text}" for number, text in enumerate(changes(behind), 1)]
    if report is not None:
        lines.append(f"All of it: {report}")
    return "\n".join(lines)


def changes(facts: RunFacts) -> list[str]:
    """What the plan found to save memory; where it found nothing yet, what usually does."""
    proposals = (facts.plan or {}).get("proposals", [])
    planned = [
        f"{' '.join(proposal['overrides'])}: {_size(proposal['peak_bytes'])} planned"
        f"{', fits' if proposal['fits'] else ''} ({proposal['cost']})"
        for proposal in proposals
        if proposal["saves"]
    ]
    return planned or list(facts.advice)


def report_text(place: Place, error: BaseException) -> str:
    """`oom.md`: where, the batch, measured beside planned, what is alive, what to change."""
    behind = place.facts
    plan = behind.plan or {}
    parts = [
        f"# Out of memory on rank {place.rank} in step {place.step}, {place.phase}",
        f"    {_first_line(error)}",
        "No step was done with part of the rows, and every rank stopped. " + _way_on(behind),
        "## The batch",
        f"{len(place.rows)} rows, {place.num_tokens:,} tokens",
        _table(("input", "shape"), [(f"`{n}`", list(s)) for n, s in place.shapes.items()]),
        "\n".join(f"- {row}" for row in place.rows),
        "## Memory",
        device_memory(place.device),
        _phases(place, plan),
    ]
    if plan:
        parts.append(f"Planned for {plan['batch']}.")
    else:
        parts.append("There is no plan of this run's memory (`memory.plan`, or not ready yet).")
    parts += ["## The largest tensors alive", _held(behind)]
    if plan:
        phase = plan["phases"][plan["phase"]]
        held = sorted(phase["by_module"].items(), key=lambda item: -item[1])[:_SHOWN]
        parts += [
            f"## What the plan holds at its peak ({plan['phase']})",
            _table(("kind", "size"), [(k, _size(n)) for k, n in phase["by_kind"].items() if n]),
            _table(("activations made by", "size"), [(f"`{k}`", _size(n)) for k, n in held]),
        ]
    parts.append("## What to change, the cheapest first")
    parts.append("\n".join(f"{n}. {text}" for n, text in enumerate(changes(behind), 1)))
    if behind.plan_command:
        parts.append(
            f"More, and what each change is worth on this device:\n\n    {behind.plan_command}"
        )
    if place.device.type == "cuda":
        with suppress(RuntimeError):
            summary = torch.cuda.memory_summary(place.device, abbreviated=True)
            parts += ["## The allocator", f"```\n{summary}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _write(place: Place, error: BaseException) -> Path | None:
    """The report's file; None where none could be written. The first rank has the plain name."""
    folder = place.facts.folder
    if folder is None:
        return None
    try:
        text = report_text(place, error)
        for name in (OOM_FILE, f"oom_rank_{place.rank}.md"):
            with suppress(FileExistsError), (folder / name).open("x", encoding="utf-8") as file:
                file.write(text)
                return folder / name
    except Exception as failure:  # the error itself must be told
        print(f"gemtune, rank {place.rank}: no {OOM_FILE}: {failure!r}", flush=True)
    return None


def remove_reports(folder: Path) -> None:
    """Those of an earlier start."""
    for path in [folder / OOM_FILE, *folder.glob("oom_rank_*.md")]:
        path.unlink(missing_ok=True)


def device_memory(device: torch.device) -> str:
    """In use, reserved and in all, GiB."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return (
            f"{torch.cuda.memory_allocated(device) / GIB:.2f} GiB in tensors now, "
            f"{torch.cuda.max_memory_reserved(device) / GIB:.2f} reserved at most, "
            f"{free / GIB:.2f} free of {total / GIB:.2f} ({torch.cuda.get_device_name(device)})"
        )
    available, total = machine_memory()
    return (
        f"{resident_gib():.2f} GiB resident now, {available:.2f} free of {total:.2f} "
        "(this machine's)"
    )


def advice(
    *,
    micro_batch_size: int,
    max_length: int,
    gradient_checkpointing: bool,
    recomputes_all: bool,
    patches_off: Sequence[str],
    adapter: bool,
    world_size: int,
    sharded: bool,
    mixed_precision: bool,
    state_on_gpu: bool,
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
    elif not recomputes_all:
        found.append("without model.recomputed_layers: every layer's activations, not some layers'")
    if patches_off:
        found.append(f"patches that are off and save memory: {', '.join(patches_off)}")
    if state_on_gpu and not adapter:
        found.append(
            "optim.offload_state=true: moments in host memory, copied from and to it at every step"
        )
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _peaks(peaks_gib: Mapping[str, float]) -> str:
    return ", ".join(f"{phase} {gib:.2f}" for phase, gib in peaks_gib.items() if gib == gib)


def _way_on(facts: RunFacts) -> str:
    if not facts.checkpoint:
        return "There is no checkpoint yet: the same command with a change from below begins anew."
    return (
        f"The newest checkpoint is `{facts.checkpoint}`. The same command with a change from below "
        "goes on from there; what changes what is learned needs a new `run.name`."
    )


def _first(rows: Sequence[str]) -> str:
    more = f"; {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return "; ".join(rows[:_ROWS_SHOWN]) + more


def _phases(place: Place, plan: Mapping[str, Any]) -> str:
    planned = {phase: _size(p["peak_bytes"]) for phase, p in plan.get("phases", {}).items()}
    rows = [
        (phase, _size(gib * GIB) if gib == gib else "not reached", planned.get(phase, ""))
        for phase, gib in place.peaks_gib.items()
    ]
    return _table(("peak of the phase", f"measured ({place.source})", "planned (tensors)"), rows)


def _held(facts: RunFacts) -> str:
    held = sorted(facts.holdings().items(), key=lambda item: -item[1])
    rest = sum(num_bytes for _, num_bytes in held[_SHOWN:])
    rows = [(owner, _size(num_bytes)) for owner, num_bytes in held[:_SHOWN]]
    return _table(("what", "size"), rows + ([("the rest", _size(rest))] if rest else []))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _size(num_bytes: float) -> str:
    if num_bytes < GIB:
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / GIB:,.2f} GiB"
