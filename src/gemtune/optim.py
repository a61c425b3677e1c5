"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from gemtune.errors import ConfigError
from gemtune.options import option, require_choice, require_range


@dataclass
class AdamW:
    """AdamW (arXiv:1711.05101); matrices decay, vectors and embedding tables do not."""

    lr: float = option(2e-5, "peak learning rate")
    weight_decay: float = option(0.0, "decoupled decay of matrices")
    beta1: float = option(0.9, "decay of the first moment")
    beta2: float = option(0.95, "decay of the second moment")
    eps: float = option(1e-8, "added to the root of the second moment")

    def __post_init__(self) -> None:
        require_range("optim.lr", self.lr, above=0)
        require_range("optim.weight_decay", self.weight_decay, at_least=0)
        require_range("optim.eps", self.eps, above=0)
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"optim.{key}={getattr(self, key)} must be in [0, 1).")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """An optimizer over the trainable parameters, the fused kernel where the device has one."""
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        matrices, rest = [], []
        for parameter in model.parameters():
            if parameter.requires_grad:
                decays = parameter.dim() >= 2 and id(parameter) not in tables
                (matrices if decays else rest).append(parameter)
        if not matrices and not rest:
            raise ConfigError(
                "No parameter is left to train: model.freeze and adapter leave nothing. "
                "Free a part, or choose adapter=lora."
            )
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )


@dataclass
class Schedule:
    """Linear warm-up, then cosine, linear or constant."""

    name: str = option("cosine", "cosine, linear or constant")
    warmup_steps: int = option(0, "steps of linear warm-up")
    min_ratio: float = option(0.1, "final learning rate over the peak")

    def __post_init__(self) -> None:
        require_choice("schedule.name", self.name, ["cosine", "linear", "constant"])
        require_range("schedule.warmup_steps", self.warmup_steps, at_least=0)
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"schedule.min_ratio={self.min_ratio} must be in [0, 1].")

    def ratio(self, step: int, max_steps: int) -> float:
        """Learning rate over its peak at a step, counted from 0. A pure function: no state."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.name == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        if self.name == "linear":
            shape = 1 - progress
        else:
            shape = 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_ratio + (1 - self.min_ratio) * max(0.0, shape)
