"""A plan as a person reads it, and as a JSON document."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gemtune.planning.memory_plan import MemoryPlan
from gemtune.planning.proposals import GIB, RESERVED_GIB, Proposal
from gemtune.planning.storages import (
    GATHERED,
    GRADIENTS,
    INPUTS,
    OPTIMIZER_STATE,
    PARAMETERS,
    STAGING,
    Peak,
)

BUCKETS = "buckets"
_COLOURS = {
    PARAMETERS: "blue",
    GRADIENTS: "red",
    OPTIMIZER_STATE: "magenta",
    INPUTS: "white",
    BUCKETS: "bright_red",
    GATHERED: "bright_blue",
    STAGING: "bright_yellow",
    "forward": "green",
    "loss": "yellow",
    "backward": "cyan",
    "optimizer": "bright_magenta",
}
_BAR_WIDTH = 60
_MODULES_SHOWN = 6


def plan_page(plan: MemoryPlan) -> RenderableType:
    """Phases and what they hold, the highest as a bar, and the modules that hold most of it."""
    peaks = plan.step.peaks
    kinds = [kind for kind in _COLOURS if any(_kinds(plan, peak)[kind] for peak in peaks.values())]
    table = Table(title="GiB at the peak of each phase", title_justify="left", box=None)
    table.add_column("phase")
    for kind in kinds:
        table.add_column(kind, justify="right")
    table.add_column("all", justify="right", style="bold")
    for phase, peak in peaks.items():
        held = _kinds(plan, peak)
        cells = [_gib(held[kind]) for kind in kinds]
        table.add_row(phase, *cells, _gib(peak.total_bytes + plan.bucket_bytes))
    among = f"first of {plan.world_size} processes; {plan.strategy.describe(plan.world_size)}"
    lines = [
        f"planned for {plan.batch}",
        *([among] if plan.world_size > 1 else []),
        f"{plan.num_parameters:,} parameters, {plan.num_trained:,} trained"
        + (f"; {_gib(plan.host_bytes)} GiB of them stay in host memory" * bool(plan.host_bytes)),
        *_state_line(plan),
        f"peak: {plan.peak_bytes / GIB:.2f} GiB of tensors, in {plan.step.phase}",
    ]
    return Group(*map(Text, lines), _bar(plan, kinds), Text(), table, Text(), _modules(plan))


def proposals_page(proposals: list[Proposal], device_memory_gib: float) -> RenderableType:
    """Each change that was planned, with what it brings."""
    table = Table(
        title=f"to fit into {device_memory_gib:g} GiB, {RESERVED_GIB:g} of them reserved; each "
        "change on top of those that saved something",
        title_justify="left",
        box=None,
    )
    table.add_column("change", overflow="fold")
    table.add_column("GiB", justify="right")
    table.add_column("")
    table.add_column("costs", overflow="fold")
    for proposal in proposals:
        found = Text("saves nothing", "yellow")
        if proposal.fits:
            found = Text("fits", "green")
        elif proposal.saves:
            found = Text("too much", "red")
        # Text, because brackets in a plain string would be taken for markup.
        peak = Text(_gib(proposal.plan.peak_bytes))
        table.add_row(Text(proposal.change), peak, found, Text(proposal.cost))
    return table


def plan_document(
    plan: MemoryPlan, proposals: list[Proposal], device_memory_gib: float | None = None
) -> dict[str, Any]:
    """The same for other programs. Sizes in bytes, but for those whose names say GiB."""
    return {
        "peak_gib": round(plan.peak_bytes / GIB, 3),
        "peak_bytes": plan.peak_bytes,
        "phase": plan.step.phase,
        "batch": plan.batch,
        "device_memory_gib": device_memory_gib,
        "world_size": plan.world_size,
        "strategy": plan.strategy.name,
        "num_parameters": plan.num_parameters,
        "num_trained": plan.num_trained,
        "host_bytes": plan.host_bytes,
        "host_state_bytes": plan.host_state_bytes,
        "phases": {
            phase: {
                "peak_bytes": peak.total_bytes + plan.bucket_bytes,
                "by_kind": dict(_kinds(plan, peak)),
                "by_module": dict(modules_of(peak).most_common()),
            }
            for phase, peak in plan.step.peaks.items()
        },
        "proposals": [
            {
                "overrides": list(proposal.overrides),
                "cost": proposal.cost,
                "peak_bytes": proposal.plan.peak_bytes,
                "saves": proposal.saves,
                "fits": proposal.fits,
            }
            for proposal in proposals
        ],
    }


def modules_of(peak: Peak) -> Counter[str]:
    """What modules hold, those that differ by a number taken together."""
    found: Counter[str] = Counter()
    for name, num_bytes in peak.by_module.items():
        found[re.sub(r"\.\d+(?=\.|$)", ".*", name) or "(outside of any module)"] += num_bytes
    return found


def _state_line(plan: MemoryPlan) -> list[str]:
    if not plan.host_state_bytes:
        return []
    whose = " of each process" * (plan.world_size > 1)
    return [f"optimizer state{whose}: {_gib(plan.host_state_bytes)} GiB, in host memory"]


def _kinds(plan: MemoryPlan, peak: Peak) -> Counter[str]:
    """Bytes by kind, with DDP's buckets."""
    found = Counter(peak.by_kind)
    found[BUCKETS] = plan.bucket_bytes
    return +found


def _bar(plan: MemoryPlan, kinds: list[str]) -> Text:
    held, bar, key = _kinds(plan, plan.step.peak), Text(), Text()
    for kind in kinds:
        width = round(_BAR_WIDTH * held[kind] / plan.peak_bytes)
        bar.append("█" * width, _COLOURS[kind])
        if width:
            key.append("█ ", _COLOURS[kind]).append(f"{kind}  ")
    return Text("\n").join([bar, key])


def _modules(plan: MemoryPlan) -> RenderableType:
    table = Table(title=f"most at the peak ({plan.step.phase})", title_justify="left", box=None)
    table.add_column("made by")
    table.add_column("GiB", justify="right")
    for name, num_bytes in modules_of(plan.step.peak).most_common(_MODULES_SHOWN):
        table.add_row(name, _gib(num_bytes))
    return table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"
