"""How long a training waits for a checkpoint, and until it is safe on disk.

    python benchmarks/checkpoint_saves.py                     # about 3 minutes, 6 GB of disk
    python benchmarks/checkpoint_saves.py --layers 2 --repetitions 1     # a trial

Every contestant saves the same parameters and the same AdamW state from one process. `copy` is the
lower bound of a save beside the training: one copy of that state in host memory. Writes
benchmarks/results/checkpoint_saves.json; the ratios in it are taken within a round, in which every
contestant runs once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from measure import MIB, add_arguments, begin, finish, ratios, spread
from torch import nn

from gemtune.checkpoint import (
    CheckpointConfig,
    CheckpointFolder,
    CheckpointWriter,
    Ranks,
    TrainState,
)

Save = Callable[[Path], Callable[[], object]]
"""Saves into a new folder, or begins to; what it returns waits for the end."""

CONTESTANTS: dict[str, tuple[None, str]] = {
    "copy": (None, "one copy in host memory (lower bound)"),
    "gemtune": (None, "gemtune: SHA-256 of every file, fsync, one rename, marker"),
    "gemtune_async": (None, "gemtune with checkpoint.async_save: the same beside the training"),
    "accelerate": (None, "accelerate's save_state: no hash, no fsync, no rename"),
    "dcp": (None, "torch's dcp.save: fsync, no hash"),
    "dcp_async": (None, "torch's dcp.async_save: fsync, no hash"),
}


def make_state(layers: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Linear layers [1024, 4096], trained for one step so that AdamW has its moments."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4096, 1024, bias=False) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def contestants(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Save]:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, optimizer)

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}

    def copy(folder: Path) -> Callable[[], object]:
        held = [p.detach().clone() for p in model.parameters()]
        held += [v.clone() for slots in optimizer.state.values() for v in slots.values()]
        return held.clear

    writers: dict[bool, CheckpointWriter] = {}

    def gemtune(folder: Path, async_save: bool = False) -> Callable[[], object]:
        # One writer for all its saves, as in a run: what it keeps from the first is used again.
        if async_save not in writers:
            settings = CheckpointConfig(async_save=async_save)
            made_with = (model, optimizer, TrainState("abc"), {"config": {}})
            place = CheckpointFolder(folder)
            writers[async_save] = CheckpointWriter(Ranks(), place, settings, *made_with)
        writer = writers[async_save]
        writer._folder = CheckpointFolder(folder)
        writer.save()
        return writer.settle

    def save_state(folder: Path) -> Callable[[], object]:
        accelerator.save_state(str(folder))
        return lambda: None

    def dcp_save(folder: Path) -> Callable[[], object]:
        dcp.save(state(), checkpoint_id=folder)
        return lambda: None

    def dcp_async(folder: Path) -> Callable[[], object]:
        return dcp.async_save(state(), checkpoint_id=folder).result

    return {
        "copy": copy,
        "gemtune": gemtune,
        "gemtune_async": lambda folder: gemtune(folder, True),
        "accelerate": save_state,
        "dcp": dcp_save,
        "dcp_async": dcp_async,
    }


def measure(
    runs: dict[str, Save], repetitions: int, parent: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, int]]:
    """Name -> seconds of waiting, seconds to the end, bytes on disk; after one untimed round."""
    names = list(runs)
    stalls: dict[str, list[float]] = {name: [] for name in names}
    totals: dict[str, list[float]] = {name: [] for name in names}
    sizes: dict[str, int] = {}
    for turn in range(repetitions + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            folder = parent / name
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                wait = runs[name](folder)
                stall = time.perf_counter() - start
                wait()
            total = time.perf_counter() - start
            if turn:
                stalls[name].append(stall)
                totals[name].append(total)
            sizes[name] = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            shutil.rmtree(folder, ignore_errors=True)
    return stalls, totals, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=24, help="of 4.2 M parameters each")
    parser.add_argument("--folder", help="where to; default: a folder of its own in $TMPDIR")
    add_arguments(parser, CONTESTANTS, repetitions=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*torch.distributed.*|.*async_save.*")
    model, optimizer = make_state(options.layers)
    result = begin(__file__, options, ("layers",), CONTESTANTS)
    result["settings"] |= {"parameters": sum(p.numel() for p in model.parameters())}
    result["accelerate"] = version("accelerate")
    with tempfile.TemporaryDirectory(prefix="gemtune-saves-", dir=options.folder) as parent:
        # dcp.async_save asks for a process group.
        store = dist.FileStore(f"{parent}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        runs = contestants(model, optimizer)
        stalls, totals, sizes = measure(runs, options.repetitions, Path(parent))
        dist.destroy_process_group()
    rows = result["rows"] = {}
    for name in runs:
        rows[name] = {
            "stall_seconds": spread(stalls[name]),
            "stall_ratio_to_copy": spread(ratios(stalls, name, "copy")),
            "total_seconds": spread(totals[name]),
            "total_ratio_to_gemtune": spread(ratios(totals, name, "gemtune")),
            "mib": round(sizes[name] / MIB, 1),
        }
        print(
            f"{name:14} waits {rows[name]['stall_seconds']['median']:.2f} s, done after "
            f"{rows[name]['total_seconds']['median']:.2f} s, {rows[name]['mib']:,.0f} MiB"
        )
    finish("checkpoint_saves", result)


if __name__ == "__main__":
    main()
