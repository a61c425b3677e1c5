"""What a checkpoint holds, and writing and reading it.

Tensors are in safetensors, everything else in JSON: reading a checkpoint runs no code. Only what
training changes is written: frozen parameters come from the base model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from gemtune.checkpoint.config import CheckpointConfig
from gemtune.checkpoint.folder import (
    STATE_FILE,
    CheckpointFolder,
    check_space,
    is_no_space,
    no_space_message,
)
from gemtune.checkpoint.rng import rng_state, set_rng_state
from gemtune.errors import CheckpointError
from gemtune.runtime import Runtime
from gemtune.tracking import new_run_id

FORMAT_VERSION = 1

_MODEL_FILE = "model.safetensors"
_OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass
class TrainState:
    """Counters of a run; everything else of its position follows from `step`."""

    run_id: str
    step: int = 0
    """Optimizer steps done."""
    nonfinite_steps: int = 0
    spike_steps: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """Of applied steps, the oldest first: what the spike guard compares with."""
    tokens_seen: int = 0
    first_eval_loss: float | None = None
    """Loss of the starting model on the evaluation rows."""


def save(
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    config: dict[str, Any],
    settings: CheckpointConfig,
) -> Path:
    """Write one checkpoint, make it visible by one rename, then delete those past `keep_last`.

    Every rank calls it after the same step. If any rank fails, every rank raises CheckpointError,
    nothing of the new checkpoint is left, and the earlier ones stay as they were.
    """
    folder = CheckpointFolder(runtime.run_dir / "checkpoints")
    staging = folder.staging_path(state.step)
    document = {
        "format": FORMAT_VERSION,
        "world_size": runtime.world_size,
        "state": asdict(state),
        "config": config,
    }

    def begin() -> None:
        if runtime.is_main:
            folder.begin(state.step)
            check_space(staging, _state_bytes(model, optimizer))

    def write() -> None:
        (staging / _rng_file(runtime.rank)).write_text(json.dumps(rng_state()))
        if runtime.is_main:
            _write_tensors(staging, runtime.unwrap(model), optimizer)
            (staging / STATE_FILE).write_text(json.dumps(document, indent=1))

    def commit() -> None:
        if runtime.is_main:
            folder.commit(state.step)

    try:
        for action in (begin, write, commit):
            _on_all_ranks(runtime, action)
    except CheckpointError as error:
        if runtime.is_main:
            folder.abandon(state.step)
        newest = folder.newest()
        kept = f"The previous checkpoint is untouched: {newest}" if newest else "There is none yet."
        reason = str(error)
        if is_no_space(error):
            reason = no_space_message(folder.path, _state_bytes(model, optimizer))
        raise CheckpointError(f"The checkpoint could not be written: {reason}\n{kept}") from error
    _on_all_ranks(runtime, lambda: folder.prune(settings.keep_last) if runtime.is_main else None)
    return folder.final_path(state.step)


def restore(
    runtime: Runtime,
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> TrainState:
    """Put parameters, optimizer and random numbers back, and return the counters.

    A checkpoint of another run starts a run of its own: with a new `run_id`.

    Raises:
        CheckpointError: unreadable, or written by a model with other trainable parameters. Nothing
            was changed.
    """
    document = read_document(checkpoint)
    unwrapped = runtime.unwrap(model)
    trainable = {n: p for n, p in unwrapped.named_parameters() if p.requires_grad}
    tensors = _read_tensors(checkpoint / _MODEL_FILE)
    slots = _read_tensors(checkpoint / _OPTIMIZER_FILE)
    _check_fit(checkpoint, tensors, trainable)
    random_numbers = _read_rng(checkpoint, runtime.rank, document["world_size"])

    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[name])
    for key, value in slots.items():
        name, _, slot = key.rpartition("|")
        parameter = trainable[name]
        optimizer.state[parameter][slot] = value.to(parameter.device)
    if random_numbers is not None:
        set_rng_state(random_numbers)
    state = TrainState(**document["state"])
    if runtime.run_dir.resolve() not in checkpoint.resolve().parents:
        state.run_id = new_run_id()
    return state


def read_document(checkpoint: Path) -> dict[str, Any]:
    """`state.json`: the format, the counters, and the configuration that wrote it."""
    path = checkpoint / STATE_FILE
    try:
        document = json.loads(path.read_text())
        version = document["format"]
        if version == FORMAT_VERSION:
            TrainState(**document["state"])
            int(document["world_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint} has format {version}; this gemtune reads format {FORMAT_VERSION}."
        )
    return document


def _write_tensors(staging: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    save_file(
        {n: p.detach().contiguous() for n, p in parameters.items()}, str(staging / _MODEL_FILE)
    )
    slots = {
        f"{name}|{slot}": value.contiguous()
        for name, parameter in parameters.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(slots, str(staging / _OPTIMIZER_FILE))


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _read_rng(checkpoint: Path, rank: int, world_size: int) -> dict[str, Any] | None:
    """None for a rank that there was none of when the checkpoint was written.

    Such a rank keeps its own seed; only dropout depends on it.
    """
    if rank >= world_size:
        return None
    path = checkpoint / _rng_file(rank)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read: {error!r}. If the folder is damaged, delete {path.parent}: the "
        "run then goes on from the checkpoint before it."
    )


def _check_fit(
    checkpoint: Path, tensors: dict[str, torch.Tensor], trainable: dict[str, nn.Parameter]
) -> None:
    if tensors.keys() != trainable.keys():
        missing = sorted(trainable.keys() - tensors.keys())
        extra = sorted(tensors.keys() - trainable.keys())
        raise CheckpointError(
            f"{checkpoint} was written by a model with other trainable parameters: "
            f"{len(missing)} of this model's are not in it {missing[:3]}, {len(extra)} of its own "
            f"are not in this model {extra[:3]}. Resume with the configuration that wrote it."
        )
    for name, parameter in trainable.items():
        there, here = _kind(tensors[name]), _kind(parameter)
        if there != here:
            raise CheckpointError(
                f"{checkpoint}: {name} is {there} in it, but {here} in this model. Resume with the "
                "configuration that wrote it."
            )


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    tensors = [p for p in model.parameters() if p.requires_grad]
    tensors += [v for slots in optimizer.state.values() for v in slots.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def _rng_file(rank: int) -> str:
    return f"rng_rank{rank}.json"


def _on_all_ranks(runtime: Runtime, action: Callable[[], object]) -> None:
    """Run `action` on every rank and wait for all; if it failed on one, raise on every one.

    Whatever the failure: an exception on one rank alone would leave the others waiting for it.
    """
    failure: Exception | None = None
    try:
        action()
    except Exception as error:
        failure = error
    text = None if failure is None else str(failure) or repr(failure)
    for failed in runtime.collect([text]):
        if failed:
            raise CheckpointError(failed) from failure
