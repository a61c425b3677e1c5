"""Time contestants in turn, and one contestant's peak memory in a process of its own."""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from gemtune.memory import PeakTracker

MIB = 2**20


def time_in_turn(
    contestants: Mapping[str, Callable[[], object]],
    repetitions: int,
    between: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Name -> seconds of each round; every contestant once a round, after one untimed round.

    Each round begins with another contestant, so that none always runs behind the same one.
    `between` runs before each call, outside the time: it drops the gradients of the call before.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repetitions + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            between()
            start = time.perf_counter()
            contestants[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    between()
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(seconds: Mapping[str, list[float]], name: str, reference: str) -> list[float]:
    """Time of `name` over that of `reference`, round by round: what slows a round slows both."""
    return [a / b for a, b in zip(seconds[name], seconds[reference], strict=True)]


def peak_above_now_mib(work: Callable[[], object]) -> float:
    """Highest resident memory during `work`, above what is resident before it, in MiB.

    From VmHWM of the kernel, reset before. Call it in a process that did nothing else: memory that
    an allocator keeps from earlier work would be used again and not be seen. NaN off Linux.
    """
    tracker = PeakTracker(torch.device("cpu"))
    gc.collect()
    tracker.enter("forward")  # an empty phase: its peak is what is resident now
    before = tracker.finish()["forward"]
    tracker.enter("forward")
    work()
    return (tracker.finish()["forward"] - before) * 1024


def peak_in_new_process(script: str, *arguments: str) -> float | None:
    """What `script` prints as JSON {"peak_mib": ...} when it is started with these arguments.

    glibc is told to give back every block of 1 MiB and more when it is freed: what it keeps for
    later otherwise differs from start to start, by up to 80 MiB in these scripts.
    """
    done = subprocess.run(
        [sys.executable, str(Path(script)), *arguments],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{Path(script).name} {' '.join(arguments)} failed:\n{done.stderr}")
    peak = json.loads(done.stdout.splitlines()[-1])["peak_mib"]
    return None if peak is None else round(peak, 1)


def print_peak(work: Callable[[], object]) -> None:
    """The other end of `peak_in_new_process`."""
    peak = peak_above_now_mib(work)
    print(json.dumps({"peak_mib": None if math.isnan(peak) else peak}))
