"""Time contestants in turn, and one contestant's peak memory in a process of its own."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import REPOSITORY, describe, typed_command, write_result

from gemtune.memory import PeakTracker

MIB = 2**20


def add_arguments(
    parser: argparse.ArgumentParser, contestants: Mapping[str, Any], repetitions: int
) -> None:
    """What every comparison takes besides its sizes."""
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=repetitions)
    # One contestant's peak, for the process that this script starts for it.
    parser.add_argument("--peak-of", choices=list(contestants), help=argparse.SUPPRESS)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """What a comparison takes that runs on a GPU as well."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", help="the JSON file without .json, from benchmarks/results")


def parse_for_device(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """The options; results are called `name`, and on a GPU `name`_cuda."""
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: received cuda, but torch sees no CUDA device here; use cpu")
    if options.output is None:
        options.output = name + ("_cuda" if options.device == "cuda" else "")
    return options


def begin(
    script: str, options: argparse.Namespace, sizes: Sequence[str], contestants: Mapping[str, Any]
) -> dict[str, Any]:
    """The head of a result: what it was measured on, the sizes, the name of each contestant."""
    named = (*sizes, "threads", "repetitions")
    return describe(typed_command(script)) | {
        "settings": {name: getattr(options, name) for name in named} | {"dtype": "float32"},
        "contestants": {name: text for name, (_, text) in contestants.items()},
    }


def finish(name: str, result: Mapping[str, Any]) -> None:
    """Write the result."""
    path = write_result(name, dict(result))
    print(f"wrote {path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path}")


def compare(
    script: str,
    runs: Mapping[str, Callable[[], object]],
    options: argparse.Namespace,
    sizes: Sequence[str],
    between: Callable[[], object],
) -> dict[str, Any]:
    """Name -> seconds, ratio to the lookup, peak; with one line printed for each."""
    seconds = time_in_turn(runs, options.repetitions, between)
    named = (*sizes, "threads")
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in named]
    rows: dict[str, Any] = {}
    for name in runs:
        row = rows[name] = {
            "seconds": spread(seconds[name]),
            "ratio_to_lookup": spread(ratios(seconds, name, "lookup")),
            "peak_mib": peak_in_new_process(script, *arguments, "--peak-of", name),
        }
        low, middle, high = (row["seconds"][key] * 1e3 for key in ("min", "median", "max"))
        print(
            f"{name:8} {middle:8.0f} ms ({low:.0f}-{high:.0f}), "
            f"{row['ratio_to_lookup']['median']:.1f} times the lookup, peak {row['peak_mib']} MiB",
            flush=True,
        )
    return rows


def time_in_turn(
    contestants: Mapping[str, Callable[[], object]],
    repetitions: int,
    between: Callable[[], object] = lambda: None,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Name -> seconds of each round; every contestant once a round, after one untimed round.

    Each round begins with another contestant, so that none always runs behind the same one.
    `between` runs before each call, outside the time: it drops the gradients of the call before.
    `wait` returns when a device that works behind the caller is done. `clock` gives seconds: with
    `time.process_time` those that this process had a processor.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repetitions + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            between()
            wait()
            start = clock()
            contestants[name]()
            wait()
            if turn:
                seconds[name].append(clock() - start)
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


def peak_on_cuda_mib(work: Callable[[], object]) -> float:
    """Most that tensors hold on the GPU during `work`, above what they hold before it, in MiB."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)


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
