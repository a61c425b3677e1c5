"""How far the planned peak memory of a step is from the measured one, on the CPU.

    python benchmarks/memory_plan.py                          # about 20 minutes
    python benchmarks/memory_plan.py --cases tiny_full --repetitions 1        # a trial
    python benchmarks/memory_plan.py --gate                   # part of `make bench`, 3 minutes
    python benchmarks/memory_plan.py --device cuda            # memory_plan_cuda.py: real sizes

With `--gate` nothing is written: it ends with 1 where a planned or measured peak of some of the
cases is more than 3% above what is committed.

Each case is planned in one process and made in another: model, patches, adapter and optimizer as a
run has them, two steps on the largest batch, of which the second counts. Measured is the kernel's
resident peak (VmHWM, reset before each phase) over what was resident before the model was built,
with glibc told to give freed memory back at once, and all memory locked (mlockall: a process with
CAP_IPC_LOCK, or `ulimit -l unlimited`). It holds what a plan of tensors does not: the
scratch of kernels, and code that is read when it is first used. Writes
benchmarks/results/memory_plan.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import REPOSITORY, RESULTS, describe, typed_command, write_result

sys.path[:0] = [str(REPOSITORY / "scripts"), str(REPOSITORY)]

MIB = 2**20
BOUND, BOUND_MIB = 0.05, 64
GATE = 0.03
GATE_CASES = ("tiny_full", "tiny_images", "small_full", "small_lora")
SMALL = ("loop.micro_batch_size=4", "loop.global_batch_size=4")
PAIR = ("loop.micro_batch_size=2", "loop.global_batch_size=2")
# Name -> size, overrides, keys of the plan.
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "tiny_full": ("tiny", ("data.max_length=1024", *SMALL), {}),
    "tiny_images": ("tiny", ("data.max_length=1024", *SMALL), {"images_per_row": 2}),
    "tiny_stock": ("tiny", ("data.max_length=1024", "patches=[]", *SMALL), {}),
    "small_full": ("e2b_small", ("data.max_length=512", *PAIR), {}),
    "small_images": (
        "e2b_small",
        ("data.max_length=512", *PAIR, "model.freeze=[vision]"),
        {"images_per_row": 1, "learned_fraction": 0.2},
    ),
    "small_recomputed": (
        "e2b_small",
        (
            "data.max_length=1024",
            *PAIR,
            "model.gradient_checkpointing=true",
            "model.freeze=[ple,vision]",
        ),
        {"learned_fraction": 0.5},
    ),
    "small_lora": (
        "e2b_small",
        ("recipe=gemma4_lora", "data.max_length=1024", "model.dtype=float32", *PAIR),
        {"learned_fraction": 0.2},
    ),
    "small_stock": (
        "e2b_small",
        ("data.max_length=256", "patches=[]", *PAIR),
        {},
    ),
}


def arguments_of(case: str, folder: Path) -> list[str]:
    """What train.py would get; the small model lies in `folder`."""
    size, overrides, _ = CASES[case]
    if size == "tiny":
        return ["model.weights=random", *overrides]
    return [f"model.path={folder}", "model.weights=random", *overrides]


def write_model(folder: Path) -> None:
    """A folder with the shape of the small E2B and the tokenizer of the tiny one."""
    from models import TINY, shape
    from transformers import Gemma4Config

    shutil.copytree(TINY.parent, folder)
    values = Gemma4Config.from_dict(shape("e2b_small")).to_dict()
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def plan(case: str, folder: Path) -> dict[str, Any]:
    """Phase -> planned peak in MiB; seconds that it took."""
    from command_line import compose

    from gemtune.planning import PlanConfig, plan_memory

    started = time.perf_counter()
    settings = PlanConfig(device="cpu", **CASES[case][2])
    planned = plan_memory(compose(arguments_of(case, folder)), settings)
    return {
        "mib": {name: peak.total_bytes / MIB for name, peak in planned.step.peaks.items()},
        "seconds": time.perf_counter() - started,
        "num_parameters": planned.num_parameters,
        "batch": planned.batch,
    }


def run(case: str, folder: Path) -> dict[str, Any]:
    """Phase -> measured peak in MiB."""
    import torch
    from command_line import compose

    from gemtune import adapters, patches
    from gemtune.memory import PHASES, PeakTracker
    from gemtune.models import base_model, load_model, load_processing
    from gemtune.parallel.gradients import clip_gradients
    from gemtune.planning import PlanConfig
    from gemtune.planning.memory_plan import largest_inputs

    config = compose(arguments_of(case, folder))
    settings = PlanConfig(device="cpu", **CASES[case][2])
    processing = load_processing(config.model)
    lock_memory()
    before = resident_bytes()
    base = load_model(config.model, processing, config.run.seed)
    patches.apply(base, config.patches)
    model = adapters.attach(base, config.adapter)
    optimizer = config.optim.build(model)
    _, inputs = largest_inputs(
        config, settings, processing, lambda s, dtype: torch.rand(s, dtype=dtype)
    )
    memory = PeakTracker(torch.device("cpu"))
    memory.begin_loss_after(base_model(base))
    for _ in range(2):
        for batch, options in inputs:
            memory.enter("forward")
            loss = model(**batch, **options).loss.double()
            memory.enter("backward")
            loss.backward()
            del loss
        memory.enter("optimizer")
        clip_gradients(model.parameters(), config.loop.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        peaks = memory.finish()
        ctypes.CDLL(None).malloc_trim(0)
    return {"mib": {phase: peaks[phase] * 1024 - before / MIB for phase in PHASES}}


def lock_memory() -> None:
    """What is allocated is resident at once and stays (mlockall(2)).

    The kernel has no pages for zeros that nobody wrote, and may take back those that hold nothing
    else: most of an embedding's gradient and of its optimizer state.
    """
    everything_now_and_later = 1 | 2
    if ctypes.CDLL(None, use_errno=True).mlockall(everything_now_and_later):
        raise SystemExit(
            f"mlockall: {os.strerror(ctypes.get_errno())}. Allow it: ulimit -l unlimited, or root"
        )


def resident_bytes() -> int:
    """Of this process, now."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def in_process(what: str, case: str, folder: Path, threads: int) -> dict[str, Any]:
    """What `plan` or `run` returns in a process of its own."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, __file__, "--part", what, "--cases", case, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str, folder: Path, repetitions: int, threads: int) -> dict[str, Any]:
    """A row of the result."""
    planned = in_process("plan", case, folder, threads)
    measured = [in_process("run", case, folder, threads)["mib"] for _ in range(repetitions)]
    phase = max(planned["mib"], key=planned["mib"].get)
    peaks = [max(each.values()) for each in measured]
    peak, found = planned["mib"][phase], statistics.median(peaks)
    row = {
        "size": CASES[case][0],
        "overrides": list(CASES[case][1]),
        "batch": planned["batch"],
        "num_parameters": planned["num_parameters"],
        "plan_seconds": round(planned["seconds"], 1),
        "planned_mib": peak,
        "phase": phase,
        "measured_mib": {"median": found, "min": min(peaks), "max": max(peaks)},
        "phases": {
            name: [mib, statistics.median(each[name] for each in measured)]
            for name, mib in planned["mib"].items()
        },
        "error_mib": peak - found,
        "error": peak / found - 1,
    }
    row["within"] = abs(row["error"]) <= BOUND or abs(row["error_mib"]) <= BOUND_MIB
    print(
        f"{case}: planned {peak:,.0f} MiB in {planned['seconds']:.0f} s, "
        f"measured {found:,.0f} MiB, error {row['error']:+.1%} ({row['error_mib']:+.0f} MiB)",
        flush=True,
    )
    return row


def gate(committed: dict[str, Any]) -> int:
    """1 where a peak has risen by more than `GATE`, else 0; a line for each case.

    Planned peaks are the same on every machine. Measured ones differ by what malloc keeps: the
    lowest of two processes is compared with the highest that is committed.
    """
    threads, failed = committed["settings"]["threads"], 0
    with tempfile.TemporaryDirectory(prefix="gemtune-plan-") as name:
        folder = Path(name) / "e2b_small"
        write_model(folder)
        for case in GATE_CASES:
            row = measure(case, folder, 2, threads)
            failed += sum(print_rise(*each) for each in rises(case, row, committed["cases"][case]))
    return int(failed > 0)


def rises(case: str, now: dict[str, Any], before: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What is compared, in MiB: (name, now, committed)."""
    return [
        (f"{case} planned", now["planned_mib"], before["planned_mib"]),
        (f"{case} measured", now["measured_mib"]["min"], before["measured_mib"]["max"]),
    ]


def print_rise(name: str, now: float, before: float) -> bool:
    """Print one comparison; whether it has risen too much."""
    too_much = now > before * (1 + GATE)
    verdict = f"FAILED: more than {GATE:.0%} above" if too_much else "within"
    print(f"{name}: {now:,.0f} MiB, {verdict} the committed {before:,.0f} MiB", flush=True)
    return too_much


def main() -> None:
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="its own cases")
    if place.parse_known_args()[0].device == "cuda":
        # Not before: what measures its children on the CPU must stay small.
        import memory_plan_cuda

        return memory_plan_cuda.main(sys.argv[1:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], parents=[place])
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gate", action="store_true", help="compare with what is committed")
    parser.add_argument("--part", choices=("plan", "run"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part = {"plan": plan, "run": run}[options.part]
        return print(json.dumps(part(options.cases[0], options.folder)))
    if options.gate:
        sys.exit(gate(json.loads((RESULTS / "memory_plan.json").read_text(encoding="utf-8"))))
    result = describe(typed_command(__file__))
    result["settings"] = {"threads": options.threads, "repetitions": options.repetitions}
    result["bound"] = {"fraction": BOUND, "mib": BOUND_MIB}
    with tempfile.TemporaryDirectory(prefix="gemtune-plan-") as name:
        folder = Path(name) / "e2b_small"
        write_model(folder)
        result["cases"] = {
            case: measure(case, folder, options.repetitions, options.threads)
            for case in options.cases
        }
    if options.cases == list(CASES):
        print(f"wrote {write_result('memory_plan', result).relative_to(REPOSITORY)}")
    return None


if __name__ == "__main__":
    main()
