"""A model of two layers that is trained, saved and restored in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemtune.checkpoint import (
    CheckpointConfig,
    CheckpointFolder,
    CheckpointWriter,
    Ranks,
    TrainState,
    base_identity,
    restore,
)

CONFIG = {"run": {"resume": "auto"}, "optim": {"lr": 0.1}}


@dataclass(frozen=True)
class OneOfMany(Ranks):
    """One rank, and what the others report at each time that all meet, counted from 1."""

    others: dict[int, list[Any]] = field(default_factory=dict)
    met: list[int] = field(default_factory=lambda: [0])

    def collect(self, item: Any) -> list[Any]:
        self.met[0] += 1
        return [item, *self.others.get(self.met[0], [])]


def build(width: int = 5) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 2))
    model[0].bias.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trainable, lr=0.1, fused=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def writer_for(
    run_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    ranks: Ranks | None = None,
    **settings: Any,
) -> CheckpointWriter:
    state = TrainState("abc", step=step, nonfinite_steps=1, tokens_seen=7, first_eval_loss=2.5)
    return CheckpointWriter(
        ranks or Ranks(),
        CheckpointFolder(run_dir / "checkpoints"),
        CheckpointConfig(**{"keep_last": 2} | settings),
        model,
        optimizer,
        state,
        {"config": CONFIG, "base": base_identity(model)},
    )


def write(run_dir: Path, model: nn.Module, optimizer: Any, step: int, **options: Any) -> Path:
    writer = writer_for(run_dir, model, optimizer, step, **options)
    assert writer.save()["checkpoint/stall_seconds"] > 0
    return run_dir / "checkpoints" / f"step_{step:08d}"


def read(run_dir: Path, checkpoint: Path, model: nn.Module, optimizer: Any, **ranks: Any) -> Any:
    return restore(
        Ranks(**ranks), checkpoint, model, optimizer, run_dir=run_dir, base=base_identity(model)
    )
