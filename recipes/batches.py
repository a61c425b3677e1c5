"""What a recipe trains on and is judged by, for one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from gemtune.data import Batch, BatchStream, ChatDataset, StreamedDataset
from gemtune.evaluation import rounds_of_rank
from gemtune.losses import HostLabels
from gemtune.models import StandIns
from gemtune.patches.ple_offload import prefetch
from gemtune.runtime import Runtime

if TYPE_CHECKING:  # it needs OmegaConf, which nothing here does
    from gemtune.config import RunConfig


def batch_stream(
    config: RunConfig, runtime: Runtime, rows: ChatDataset | StreamedDataset
) -> BatchStream:
    """This rank's micro-batches of every step."""
    return BatchStream(
        rows,
        seed=config.run.seed,
        global_batch_size=config.loop.global_batch_size,
        micro_batch_size=config.loop.micro_batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        num_workers=config.data.num_workers,
        shuffle=config.data.shuffle,
        pin_memory=runtime.device.type == "cuda",
        lengths=rows.lengths,
        packed_tokens=config.data.max_length if config.data.packing else None,
        bucket_rows=config.data.bucket_rows,
    )


def evaluation_batches(config: RunConfig, runtime: Runtime, rows: ChatDataset) -> Iterator[Batch]:
    """This rank's share of the evaluation rows."""
    size = config.loop.eval_micro_batch_size
    for numbers, count in rounds_of_rank(runtime, len(rows), size):
        batch = rows.batch([rows[i] for i in numbers])
        yield batch if count else replace(batch, num_supervised_tokens=0)


def looking_ahead(
    config: RunConfig, base: nn.Module, *, loss_alone: bool
) -> Callable[[Batch], dict[str, Any]]:
    """What is done with a batch while it is on the CPU, and passed to the model for it."""

    def look_ahead(batch: Batch) -> dict[str, Any]:
        if "ple_offload" in config.patches:
            prefetch(base, batch.inputs["input_ids"])
        # Labels that stay on the CPU are counted there: the GPU is not waited for.
        return {"host_labels": HostLabels(batch.labels)} if loss_alone else {}

    return look_ahead


def stand_in(
    trained: set[str],
    runtime: Runtime,
    base: nn.Module,
    train_rows: ChatDataset | StreamedDataset,
    eval_rows: ChatDataset,
) -> Callable[[], None]:
    """A batch of text alone gives the towers no gradient, a batch of another rank may: from now on
    each runs in every forward. Returns what is to be done after the backward passes of a step."""
    in_data = train_rows.media_kinds | eval_rows.media_kinds
    kinds = {"audio"} & trained
    if "vision" in trained:
        kinds |= in_data & {"image", "video"} or {"image"}
    stand_ins = StandIns(base, kinds, without_autograd=runtime.is_sharded)
    always = train_rows.media_in_every_row
    return lambda: stand_ins.forget_unfed(runtime.on_any, always)
