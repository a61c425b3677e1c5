"""A model, its batch, and what one step over them takes; with patches and without."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from models import batch, build
from saved_bytes import saved_for_backward
from settings import Settings
from torch import Tensor, nn

from gemtune.errors import PatchError
from gemtune.memory import PeakTracker
from gemtune.models.recomputation import recompute
from gemtune.patches import apply

# Relative error that each dtype is allowed, in the loss and in the sampled gradients, beside twice
# that of the model without patches.
ALLOWED = {"float32": (1e-5, 1e-3), "bfloat16": (2e-3, 2e-2)}
SAMPLES = 256  # numbers of each gradient that are compared


class Outcome(NamedTuple):
    """What a step computed: the loss, and numbers from every gradient."""

    loss: float
    gradients: dict[str, Tensor]


class Workbench:
    """The model, its batch, and steps over it."""

    def __init__(self, settings: Settings) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.device = torch.device(settings.device)
        self.model = build(settings, self.device, getattr(torch, settings.dtype))
        self.inputs = batch(self.model, settings, self.device)

    def forward(self) -> Tensor:
        return self.model(**self.inputs, use_cache=False).loss

    def step(self) -> Tensor:
        """Forward and backward; the loss."""
        loss = self.forward()
        loss.backward()
        return loss.detach()

    def tidy(self) -> None:
        """No gradients, and no memory of a step before."""
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def patched(self, name: str, patches: Sequence[str]) -> Iterator[None]:
        """The model with these patches, and afterwards without them."""
        self.tidy()
        if not patches:
            yield
            return self.tidy()
        try:
            report = apply(self.model, patches)
        except PatchError as error:
            raise PatchError(f"contestant '{name}': {error}") from error
        try:
            yield
        finally:
            self.model.zero_grad(set_to_none=True)
            report.undo()
        return self.tidy()

    def saved_bytes(self) -> tuple[int, Outcome]:
        """Kept for the backward pass, nothing recomputed; and what the step computed."""
        outcomes = []

        def release(loss: Tensor) -> None:
            outcomes.append(Outcome(float(loss), self.sampled_gradients()))
            self.model.zero_grad(set_to_none=True)

        if self.settings.checkpointing:
            self.model.gradient_checkpointing_disable()
        num_bytes = saved_for_backward(self.forward, release)
        if self.settings.checkpointing:
            recompute(self.model)
        return num_bytes, outcomes[0]

    def reference(self) -> Outcome:
        """What the model computes without patches in float32, from the weights as they are.

        Recomputed layer by layer, so that it fits where a bfloat16 step fits.
        """
        dtype = next(self.model.parameters()).dtype
        inputs = self.inputs
        self.cast(torch.float32)
        self.inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        if not self.settings.checkpointing:
            recompute(self.model)
        loss = self.step()
        found = Outcome(float(loss), self.sampled_gradients())
        if not self.settings.checkpointing:
            self.model.gradient_checkpointing_disable()
        self.tidy()
        self.inputs = inputs
        self.cast(dtype)
        return found

    def cast(self, dtype: torch.dtype) -> None:
        """Parameters only: buffers such as the RoPE frequencies are float32 in every model."""
        self.model.zero_grad(set_to_none=True)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)

    def sampled_gradients(self) -> dict[str, Tensor]:
        return sampled_gradients(self.model)

    def peak_mib(self) -> float | None:
        """Of one step: on CUDA what tensors hold, on the CPU what of the process is resident."""
        self.tidy()
        tracker = PeakTracker(self.device)
        tracker.enter("forward")
        self.step()
        peak = tracker.finish()["forward"]
        self.tidy()
        return None if math.isnan(peak) else round(peak * 1024, 1)


def sampled_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name -> up to `SAMPLES` numbers of the gradient, at even distances."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            numbers = parameter.grad.reshape(-1)
            found[name] = numbers[:: -(-len(numbers) // SAMPLES)].double().cpu()
    return found


def errors(outcome: Outcome, reference: Outcome) -> tuple[float, float]:
    """Relative: of the loss, and of the sampled gradients taken as one vector."""
    loss_error = abs(outcome.loss - reference.loss) / abs(reference.loss)
    if outcome.gradients.keys() != reference.gradients.keys():
        return loss_error, math.inf
    squares = [
        ((outcome.gradients[name] - expected).square().sum(), expected.square().sum())
        for name, expected in reference.gradients.items()
    ]
    above, below = (math.fsum(map(float, column)) for column in zip(*squares, strict=True))
    return loss_error, math.sqrt(above / below)


def bounds(dtype: str, without_patches: tuple[float, float]) -> tuple[float, float]:
    """The largest errors of a contestant: rounding elsewhere may add up to as much again.

    In bfloat16 a single other rounding grows through the layers to the noise of the whole model,
    0.1 to 0.2 of the gradients' norm in the tiny one. What counts is the distance from float32.
    """
    loss, gradients = (
        allowed + 2 * error for allowed, error in zip(ALLOWED[dtype], without_patches, strict=True)
    )
    return loss, gradients


def refuse_wrong(name: str, found: tuple[float, float], largest: tuple[float, float]) -> None:
    """A price is worth nothing where the result is another one.

    Raises:
        PatchError: an error above its bound, or one that is not a number.
    """
    if not (found[0] <= largest[0] and found[1] <= largest[1]):
        raise PatchError(
            f"contestant '{name}' does not compute what the model computes in float32 without "
            f"patches: relative error {found[0]:.1e} of the loss (bound {largest[0]:.1e}), "
            f"{found[1]:.1e} of the gradients (bound {largest[1]:.1e}). Nothing was written."
        )
