"""How long a plan of the released sizes takes, with how much memory, and what it says.

    python benchmarks/plan_times.py                   # about 5 minutes
    python benchmarks/plan_times.py --cases e2b_lora --repetitions 1

`scripts/plan_memory.py` as a user starts it, each in a process of its own: wall time, and the peak
of its resident set as the kernel counts it. What it plans is not measured here: no GPU is there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import GIB, REPOSITORY, describe, typed_command, write_result
from measure import spread

# Name -> the keys of the plan.
CASES: dict[str, tuple[str, ...]] = {
    "e2b_lora_2k": ("recipe=gemma4_lora", "model=e2b", "data.max_length=2048"),
    "e2b_lora_8k": ("recipe=gemma4_lora", "model=e2b", "data.max_length=8192"),
    "e2b_lora_images": (
        "recipe=gemma4_lora", "model=e2b", "data.max_length=2048", "plan.images_per_row=4",
    ),
    "e2b_full_8k": ("recipe=gemma4_sft", "model=e2b", "data.max_length=8192"),
    "e4b_lora_8k": ("recipe=gemma4_lora", "model=e4b", "data.max_length=8192"),
    "26b_a4b_lora_2k": ("recipe=gemma4_lora", "model=26b_a4b", "data.max_length=2048"),
    "31b_lora_8k": ("recipe=gemma4_lora", "model=31b", "data.max_length=8192"),
    "31b_full_8k": ("recipe=gemma4_sft", "model=31b", "data.max_length=8192"),
}  # fmt: skip
# Nothing of the data is read.
ALWAYS = ("data=chat", "data.path=none", "loop.micro_batch_size=1", "loop.global_batch_size=1")


def measure(keys: tuple[str, ...], repetitions: int, folder: Path) -> dict[str, Any]:
    """A row of the result."""
    path = folder / "plan.json"
    command = [sys.executable, "scripts/plan_memory.py", *keys, *ALWAYS, f"plan.output={path}"]
    seconds, peaks = [], []
    for _ in range(repetitions):
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds.append(time.perf_counter() - started)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
        peaks.append(usage.ru_maxrss * 1024 / GIB)
    plan = json.loads(path.read_text(encoding="utf-8"))
    return {
        "keys": list(keys),
        "batch": plan["batch"],
        "num_parameters": plan["num_parameters"],
        "planned_gib": plan["peak_gib"],
        "phase": plan["phase"],
        "seconds": spread(seconds),
        "planner_gib": statistics.median(peaks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    result = describe(typed_command(__file__))
    result["settings"] = {"threads": 1, "repetitions": options.repetitions}
    result["cases"] = {}
    with tempfile.TemporaryDirectory(prefix="gemtune-plan-") as name:
        for case in options.cases:
            row = measure(CASES[case], options.repetitions, Path(name))
            result["cases"][case] = row
            print(
                f"{case}: {row['seconds']['median']:.0f} s, {row['planner_gib']:.2f} GiB; "
                f"planned {row['planned_gib']:.1f} GiB in {row['phase']}",
                flush=True,
            )
    if options.cases == list(CASES):
        print(f"wrote {write_result('plan_times', result).relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
