"""The stream of batches of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from gemtune.data.collate import Batch
from gemtune.data.dataset import ChatDataset
from gemtune.data.order import micro_batches
from gemtune.data.streaming import StreamedDataset
from gemtune.errors import DataError
from gemtune.signals import leave_to_parent


@dataclass
class BatchStream:
    """The micro-batches of every optimizer step, for one rank."""

    dataset: ChatDataset | StreamedDataset
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    num_workers: int = 0
    shuffle: bool = True
    pin_memory: bool = False

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
        return _raising(iter(loader))

    def rows_of(self, step: int) -> list[list[int]]:
        """Dataset indices of this rank's micro-batches at a step (from 0)."""
        return micro_batches(
            step,
            num_samples=len(self.dataset),
            seed=self.seed,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            shuffle=self.shuffle,
        )


@dataclass
class _Steps(Dataset):
    stream: BatchStream

    def __getitem__(self, step: int) -> list[Batch] | DataError:
        dataset = self.stream.dataset
        try:
            return [dataset.batch([dataset[i] for i in rows]) for rows in self.stream.rows_of(step)]
        except DataError as error:
            # Handed over, not raised: PyTorch would put a worker's traceback into its message.
            return error


def _raising(steps: Iterator[list[Batch] | DataError]) -> Iterator[list[Batch]]:
    """The steps; an error among them is raised."""
    error = None
    for batches in steps:
        if isinstance(batches, DataError):
            error = batches
            break
        yield batches
    # Ends the workers here. The traceback would keep them until a garbage collection, which may
    # close their queues first; each is then waited for in vain, 5 seconds long.
    del steps
    if error is not None:
        raise error
