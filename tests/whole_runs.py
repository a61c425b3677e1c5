"""Whole runs inside the test process, small enough to take a second or two."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from gemtune.checkpoint.tensors import read_tensors
from gemtune.composition import with_unchecked_keys
from gemtune.config import RunConfig, find_recipe, typed
from gemtune.reporting import Reporter
from gemtune.signals import STOP_SIGNALS

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "configs"

SMALL = (
    "tracker=none",
    "optim.lr=3e-3",
    "schedule.warmup_steps=0",
    "loop.max_steps=4",
    "loop.global_batch_size=8",
    "loop.micro_batch_size=4",
    "loop.eval_micro_batch_size=8",
    "data.max_rows=48",
    "data.eval_max_rows=8",
    "data.eval_generate_rows=4",
    "data.eval_max_new_tokens=3",
    "memory.plan=false",
)
"""Overrides that make a run small; those of a test come after them."""


def compose(*overrides: str) -> RunConfig:
    """The configuration that `train.py` would make of these arguments."""
    arguments = with_unchecked_keys(list(overrides))
    if (CONFIGS / "local").is_dir():
        arguments.append("local=absent")  # hides the developer's own configs/local/default.yaml
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return typed(hydra.compose("train", arguments))


@dataclass
class RunFolder:
    """A run folder and how its last start ended."""

    path: Path
    status: int

    def metrics(self) -> list[dict[str, Any]]:
        """The objects of metrics.jsonl."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def losses(self) -> dict[int, float]:
        """Step -> train/loss."""
        return {m["step"]: m["train/loss"] for m in self.metrics() if "train/loss" in m}

    def checkpoints(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step_*"))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> parameter of the newest checkpoint."""
        tensors = read_tensors(self.checkpoints()[-1])
        prefix = "model|"
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    def training_state(self) -> dict[str, bytes]:
        """Of the newest checkpoint: parameters, optimizer and random numbers, as bytes."""
        newest = self.checkpoints()[-1]
        state = {file.name: file.read_bytes() for file in newest.glob("rng_rank*.json")}
        for name, tensor in read_tensors(newest).items():
            state[name] = tensor.flatten().view(torch.uint8).numpy().tobytes()
        return state


TrainRun = Callable[..., RunFolder]


@pytest.fixture
def train_run(tmp_path: Path) -> Iterator[TrainRun]:
    """`train_run(*overrides, run_dir=FOLDER)` trains in this process, into run_dir/run."""
    handlers = taken_signals()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the same order on every machine, and fast beside others

    def run(*overrides: str, run_dir: Path = tmp_path / "runs") -> RunFolder:
        return train_in_process(*overrides, run_dir=run_dir)

    yield run
    torch.set_num_threads(threads)
    give_back(handlers)


def train_in_process(*overrides: str, run_dir: Path) -> RunFolder:
    """As the fixture, for fixtures that live longer than a test."""
    config = compose("run.name=run", f"run.dir={run_dir}", *SMALL, *overrides)
    # accelerate keeps its state in the classes.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with pytest.MonkeyPatch.context() as patched:
        # On the CPU wherever the tests run: these compare bits.
        patched.setattr(torch.cuda, "is_available", lambda: False)
        status = find_recipe(config)(config)
    return RunFolder(config.run.folder, status)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A small run that is done. Shared: tests must not change it."""
    handlers = taken_signals()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = train_in_process("checkpoint.every_steps=2", run_dir=tmp_path_factory.mktemp("finished"))
    torch.set_num_threads(threads)
    give_back(handlers)
    return run


def press_ctrl_c_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send a real SIGINT once `step` is recorded: the loop sees it in the next step."""
    original = Reporter.training

    def training(self: Reporter, record: dict) -> None:
        original(self, record)
        if self._state.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Reporter, "training", training)


def taken_signals() -> dict[signal.Signals, Any]:
    """The handlers that a run takes over."""
    return {number: signal.getsignal(number) for number in STOP_SIGNALS}


def give_back(handlers: dict[signal.Signals, Any]) -> None:
    """Put them back."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_checkpoint(finished_run: RunFolder) -> Path:
    """A model folder as a run exports it: for `model.path=FOLDER model.weights=pretrained`."""
    return finished_run.path / "model"
