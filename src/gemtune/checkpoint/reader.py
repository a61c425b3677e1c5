"""Going on from a checkpoint: the newest that verifies, put back to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemtune.checkpoint.folder import CheckpointFolder
from gemtune.checkpoint.identity import base_identity
from gemtune.checkpoint.manifest import problems_of, read_manifest, shares, verified_content
from gemtune.checkpoint.ranks import Ranks
from gemtune.checkpoint.rng import set_rng_state
from gemtune.checkpoint.state import TrainState, read_document
from gemtune.checkpoint.tensors import load_tensors, read_index
from gemtune.checkpoint.writer import MODEL, OPTIMIZER, rng_file
from gemtune.errors import CheckpointError
from gemtune.optim.offloaded import state_device
from gemtune.tracking import new_run_id


def first_undamaged(
    ranks: Ranks,
    candidates: Sequence[Path],
    own: CheckpointFolder,
    say: Callable[[str], None],
) -> Path | None:
    """The first of the candidates of which every byte is what was written; None without any.

    All ranks read, each its share. A damaged one is named and, if it is one of `own`, renamed, so
    that it is not found again.

    Raises:
        CheckpointError: all are damaged.
    """
    found: list[str] = []
    for checkpoint in candidates:
        problems = verify_together(ranks, checkpoint)
        if not problems:
            return checkpoint
        report = f"{checkpoint} is damaged: {'; '.join(problems[:3])}"
        if len(problems) > 3:
            report += f"; and {len(problems) - 3} more"
        if checkpoint.parent.resolve() == own.path.resolve():
            aside = ranks.on_main(lambda path=checkpoint: own.set_aside(path))
            report += f". It is kept as {aside.name}"
        found.append(report)
        say(report)
    if found:
        raise CheckpointError(
            "No undamaged checkpoint is left to go on from:\n"
            + "\n".join(f"  {report}" for report in found)
            + "\nGo on from another one with run.resume=PATH, or start anew with run.resume=never."
        )
    return None


def verify_together(ranks: Ranks, checkpoint: Path) -> list[str]:
    """`manifest.verify`, with the files shared between the ranks; the same answer on all."""

    def read() -> Any:
        try:
            return read_manifest(checkpoint)
        except ValueError as error:
            return str(error)

    entries = ranks.on_main(read)
    if isinstance(entries, str):
        return [entries]
    mine = shares(entries, ranks.world_size)[ranks.rank]
    found = ranks.collect(ranks.all_or_none(lambda: problems_of(checkpoint, entries, mine)))
    return [problem for some in found for problem in some]


def restore(
    ranks: Ranks,
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run_dir: Path,
    base: dict[str, str] | None,
) -> TrainState:
    """Put parameters, optimizer and random numbers back, and return the counters.

    `model` is the unwrapped one, laid out in any way on any number of ranks. A checkpoint of
    another run starts a run of its own: with a new `run_id`.

    Args:
        base: `identity.base_identity` of the model; None on ranks that do not hold it.

    Raises:
        CheckpointError: on all ranks: damaged, written by a model with other trainable parameters
            or on another base. Nothing was changed.
    """

    def read() -> tuple[dict[str, Any], dict[str, torch.Tensor], str | None]:
        document = read_document(checkpoint)
        _check_base(checkpoint, document.get("base"), base)
        wanted = _destinations(checkpoint, model, optimizer)
        return document, wanted, _read_rng(checkpoint, ranks.rank, document["world_size"])

    document, wanted, random_numbers = ranks.all_or_none(read)
    ranks.all_or_none(lambda: load_tensors(checkpoint, wanted, ranks.group))
    trainable = _trainable(model)
    for key, value in wanted.items():
        kind, name, *slot = key.split("|")
        if kind == OPTIMIZER:
            optimizer.state[trainable[name]][slot[0]] = value
    if random_numbers is not None:
        set_rng_state(json.loads(random_numbers))
    state = TrainState(**document["state"])
    if run_dir.resolve() not in checkpoint.resolve().parents:
        state.run_id = new_run_id()
        state.forget_best()  # of another run, perhaps on other rows
    return state


def restore_parameters(ranks: Ranks, checkpoint: Path, model: nn.Module) -> list[str]:
    """Put the trained parameters alone back as they were; returns what is damaged instead.

    For a checkpoint of this very run. Nothing is changed where something is damaged.

    Raises:
        CheckpointError: on all ranks, where it cannot be read.
    """
    if problems := verify_together(ranks, checkpoint):
        return problems
    wanted = {f"{MODEL}|{name}": p.detach() for name, p in _trainable(model).items()}
    ranks.all_or_none(lambda: load_tensors(checkpoint, wanted, ranks.group))
    return []


@torch.no_grad()
def load_parameters(checkpoint: Path, model: nn.Module) -> dict[str, Any]:
    """Put what was trained into `model`, which is whole in this process, and return `state.json`.

    Raises:
        CheckpointError: damaged, written by a model with other trainable parameters, or trained on
            another base. The caller has checked the hashes of its files.
    """
    document = read_document(checkpoint)
    _check_base(checkpoint, document.get("base"), base_identity(model))
    index = read_index(checkpoint).state_dict_metadata
    prefix = f"{MODEL}|"
    there = {k.removeprefix(prefix): v for k, v in index.items() if k.startswith(prefix)}
    trainable = _trainable(model)
    _check_fit(checkpoint, there, trainable)
    load_tensors(checkpoint, {f"{prefix}{n}": p.detach() for n, p in trainable.items()}, None)
    return document


def _destinations(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Where each tensor of the checkpoint goes: a parameter, or a new slot of the optimizer."""
    index = read_index(checkpoint).state_dict_metadata
    trainable = _trainable(model)
    there = {key.split("|")[1]: entry for key, entry in index.items() if key.startswith(MODEL)}
    _check_fit(checkpoint, there, trainable)
    wanted: dict[str, torch.Tensor] = {}
    for key, entry in index.items():
        kind, name, *_ = key.split("|")
        parameter = trainable[name]
        place: Any = {"dtype": entry.properties.dtype, "device": state_device(optimizer, parameter)}
        if kind == MODEL:
            wanted[key] = parameter.detach()
        elif entry.size == parameter.shape:
            wanted[key] = torch.zeros_like(parameter, requires_grad=False, **place)
        else:  # a counter, the same on all ranks
            wanted[key] = torch.zeros(entry.size, **place)
    return wanted


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _read_rng(checkpoint: Path, rank: int, world_size: int) -> str | None:
    """None for a rank that there was none of when the checkpoint was written.

    Such a rank keeps its own seed; only dropout depends on it.
    """
    if rank >= world_size:
        return None
    try:
        return verified_content(checkpoint, rng_file(rank)).decode()
    except ValueError as error:
        raise CheckpointError(f"{checkpoint / rng_file(rank)} cannot be read: {error}") from error


def _check_base(
    checkpoint: Path, there: dict[str, str] | None, here: dict[str, str] | None
) -> None:
    if there is None or here is None or there == here:
        return
    what = "configuration" if there["config"] != here["config"] else "frozen weights"
    raise CheckpointError(
        f"{checkpoint} was trained on another base: the {what} of the model that was loaded now "
        "differ from those it was trained on. Give that model (model.path, model.revision, "
        "model.audio_tower; base=PATH to export), or start anew with run.resume=never."
    )


def _check_fit(checkpoint: Path, there: dict[str, Any], trainable: dict[str, nn.Parameter]) -> None:
    if there.keys() != trainable.keys():
        missing = sorted(trainable.keys() - there.keys())
        extra = sorted(there.keys() - trainable.keys())
        raise CheckpointError(
            f"{checkpoint} was written by a model with other trainable parameters: "
            f"{len(missing)} of this model's are not in it {missing[:3]}, {len(extra)} of its own "
            f"are not in this model {extra[:3]}. Resume with the configuration that wrote it."
        )
    for name, parameter in trainable.items():
        entry = there[name]
        written = _kind(entry.properties.dtype, entry.size)
        wanted = _kind(parameter.dtype, parameter.shape)
        if written != wanted:
            raise CheckpointError(
                f"{checkpoint}: {name} is {written} in it, but {wanted} in this model. Resume with "
                "the configuration that wrote it."
            )


def _kind(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
