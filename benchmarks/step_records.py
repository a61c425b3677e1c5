"""What the records of memory cost of a step's time.

    python benchmarks/step_records.py                 # about a minute
    python benchmarks/step_records.py --steps 20      # a trial

The default run as it is, in this process, without its plan: each call that reads or compares memory
is timed where the loop makes it, and divided by the time of its step. Without a GPU: there the peak
comes from the kernel, which goes through the pages of the process for it; with one, from counters.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from environment import REPOSITORY, describe, typed_command, write_result
from measure import spread

sys.path[:0] = [str(REPOSITORY / "scripts"), str(REPOSITORY)]

from command_line import compose

from gemtune import loop
from gemtune.config import find_recipe
from gemtune.memory import PeakTracker
from gemtune.reporting import Reporter
from gemtune.run_memory import RunMemory

WARM_UP = 10


class Stopwatch:
    """Seconds spent in the functions that it goes around, until it is read."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(owner, name, timed)

    def read(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = describe(typed_command(__file__))
    parts = {
        "peaks of the phases": [(PeakTracker, "enter"), (PeakTracker, "finish")],
        "what is held": [(loop, "read_memory")],
        "plan, leaks": [(RunMemory, "watch")],
    }
    watches = {name: Stopwatch() for name in parts}
    for name, functions in parts.items():
        for owner, function in functions:
            watches[name].around(owner, function)
    shares: dict[str, list[float]] = {name: [] for name in parts}
    seconds: list[float] = []
    original = Reporter.training

    def training(self: Reporter, record: dict[str, Any]) -> None:
        spent = {name: watch.read() for name, watch in watches.items()}
        seconds.append(record["train/step_seconds"])
        for name, value in spent.items():
            shares[name].append(value / seconds[-1])
        original(self, record)

    Reporter.training = training  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="gemtune-records-") as name:
        config = compose(
            ["recipe=gemma4_sft", f"run.dir={Path(name)}", "tracker=none", "memory.plan=false",
             f"loop.max_steps={options.steps}", "schedule.warmup_steps=0",
             "data.eval_generate_rows=0", "data.eval_max_rows=8"]
        )  # fmt: skip
        if find_recipe(config)(config):
            raise SystemExit("the run did not end well")
    kept = {name: values[WARM_UP:] for name, values in shares.items()}
    result["settings"] = {"threads": options.threads, "steps": options.steps - WARM_UP}
    result["step_seconds"] = spread(seconds[WARM_UP:])
    result["shares"] = {name: spread(values) for name, values in kept.items()}
    result["share"] = spread([sum(row) for row in zip(*kept.values(), strict=True)])
    print(f"{result['share']['median']:.2%} of a step of {result['step_seconds']['median']:.3f} s")
    print(f"wrote {write_result('step_records', result).relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
