"""Muon for the matrices between hidden states, AdamW for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from gemtune.errors import ConfigError
from gemtune.optim.adamw import AdamW
from gemtune.optim.combined import CombinedOptimizer
from gemtune.optim.groups import find_trained, group, require_parts
from gemtune.options import option


@dataclass
class Muon(AdamW):
    """Muon (Jordan 2024) for matrices, scaled as in arXiv:2502.16982; AdamW for the rest.

    With that scale an update has the size that AdamW's has, so that `lr`, `part_lrs` and
    `weight_decay` are for both. The rest is what is not one matrix between hidden states: norms,
    embeddings, the head, what turns pixels into hidden states, convolutions, experts (stacks of
    matrices, gate and up in one), and factors of adapters (their product is the update, not they).
    """

    momentum: float = option(0.95, "decay of Muon's moment of matrices (Nesterov)")

    name: ClassVar[str] = "Muon for matrices, AdamW for the rest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optim.momentum={self.momentum} must be in [0, 1).")

    def assemble(self, model: nn.Module) -> torch.optim.Optimizer:
        """Both as one optimizer.

        Raises:
            ConfigError: nothing is trained, nothing of a part that has a rate, or no matrix.
        """
        trained = find_trained(model)
        require_parts(trained, self.part_lrs)
        settings: dict[str, Any] = {"part_lrs": self.part_lrs, "weight_decay": self.weight_decay}
        matrices = [each for each in trained if each.is_hidden_matrix]
        if not matrices:
            raise ConfigError(
                "optim=muon: no matrix between hidden states is trained. Factors of adapters, "
                "experts, embeddings and norms are stepped by AdamW: use optim=adamw."
            )
        optimizers: list[torch.optim.Optimizer] = [
            ShardedMuon(
                group(matrices, lr=self.lr, **settings),
                lr=self.lr,
                momentum=self.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        ]
        if rest := [each for each in trained if not each.is_hidden_matrix]:
            optimizers.append(self.adamw(group(rest, lr=self.lr, **settings)))
        return CombinedOptimizer(optimizers)


class ShardedMuon(torch.optim.Muon):
    """torch's Muon, for matrices that FSDP2 has sharded as well.

    A share gets the update that the whole matrix would get. Its moment stays sharded; one matrix at
    a time is gathered and orthogonalised by every rank. torch's own (2.13) runs the iteration on
    shares, with two collectives for each of its five turns, and fails where a rank has none.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of the matrices that have a gradient; a collective for those sharded."""
        held_back: list[tuple[dict[str, Any], nn.Parameter, Tensor]] = []
        for each in self.param_groups:
            for parameter in each["params"]:
                if isinstance(parameter, DTensor) and parameter.grad is not None:
                    held_back.append((each, parameter, parameter.grad))
                    parameter.grad = None
        loss = super().step(closure)
        for each, parameter, gradient in held_back:
            parameter.grad = gradient
            self._step_share(each, parameter, gradient)
        return loss

    def _step_share(
        self, settings: dict[str, Any], parameter: nn.Parameter, gradient: Tensor
    ) -> None:
        """As `torch.optim._muon._single_tensor_muon`, with the matrix whole in its middle."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        moment = state["momentum_buffer"].lerp_(gradient, 1 - settings["momentum"])
        update = gradient.lerp(moment, settings["momentum"])
        assert isinstance(update, DTensor)
        whole = _zeropower_via_newtonschulz(
            update.full_tensor(),
            settings["ns_coefficients"],
            settings["ns_steps"],
            settings["eps"],
        )
        # Every rank has it: nothing is sent.
        share = distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)
        rate = _adjust_lr(settings["lr"], settings["adjust_lr_fn"], parameter.shape)
        parameter.mul_(1 - settings["lr"] * settings["weight_decay"])
        parameter.add_(share, alpha=-rate)
