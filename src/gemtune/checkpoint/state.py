"""What a checkpoint holds, and writing and reading it.

Tensors are in safetensors, everything else in JSON: reading a checkpoint runs no code. Only what
training changes is written: frozen parameters come from the base model.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
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
    no_space_message,
)
from gemtune.checkpoint.rng import rng_state, set_rng_state
from gemtune.errors import CheckpointError
from gemtune.runtime import Runtime

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

    Every rank calls it after the same step. If any rank fails, every rank raises CheckpointError
    and the earlier checkpoints stay as they were.
    """
    folder = CheckpointFolder(runtime.run_dir / "checkpoints")
    failure: str | None = None
    try:
        if runtime.is_main:
            folder.begin(state.step)
    except OSError as error:
        failure = str(error)
    _raise_together(runtime, failure, folder)

    staging = folder.staging_path(state.step)
    try:
        (staging / _rng_file(runtime.rank)).write_text(json.dumps(rng_state()))
        if runtime.is_main:
            _write_tensors(staging, runtime.unwrap(model), optimizer)
            document = {"format": FORMAT_VERSION, "state": asdict(state), "config": config}
            (staging / STATE_FILE).write_text(json.dumps(document, indent=1))
    except (OSError, SafetensorError, CheckpointError) as error:
        failure = str(error)
        if "No space left" in failure:
            failure = no_space_message(folder.path, _state_bytes(model, optimizer))
    _raise_together(runtime, failure, folder)
    if runtime.is_main:
        folder.commit(state.step)
        folder.prune(settings.keep_last)
    runtime.wait_for_everyone()
    return folder.final_path(state.step)


def restore(
    runtime: Runtime,
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> TrainState:
    """Put parameters, optimizer and random numbers back, and return the counters.

    Raises:
        CheckpointError: unreadable, or written by a model with other trainable parameters.
    """
    document = read_document(checkpoint)
    unwrapped = runtime.unwrap(model)
    trainable = {n: p for n, p in unwrapped.named_parameters() if p.requires_grad}
    tensors = _read_tensors(checkpoint / _MODEL_FILE)
    if tensors.keys() != trainable.keys():
        missing = sorted(trainable.keys() - tensors.keys())
        extra = sorted(tensors.keys() - trainable.keys())
        raise CheckpointError(
            f"{checkpoint} was written by a model with other trainable parameters: "
            f"{len(missing)} of this model's are not in it {missing[:3]}, {len(extra)} of its own "
            f"are not in this model {extra[:3]}. Resume with the configuration that wrote it."
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            if parameter.shape != tensors[name].shape:
                raise CheckpointError(
                    f"{checkpoint}: {name} has shape {tuple(tensors[name].shape)}, this model's "
                    f"has {tuple(parameter.shape)}."
                )
            parameter.copy_(tensors[name])
    for key, value in _read_tensors(checkpoint / _OPTIMIZER_FILE).items():
        name, _, slot = key.rpartition("|")
        parameter = trainable[name]
        optimizer.state[parameter][slot] = value.to(parameter.device)
    rng_path = checkpoint / _rng_file(runtime.rank)
    if rng_path.is_file():
        set_rng_state(json.loads(rng_path.read_text()))
    # Else: more ranks than when it was written. They keep their own seed, and only dropout
    # depends on it.
    return TrainState(**document["state"])


def read_document(checkpoint: Path) -> dict[str, Any]:
    """`state.json`: the format, the counters, and the configuration that wrote it."""
    try:
        document = json.loads((checkpoint / STATE_FILE).read_text())
        version = document["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE} cannot be read: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint} has format {version}; this gemtune reads format {FORMAT_VERSION}."
        )
    return document


def _write_tensors(staging: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    check_space(staging, _state_bytes(model, optimizer))
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
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    tensors = [p for p in model.parameters() if p.requires_grad]
    tensors += [v for slots in optimizer.state.values() for v in slots.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def _rng_file(rank: int) -> str:
    return f"rng_rank{rank}.json"


def _raise_together(runtime: Runtime, failure: str | None, folder: CheckpointFolder) -> None:
    """Barrier that turns a failure of one rank into an error on all of them."""
    failures = [text for text in runtime.collect([failure]) if text]
    if failures:
        newest = folder.newest()
        kept = f"The previous checkpoint is untouched: {newest}" if newest else "There is none yet."
        raise CheckpointError(f"The checkpoint could not be written: {failures[0]}\n{kept}")
