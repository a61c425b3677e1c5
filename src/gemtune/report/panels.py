"""Which keys of metrics.jsonl are drawn, and how."""

from __future__ import annotations

from dataclasses import dataclass

PHASES = ("forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Panel:
    """One chart of a run."""

    title: str
    unit: str
    lines: dict[str, str]
    """Key of metrics.jsonl -> its name in the legend."""
    is_percent: bool = False
    may_be_log: bool = False
    dashed: frozenset[str] = frozenset()
    """Lines that often lie on another one: the gaps let that show."""


LOSS = Panel(
    "Loss",
    "nats per supervised token",
    {"train/loss": "train", "eval/loss": "eval"},
    may_be_log=True,
)
MEMORY = Panel(
    "Peak memory by phase",
    "GiB, highest rank",
    {f"memory/{phase}_peak_gib": phase for phase in PHASES},
    dashed=frozenset({"memory/loss_peak_gib", "memory/optimizer_peak_gib"}),
)
PLANNED_KEY = "memory/planned_peak_gib"

PANELS = (
    LOSS,
    Panel(
        "Token accuracy",
        "supervised tokens predicted right",
        {"train/token_accuracy": "train", "eval/token_accuracy": "eval"},
        is_percent=True,
    ),
    Panel(
        "Exact match",
        "share of generated answers",
        {"eval/exact_match": "eval"},
        is_percent=True,
    ),
    Panel("chrF", "of generated answers, 0 to 100", {"eval/chrf": "eval"}),
    Panel(
        "ROUGE",
        "F-measure of generated answers",
        {"eval/rouge1": "1", "eval/rouge2": "2", "eval/rougeL": "L"},
    ),
    Panel("Learning rate", "as the optimizer used it", {"train/learning_rate": "learning rate"}),
    Panel("Gradient norm", "before clipping", {"train/grad_norm": "norm"}, may_be_log=True),
    Panel("Throughput", "tokens per second", {"train/tokens_per_second": "all devices"}),
    Panel("Entropy", "nats per supervised token", {"train/entropy": "train"}),
    MEMORY,
    Panel(
        "Memory held",
        "GiB",
        {
            "memory/allocated_gib": "allocated",
            "memory/reserved_gib": "reserved",
            "memory/device_free_gib": "free on the device",
            "memory/host_resident_gib": "host, resident",
        },
    ),
    Panel(
        "Waiting for data",
        "share of the step",
        {"train/data_wait_fraction": "waiting"},
        is_percent=True,
    ),
)

COMPARED = (
    Panel("Training loss", LOSS.unit, {"train/loss": ""}, may_be_log=True),
    # Of generated answers there are few points: the table of final figures has them.
    Panel("Evaluation loss", LOSS.unit, {"eval/loss": ""}, may_be_log=True),
    *(
        Panel(panel.title, panel.unit, {key: ""}, panel.is_percent, panel.may_be_log)
        for panel in PANELS
        for key in list(panel.lines)[:1]
        if panel not in (LOSS, MEMORY) and not key.startswith(("memory/", "eval/"))
    ),
    Panel("Peak memory", MEMORY.unit, {"memory/peak_gib": ""}),
)

KEYS = frozenset([key for panel in (*PANELS, *COMPARED) for key in panel.lines] + [PLANNED_KEY])
"""The keys whose curves a report needs."""
