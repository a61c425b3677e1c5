"""Writing a checkpoint: in the training's way, or beside it."""

from __future__ import annotations

import copy
import json
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from gemtune.checkpoint.config import CheckpointConfig
from gemtune.checkpoint.disk import check_space, is_no_space, no_space_message, write_synced
from gemtune.checkpoint.folder import STATE_FILE, CheckpointFolder
from gemtune.checkpoint.manifest import Entries, entries_of, write_manifest
from gemtune.checkpoint.ranks import Ranks
from gemtune.checkpoint.rng import rng_state
from gemtune.checkpoint.state import TrainState, state_document
from gemtune.checkpoint.tensors import INDEX_FILE, missing_pieces, save_tensors
from gemtune.errors import CheckpointError

MODEL, OPTIMIZER = "model", "optimizer"


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint of this rank will hold; nothing in it changes any more."""

    state: TrainState
    tensors: dict[str, torch.Tensor]
    random_numbers: str
    needed_bytes: int


class CheckpointWriter:
    """Writes checkpoints of one run. Every rank has one, and makes the same calls.

    A checkpoint becomes visible as a whole or not at all. If any rank fails, every rank raises
    CheckpointError with the reason, nothing of the new checkpoint is left, and the earlier ones
    stay as they were. Older ones are deleted only after the new one is committed.

    With `async_save`, `save` returns once the state is copied to host memory, and a thread writes
    it. At most one is written at a time: the next `save` waits. A failure shows in `has_failed`,
    and is raised by the next `save` or `settle`.
    """

    def __init__(
        self,
        ranks: Ranks,
        folder: CheckpointFolder,
        settings: CheckpointConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        facts: dict[str, Any],
    ) -> None:
        """`model` is the unwrapped one. `facts` goes into state.json; `config` must be in it."""
        self._ranks, self._folder, self._settings = ranks, folder, settings
        self._model, self._optimizer, self._state = model, optimizer, state
        self._facts = facts
        self._stager: DefaultStager | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has failed, and nobody was told yet."""
        return self._failure is not None

    def save(self) -> dict[str, float]:
        """Write a checkpoint of the current step, or begin to.

        Returns `checkpoint/stall_seconds`: how long the training waited for it.
        """
        started = time.perf_counter()
        self.settle()
        snapshot = self._snapshot()
        if self._settings.async_save:
            self._thread = threading.Thread(
                target=self._write_in_background, args=(snapshot,), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._write(snapshot)
        return {"checkpoint/stall_seconds": time.perf_counter() - started}

    def settle(self) -> None:
        """Wait until nothing is being written; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _snapshot(self) -> Snapshot:
        tensors = named_tensors(self._model, self._optimizer)
        local = sum(_num_bytes(t.to_local()) for t in tensors.values() if isinstance(t, DTensor))
        shared = sum(_num_bytes(t) for t in tensors.values() if not isinstance(t, DTensor))
        if self._settings.async_save:
            if self._stager is None:
                on_cuda = any(t.is_cuda for t in tensors.values())
                options = StagingOptions(
                    use_pinned_memory=on_cuda,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=on_cuda,
                )
                self._stager = DefaultStager(options)
            tensors = self._stager.stage(tensors)
        return Snapshot(
            state=copy.deepcopy(self._state),
            tensors=tensors,
            random_numbers=json.dumps(rng_state()),
            needed_bytes=sum(self._ranks.collect(local)) + shared,
        )

    def _write_in_background(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:
            self._failure = error

    def _write(self, snapshot: Snapshot) -> None:
        ranks, folder, step = self._ranks, self._folder, snapshot.state.step
        try:
            ranks.all_or_none(lambda: self._begin(snapshot))
            ranks.all_or_none(lambda: self._write_sidecars(snapshot))
            staging = folder.staging_path(step)
            ranks.all_or_none(lambda: save_tensors(staging, snapshot.tensors, ranks.group))
            entries = ranks.collect(ranks.all_or_none(lambda: self._entries(step)))
            ranks.all_or_none(lambda: self._commit(snapshot, entries))
        except CheckpointError as error:
            if ranks.is_main:
                folder.abandon(step)
            raise self._explained(error, snapshot) from error
        keep_last, state = self._settings.keep_last, snapshot.state
        ranks.all_or_none(
            lambda: (
                folder.prune(keep_last, state.best_metric, state.best_mode)
                if ranks.is_main
                else None
            )
        )

    def _begin(self, snapshot: Snapshot) -> None:
        if self._ranks.is_main:
            self._folder.begin(snapshot.state.step)
            check_space(self._folder.path, snapshot.needed_bytes)

    def _write_sidecars(self, snapshot: Snapshot) -> None:
        staging = self._folder.staging_path(snapshot.state.step)
        write_synced(staging / rng_file(self._ranks.rank), snapshot.random_numbers)
        if self._ranks.is_main:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            document = state_document(snapshot.state, self._ranks.world_size, self._facts, now)
            write_synced(staging / STATE_FILE, json.dumps(document, indent=1) + "\n")

    def _entries(self, step: int) -> Entries:
        """Of the files that this rank wrote: each reads its own, which are near it."""
        staging, rank = self._folder.staging_path(step), self._ranks.rank
        mine = [staging / rng_file(rank), *staging.glob(f"__{rank}_*")]
        if self._ranks.is_main:
            mine += [staging / STATE_FILE, staging / INDEX_FILE]
        return entries_of(mine)

    def _commit(self, snapshot: Snapshot, entries: list[Entries]) -> None:
        if not self._ranks.is_main:
            return
        staging = self._folder.staging_path(snapshot.state.step)
        if missing := missing_pieces(staging, snapshot.tensors):
            raise OSError(f"{len(missing)} tensors are not whole on disk, such as {missing[0]}")
        files = {name: entry for some in entries for name, entry in some.items()}
        if unknown := {file.name for file in staging.iterdir()} ^ files.keys():
            raise OSError(f"files that are not those that were written: {sorted(unknown)}")
        write_manifest(staging, files)
        self._folder.commit(snapshot.state.step)

    def _explained(self, error: CheckpointError, snapshot: Snapshot) -> CheckpointError:
        newest = self._folder.newest()
        kept = f"The previous checkpoint is untouched: {newest}" if newest else "There is none yet."
        reason = str(error)
        if is_no_space(error):
            reason = no_space_message(self._folder.path, snapshot.needed_bytes)
        return CheckpointError(f"The checkpoint could not be written: {reason}\n{kept}")


def named_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What a checkpoint holds: `model|NAME` of trained parameters, `optimizer|NAME|SLOT` of theirs.

    Frozen parameters come from the base model.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"{MODEL}|{name}"] = parameter.detach()
            for slot, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{OPTIMIZER}|{name}|{slot}"] = value
    return tensors


def rng_file(rank: int) -> str:
    return f"rng_rank{rank}.json"


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
