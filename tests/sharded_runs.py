"""Whole runs on several ranks of one process group."""

from __future__ import annotations

import importlib.resources
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from sharded_reading import sent_by_the_first
from torch.distributed.tensor import DTensor
from whole_runs import train_in_process

import recipes.gemma4_sft as recipe

# See test_gradients.py: Adam's usual eps makes rounding errors visible.
COMMON = (
    "optim.eps=0.01",
    "optim.lr=1e-3",
    "loop.global_batch_size=6",
    "loop.micro_batch_size=2",
    "loop.eval_micro_batch_size=3",
    "data.eval_max_rows=7",  # more forwards on some ranks than on others
    "data.eval_generate_rows=7",
    "data.max_rows=48",
)


@dataclass(frozen=True)
class Case:
    """A run by its overrides."""

    overrides: tuple[str, ...]
    goes_on_from: str | None = None
    """Another run, of which all but the oldest checkpoint is taken away first."""
    is_sent: bool = False
    """Whether rank 0 reads the checkpoint of the model and sends it."""


def trains(rank: int, cases: dict[str, Case], folder: str) -> None:
    """The worker: a run for each case. Leaves the shards of what it trained beside the run."""
    conclude = recipe.conclude

    def conclude_and_keep(config: Any, stages: Any, session: Any, *rest: Any) -> None:
        shards = {
            name: p.to_local().clone() if isinstance(p, DTensor) else p.detach().clone()
            for name, p in session.model.named_parameters()
            if p.requires_grad
        }
        torch.save(shards, config.run.folder / f"shards{rank}.pt")
        conclude(config, stages, session, *rest)

    for name, case in cases.items():
        run_dir = Path(folder) / name
        if case.goes_on_from is not None and rank == 0:
            shutil.copytree(Path(folder) / case.goes_on_from, run_dir)
            _, *later = sorted((run_dir / "run" / "checkpoints").glob("step_*"))
            for gone in (*later, run_dir / "run" / "model"):
                shutil.rmtree(gone)
        dist.barrier()
        weights = sent_by_the_first() if case.is_sent else nullcontext()
        with mock.patch.object(recipe, "conclude", conclude_and_keep), weights:
            train_in_process(*COMMON, *case.overrides, run_dir=run_dir)


def mostly_text(path: Path) -> Path:
    """The bundled digits with the images of seven rows in eight taken out, as a Parquet file."""
    source = importlib.resources.files("gemtune") / "assets" / "digits" / "train.parquet"
    table = pq.read_table(str(source)).slice(0, 48)
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        if number % 8:
            row["images"] = []
            for message in row["messages"]:
                message["content"] = [c for c in message["content"] if c["type"] != "image"]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), str(path))
    return path
