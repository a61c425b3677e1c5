"""AdamW, and the keys that every optimizer has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gemtune.errors import ConfigError
from gemtune.models.parts import PARTS
from gemtune.optim.groups import find_trained, group, require_parts
from gemtune.optim.offloaded import offloaded
from gemtune.options import option, require_choice, require_range


@dataclass
class AdamW:
    """AdamW (arXiv:1711.05101); matrices decay, vectors and embedding tables do not."""

    lr: float = option(2e-5, "peak learning rate")
    part_lrs: dict[str, float] = option(
        {},
        "part -> its own peak learning rate, on the same schedule: optim.part_lrs.vision=1e-5 "
        f"(parts: {', '.join(PARTS)})",
    )
    weight_decay: float = option(0.0, "decoupled decay of matrices; not of norms and embeddings")
    beta1: float = option(0.9, "decay of the first moment")
    beta2: float = option(0.95, "decay of the second moment")
    eps: float = option(1e-8, "added to the root of the second moment")
    offload_state: bool = option(
        False, "keep the state in host memory; a step copies it to the GPU and back, group by group"
    )
    offload_group_mib: int = option(
        512, "state of a group, or of one parameter; two groups are on the GPU in a step"
    )

    name: ClassVar[str] = "AdamW"
    whole_only: ClassVar[str] = ""
    """Why it cannot step shares of parameters (FSDP2); empty where it can."""

    def __post_init__(self) -> None:
        require_range("optim.lr", self.lr, above=0)
        require_range("optim.weight_decay", self.weight_decay, at_least=0)
        require_range("optim.eps", self.eps, above=0)
        for part, rate in self.part_lrs.items():
            require_choice("optim.part_lrs", part, PARTS)
            require_range(f"optim.part_lrs.{part}", rate, above=0)
        require_range("optim.offload_group_mib", self.offload_group_mib, at_least=1)
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"optim.{key}={getattr(self, key)} must be in [0, 1).")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """An optimizer over the trainable parameters, its state where `offload_state` says.

        Raises:
            ConfigError: nothing is trained, or nothing of a part that has a rate; the state cannot
                be offloaded.
        """
        optimizer = self.assemble(model)
        if not self.offload_state:
            return optimizer
        return offloaded(
            optimizer,
            group_bytes=self.offload_group_mib * 2**20,
            state_bytes=self.moment_bytes,
        )

    def assemble(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer itself, with the fused kernel; its state lies beside the parameters.

        Raises:
            ConfigError: nothing is trained, or nothing of a part that has a rate.
        """
        return self.adamw(self.groups(model))

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """All trained parameters, by rate and decay."""
        trained = find_trained(model)
        require_parts(trained, self.part_lrs)
        return group(trained, lr=self.lr, part_lrs=self.part_lrs, weight_decay=self.weight_decay)

    def adamw(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        """torch's AdamW of these settings."""
        return torch.optim.AdamW(
            groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True
        )

    def moment_bytes(self, parameter: Tensor) -> int:
        """What a trained parameter has of state."""
        return 2 * parameter.numel() * parameter.element_size()

    def device_bytes(self, parameter: Tensor) -> int:
        """What of it lies on the device between steps."""
        return 0 if self.offload_state else self.moment_bytes(parameter)

    def describe(self) -> str:
        """Name, peak rates and where the state is, for people."""
        others = [f"{part} {rate:g}" for part, rate in self.part_lrs.items()]
        rates = f"{self.lr:g}" + f" ({', '.join(others)})" * bool(others)
        where = " with its state in host memory" * self.offload_state
        return f"{self.name}{where}, peak learning rate {rates}"
