"""One optimizer step of a model without values, with what it holds in each phase."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import Tensor, nn

from gemtune.parallel.gradients import clip_gradients
from gemtune.planning.storages import (
    GRADIENTS,
    INPUTS,
    OPTIMIZER_STATE,
    PARAMETERS,
    Peak,
    StorageFollower,
)


@dataclass(frozen=True)
class StepPlan:
    """What a step holds at most, phase by phase. Bytes on the device."""

    peaks: dict[str, Peak]
    """Of forward, loss, backward and optimizer."""
    parameters_bytes: int

    @property
    def phase(self) -> str:
        """The phase with the highest peak."""
        return max(self.peaks, key=lambda name: self.peaks[name].total_bytes)

    @property
    def peak(self) -> Peak:
        """The highest of all."""
        return self.peaks[self.phase]


def follow_step(
    follower: StorageFollower,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[dict[str, Tensor], dict[str, Any]]],
    *,
    loss_begins_after: nn.Module,
    max_grad_norm: float | None,
    autocast_dtype: torch.dtype | None = None,
    after_backward: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] = lambda phase: None,
) -> StepPlan:
    """A step as `gemtune.loop.step` makes it, past the first: the optimizer has its state.

    Args:
        follower: a `Shadow` for a model without values; with a plain one the step is real.
        batches: inputs, labels among them, and options of the forward, of each micro-batch.
        autocast_dtype: as accelerate does it, which widens what the model returns.
        loss_begins_after: the module whose return ends the forward phase.
        after_backward: called when all gradients are there.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    with follower:
        follower.add((*model.parameters(), *model.buffers()), PARAMETERS)
        parameters_bytes = follower.live_bytes
        _make_state(follower, optimizer, trained)
        with (
            follower.attributing(model),
            _gradients_known(follower, trained),
            _loss_begins(follower, loss_begins_after),
        ):
            _accumulate(follower, model, batches, autocast_dtype, progress)
            after_backward()
            # What no row of the run feeds, as a tower without media, never gets a state.
            unfed = [p for p in trained if p.grad is None]
            spared = follower.bytes_of(_state_of(optimizer, unfed))
            for parameter in unfed:
                optimizer.state.pop(parameter, None)
            with follower.phase("optimizer"):
                progress("optimizer")
                clip_gradients(model.parameters(), max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    peaks = {
        phase: peak if phase == "optimizer" else peak.without(spared, OPTIMIZER_STATE)
        for phase, peak in follower.peaks().items()
    }
    return StepPlan(peaks, parameters_bytes)


def _accumulate(
    follower: StorageFollower,
    model: nn.Module,
    batches: Sequence[tuple[dict[str, Tensor], dict[str, Any]]],
    autocast_dtype: torch.dtype | None,
    progress: Callable[[str], None],
) -> None:
    autocast = torch.autocast("cpu", autocast_dtype) if autocast_dtype else None
    for inputs, options in batches:
        with follower.phase("forward"):
            progress("forward")
            follower.add(inputs.values(), INPUTS)
            with autocast or contextlib.nullcontext():
                output = model(**inputs, **options)
            if autocast:
                output = convert_to_fp32(output)
            loss = output.loss.double()
            follower.enter("backward")
            progress("backward")
            loss.backward()
            del output, loss


def _make_state(
    follower: StorageFollower, optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter]
) -> None:
    """The state that a first step leaves behind."""
    with torch.no_grad():
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    # A step that changes nothing, were the weights real ones.
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    follower.add(_state_of(optimizer, trained), OPTIMIZER_STATE)


def _state_of(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
) -> Iterator[Tensor]:
    for parameter in parameters:
        yield from (v for v in optimizer.state[parameter].values() if isinstance(v, Tensor))


@contextlib.contextmanager
def _gradients_known(follower: StorageFollower, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Count under gradients what has become one."""
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: follower.add([p.grad], GRADIENTS))
        for p in trained
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _loss_begins(follower: StorageFollower, module: nn.Module) -> Iterator[None]:
    def enter(*_: object) -> None:
        if follower.current_phase == "forward":
            follower.enter("loss")

    handle = module.register_forward_hook(enter)
    try:
        yield
    finally:
        handle.remove()
