"""Several optimizers, each over parameters of its own, behind the interface of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class CombinedOptimizer(torch.optim.Optimizer):
    """Groups and state are those of all; a step is a step of each.

    They share one state by parameter and their group dicts, so that whoever writes to either, a
    schedule or a checkpoint that is restored, writes to the optimizer that uses it.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        super().__init__([g for each in optimizers for g in each.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = 0
        for each in self._optimizers:
            last = first + len(each.param_groups)
            each.param_groups = self.param_groups[first:last]
            each.state = self.state
            first = last

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One step of each; the loss of the closure, which is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self._optimizers:
            each.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's: groups and state are other objects behind it, and shared again."""
        super().load_state_dict(state_dict)
        self._share()
