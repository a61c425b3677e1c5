"""How far the planned peak memory of a step is from the allocator's, at real sizes on a GPU.

    python benchmarks/memory_plan.py --device cuda
    python benchmarks/memory_plan.py --device cuda --cases e2b_lora_2k

Each case is planned in one process, on the CPU and while the GPU is at other cases, and made in
another: the released shape with random weights, patches, adapter and optimizer as a run has them,
three steps on the largest batch by gemtune's own loop. Measured is what CUDA's allocator says of
the last one (torch.cuda.max_memory_allocated); it includes the workspaces of libraries, which a
plan does not know. Needs torch, transformers, accelerate, peft, pyarrow and Pillow: neither Hydra
nor OmegaConf. Writes benchmarks/results/memory_plan_cuda.json after each case.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from child_process import NO_TIME, Deadline, OutOfTimeError, found_by
from environment import GIB, describe, typed_command, write_result
from measure import finish
from session import Sections, build_base, open_session, sections, train_on

from gemtune.memory import PHASES
from gemtune.patches import default
from gemtune.planning import PlanConfig, plan_memory
from gemtune.planning.memory_plan import largest_inputs, processing_for_plan

BOUND = 0.05
NUM_STEPS = 3
LEARNED = 0.3
WORKERS = 4  # plans at once
SCRIPT = "memory_plan.py"  # which hands over to this one


@dataclass(frozen=True)
class Case:
    """A run of the released sizes with one row a batch."""

    size: str
    training: str
    row_tokens: int = 2048
    images: int = 0
    patches: tuple[str, ...] | None = None
    """None: the default ones."""

    def sections(self) -> Sections:
        return sections(self.size, self.training, row_tokens=self.row_tokens, names=self.patches)

    def keys(self) -> list[str]:
        """What train.py would be given."""
        recipe = {"full": "gemma4_sft", "lora": "gemma4_lora"}[self.training]
        found = [f"recipe={recipe}", f"model={self.size}", "model.weights=random"]
        found += [f"data.max_length={self.row_tokens}"]
        found += ["loop.micro_batch_size=1", "loop.global_batch_size=1"]
        return found if self.patches is None else [*found, f"patches=[{','.join(self.patches)}]"]

    def plan_config(self, device: str) -> PlanConfig:
        return PlanConfig(device=device, images_per_row=self.images, learned_fraction=LEARNED)


WITH_OFFLOAD = (*default(), "ple_offload")
# The most important first.
CASES = {
    "e2b_lora_2k": Case("e2b", "lora"),
    "e2b_full_2k": Case("e2b", "full"),
    "e2b_lora_8k": Case("e2b", "lora", 8192),
    "e4b_lora_2k": Case("e4b", "lora"),
    "e2b_lora_images": Case("e2b", "lora", images=4),
    "e2b_lora_stock": Case("e2b", "lora", patches=()),
    "e2b_full_stock": Case("e2b", "full", patches=()),
    "e2b_full_8k": Case("e2b", "full", 8192),
    "e4b_lora_8k": Case("e4b", "lora", 8192),
    "e2b_lora_offload": Case("e2b", "lora", patches=WITH_OFFLOAD),
    "e2b_full_images": Case("e2b", "full", images=4),
    "e4b_full_2k": Case("e4b", "full"),
}


def plan(case: Case, device: str) -> dict[str, Any]:
    """Phase -> planned peak in GiB; seconds that it took."""
    started = time.perf_counter()
    planned = plan_memory(case.sections(), case.plan_config(device))
    return {
        "gib": {name: peak.total_bytes / GIB for name, peak in planned.step.peaks.items()},
        "seconds": time.perf_counter() - started,
        "num_parameters": planned.num_parameters,
        "batch": planned.batch,
    }


def run(case: Case, device: str) -> dict[str, Any]:
    """Phase -> peak of a step that has the optimizer's state, in GiB, as the run records it."""
    config = case.sections()
    processing = processing_for_plan(config)
    base = build_base(config, processing, torch.device(device))
    settings = case.plan_config(device)
    batch = largest_inputs(
        config, settings, processing, lambda s, dtype: torch.zeros(s, dtype=dtype)
    )[0]
    records: list[dict[str, Any]] = []
    try:
        train_on(open_session(config, base, NUM_STEPS, records.append), batch, config.loop)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    reserved = torch.cuda.max_memory_reserved() / GIB if device == "cuda" else None
    return {
        "gib": {phase: records[-1][f"memory/{phase}_peak_gib"] for phase in PHASES},
        "reserved_gib": reserved,
    }


def in_process(what: str, name: str, device: str, deadline: Deadline) -> dict[str, Any]:
    """What `plan` or `run` returns in a process of its own.

    Raises:
        OutOfTimeError: before it was done.
    """
    environment = dict(os.environ)
    if what == "plan" or device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = ["--part", what, "--cases", name, "--device", device]
    return found_by(__file__, *words, environment=environment, deadline=deadline)


def row_of(case: Case, planned: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """A row of the result."""
    phase = max(planned["gib"], key=planned["gib"].get)
    row = {
        "keys": case.keys(),
        "batch": planned["batch"],
        "num_parameters": planned["num_parameters"],
        "plan_seconds": round(planned["seconds"], 1),
        "planned_gib": planned["gib"][phase],
        "phase": phase,
    }
    if measured.get("out_of_memory"):
        return row | {"out_of_memory": True}
    found = max(measured["gib"].values())
    error = row["planned_gib"] / found - 1
    return row | {
        "measured_gib": found,
        "reserved_gib": measured["reserved_gib"],
        "phases": {name: [gib, measured["gib"][name]] for name, gib in planned["gib"].items()},
        "error": error,
        "within": abs(error) <= BOUND,
    }


def case_of(
    name: str, planned: Future[dict[str, Any]], device: str, deadline: Deadline
) -> dict[str, Any]:
    """A row, of a case that was measured or for which there was no time."""
    try:
        measured = in_process("run", name, device, deadline)
        return row_of(CASES[name], planned.result(), measured)
    except OutOfTimeError:
        return {"keys": CASES[name].keys(), "not_measured": NO_TIME}


def line_of(name: str, row: dict[str, Any]) -> str:
    """What is printed when a case is done."""
    if "not_measured" in row:
        return f"{name}: not measured ({row['not_measured']})"
    planned = f"{name}: planned {row['planned_gib']:.2f} GiB in {row['plan_seconds']:.0f} s"
    if row.get("out_of_memory"):
        return f"{planned}; out of memory"
    return f"{planned}, measured {row['measured_gib']:.2f} GiB, error {row['error']:+.1%}"


def main(words: Sequence[str]) -> None:
    """Every case that there is time for; or one part of one case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--limit-seconds", type=float, default=0.0, help="begin no case after it")
    parser.add_argument("--output", default="memory_plan_cuda", help="the JSON file without .json")
    parser.add_argument("--part", choices=("plan", "run"), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.part:
        part = {"plan": plan, "run": run}[options.part]
        print(json.dumps(part(CASES[options.cases[0]], options.device)))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: received cuda, but torch sees no CUDA device here")
    result = describe(typed_command(SCRIPT))
    result["settings"] = {"device": options.device, "learned": LEARNED, "steps": NUM_STEPS}
    result |= {"bound": BOUND, "cases": {}}
    deadline = Deadline(options.limit_seconds)
    with ThreadPoolExecutor(WORKERS) as pool:
        plans = {
            name: pool.submit(in_process, "plan", name, options.device, deadline)
            for name in options.cases
        }
        for name in options.cases:
            result["cases"][name] = case_of(name, plans[name], options.device, deadline)
            print(line_of(name, result["cases"][name]), flush=True)
            write_result(options.output, result)
    finish(options.output, result)


if __name__ == "__main__":
    main(sys.argv[1:])
