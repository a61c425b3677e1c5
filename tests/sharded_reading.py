"""Checkpoints that every rank reads a part of, and what the ranks hold then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from fake_hub import FakeHub
from torch.distributed.tensor import DTensor
from whole_runs import SMALL, compose

from gemtune import patches
from gemtune.checkpoint import base_identity
from gemtune.errors import ModelError
from gemtune.models import load_processing, stored
from gemtune.models.stored import StoredTensor
from gemtune.parallel import Strategy, construction
from gemtune.parallel.construction import build_base
from gemtune.patches.host_memory import host_parameters
from gemtune.runtime import Runtime, seed_everything, start

SEED = 7
GONE = "the disk of rank 1"
HUB_ID = "somebody/gemma-4"


@dataclass
class Meter:
    """In place of safetensors' `safe_open`: counts the bytes that come out of files."""

    num_bytes: int = 0
    largest: int = 0
    _open: Any = field(default=stored.safe_open, repr=False)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _Opened(self._open(*arguments, **options), self)

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        self.num_bytes, self.largest = self.num_bytes + size, max(self.largest, size)
        return tensor


@dataclass
class _Opened:
    file: Any
    meter: Meter

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def keys(self) -> Any:
        return self.file.keys()

    def get_tensor(self, key: str) -> torch.Tensor:
        return self.meter.count(self.file.get_tensor(key))

    def get_slice(self, key: str) -> Any:
        return _Slice(self.file.get_slice(key), self.meter)


@dataclass
class _Slice:
    inner: Any
    meter: Meter

    def get_shape(self) -> list[int]:
        return self.inner.get_shape()

    def __getitem__(self, places: Any) -> torch.Tensor:
        return self.meter.count(self.inner[places])


@contextmanager
def sent_by_the_first() -> Iterator[None]:
    """As before there was another way: rank 0 reads, and sends."""
    with mock.patch.object(construction, "load_in_parts", lambda *_: "so it is tested"):
        yield


def runtime_of(config: Any) -> Runtime:
    """Of these processes, for a sharded run."""
    # accelerate keeps its state in the classes.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        runtime = start(config.run, config.parallel)
    runtime.strategy = Strategy("fsdp2")
    return runtime


def bring_up(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Built and distributed as the recipe does it; what this rank holds, and what it has read."""
    config = compose(*SMALL, *overrides, "parallel=fsdp2")
    runtime = runtime_of(config)
    processing = load_processing(config.model)
    seed_everything(SEED)
    meter = Meter()
    with mock.patch.object(stored, "safe_open", meter):
        base = build_base(config, runtime, processing)
        report = patches.apply(base.model, config.patches)
        model = base.attach(config.adapter, runtime.device)
        of_hosts = meter.num_bytes
        identity = base_identity(model, base.stored if runtime.is_main else {})
        of_identity, meter.num_bytes, meter.largest = meter.num_bytes - of_hosts, 0, 0
        runtime.distribute(
            model, on_host=host_parameters(model), base=base.model, stored=base.stored
        )
    parameters = dict(model.named_parameters())
    return {
        "reading": base.reading,
        "patches": [row.status for row in report.rows],
        "identity": runtime.collect([identity])[0],
        "identity bytes": of_identity,
        "bytes": meter.num_bytes,
        "largest": meter.largest,
        "parameters": {name: _here(p).clone() for name, p in parameters.items()},
        "sharded": [name for name, p in parameters.items() if isinstance(p, DTensor)],
        "kinds": {name: (p.shape, p.dtype, p.requires_grad) for name, p in parameters.items()},
        "same object": [
            (a, b)
            for a, first in model.named_parameters(remove_duplicate=False)
            for b, second in model.named_parameters(remove_duplicate=False)
            if a < b and first is second
        ],
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "config": base.model.config.to_dict(),
        "generation": base.model.generation_config.to_dict(),
    }


def _here(parameter: torch.Tensor) -> torch.Tensor:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    assert not local.is_meta
    return local.detach()


def bring_up_both_ways(rank: int, cases: dict[str, tuple[str, ...]], folder: str) -> None:
    """The worker: each case read in parts, and sent by rank 0."""
    found = {}
    for name, overrides in cases.items():
        found[name] = {"parts": bring_up(overrides)}
        with sent_by_the_first():
            found[name]["sent"] = bring_up(overrides)
    torch.save(found, Path(folder) / f"rank{rank}.pt")


def bring_up_from_hub(rank: int, checkpoint: str, folder: str) -> None:
    """The worker: `checkpoint` under a name on a hub; leaves what this rank has downloaded."""
    with pytest.MonkeyPatch.context() as patched:
        hub = FakeHub(patched, Path(folder))
        hub.models[HUB_ID] = {file.name: file.read_bytes() for file in Path(checkpoint).iterdir()}
        found = bring_up((f"model.path={HUB_ID}", "model.weights=pretrained"))
        hub.close()
    found["downloaded"] = [
        path for method, path, _ in hub.asked if method == "GET" and path.endswith(".safetensors")
    ]
    torch.save(found, Path(folder) / f"rank{rank}.pt")


def fail(rank: int, cases: dict[str, tuple[tuple[str, ...], ...]], folder: str) -> None:
    """The worker: what is said on this rank, by name, of cases that have overrides for each."""
    found = {}
    for name, overrides in cases.items():
        gone = name == GONE and rank == 1
        with mock.patch.object(StoredTensor, "rows", _gone if gone else StoredTensor.rows):
            try:
                found[name] = f"no error: {bring_up(overrides[rank])['reading']}"
            except ModelError as error:
                found[name] = f"error: {error}"
    torch.save(found, Path(folder) / f"rank{rank}.pt")


def _gone(self: StoredTensor, start: int, stop: int) -> torch.Tensor:
    raise OSError("the disk has gone")
