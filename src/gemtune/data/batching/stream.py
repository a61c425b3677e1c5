"""The stream of batches of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gemtune.data.batching.bucketing import PaddedOrder
from gemtune.data.batching.collate import Batch
from gemtune.data.batching.handover import Parcel
from gemtune.data.batching.order import share_of_rank
from gemtune.data.batching.packing import PackedOrder
from gemtune.data.dataset import ChatDataset
from gemtune.data.streaming import StreamedDataset
from gemtune.errors import ConfigError, DataError
from gemtune.forks import garbage_stays_here
from gemtune.signals import leave_to_parent


@dataclass
class BatchStream:
    """The micro-batches of every optimizer step, for one rank.

    Which rows make a step depends on the data, `seed`, `global_batch_size` and how rows are put
    together, and not on the number of ranks, the size of a micro-batch, the number of loader
    processes, or anything that ran before.

    Args:
        lengths: [N] tokens of each row of the data set, where they are known.
        packed_tokens: rows of the data set are packed into rows of so many tokens, and
            `global_batch_size` and `micro_batch_size` count those; None: every row is padded.
        bucket_rows: rows that are sorted by length together, see `PaddedOrder`.

    Raises:
        ConfigError: packing where lengths are not known, or where a row is longer than one.
    """

    dataset: ChatDataset | StreamedDataset
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    num_workers: int = 0
    shuffle: bool = True
    pin_memory: bool = False
    lengths: np.ndarray | None = None
    packed_tokens: int | None = None
    bucket_rows: int | None = None
    order: PaddedOrder | PackedOrder = field(init=False)

    def __post_init__(self) -> None:
        if self.packed_tokens is None:
            self.order = PaddedOrder(
                len(self.dataset),
                self.lengths,
                self.seed,
                self.global_batch_size,
                self.bucket_rows,
                self.shuffle,
            )
            return
        if self.lengths is None:
            raise ConfigError(
                "Rows whose lengths are not known before the first step cannot be packed: leave "
                "out data.packing=true or data.streaming=true."
            )
        self.order = PackedOrder(
            self.lengths, self.packed_tokens, self.seed, self.global_batch_size, self.shuffle
        )

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, packed ones where rows are packed."""
        return self.order.num_rows

    @property
    def packing(self) -> str | None:
        """How full packed rows are, for a line; None where rows are padded."""
        if not isinstance(self.order, PackedOrder):
            return None
        return (
            f"packed into {self.num_rows:,} rows of up to {self.packed_tokens:,} tokens, "
            f"{self.order.fill:.1%} full; an optimizer step has {self.global_batch_size} of these"
        )

    def __call__(self, first_step: int, num_steps: int) -> Iterator[list[Batch]]:
        """Steps first_step .. num_steps - 1. Depends on nothing that ran before."""
        loader = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=range(first_step, num_steps),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=leave_to_parent,
            # The loader draws a seed for its workers; from its own generator, so that the model's
            # random numbers are the same with and without workers.
            generator=torch.Generator(),
        )
        with garbage_stays_here() if self.num_workers else nullcontext():
            steps = iter(loader)  # starts the processes
        return _raising(steps)

    def rows_of(self, step: int) -> list[list[int]] | list[list[tuple[int, ...]]]:
        """This rank's micro-batches at a step (from 0): rows of the data set, or packed ones."""
        return share_of_rank(
            self.order.step_rows(step),
            micro_batch_size=self.micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
        )

    def batch(self, rows: list[int] | list[tuple[int, ...]]) -> Batch:
        """One micro-batch, images decoded."""
        if self.packed_tokens is None:
            return self.dataset.batch([self.dataset[i] for i in rows])
        return self.dataset.packed_batch([[self.dataset[i] for i in row] for row in rows])


@dataclass
class _Steps(Dataset):
    stream: BatchStream

    def __getitem__(self, step: int) -> list[Batch] | Parcel | DataError:
        try:
            batches = [self.stream.batch(rows) for rows in self.stream.rows_of(step)]
            return Parcel.pack(batches) if self.stream.num_workers else batches
        except DataError as error:
            # Handed over, not raised: PyTorch would put a worker's traceback into its message.
            return error


def _raising(steps: Iterator[list[Batch] | Parcel | DataError]) -> Iterator[list[Batch]]:
    """The batches of the steps; an error among them is raised."""
    error = None
    for batches in steps:
        if isinstance(batches, DataError):
            error = batches
            break
        yield batches.unpack() if isinstance(batches, Parcel) else batches
    # Ends the workers here. The traceback would keep them until a garbage collection, which may
    # close their queues first; each is then waited for in vain, 5 seconds long.
    del steps
    if error is not None:
        raise error
