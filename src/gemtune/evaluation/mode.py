"""An evaluation in the middle of training leaves no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gemtune.checkpoint.rng import rng_state, set_rng_state


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Afterwards all random number generators of this process (Python, NumPy, torch) go on where
    they were, whatever was drawn within."""
    numbers = rng_state()
    try:
        yield
    finally:
        set_rng_state(numbers)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode; afterwards each module is in the mode it was in,
    and the random numbers are those that would have come."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with same_random_numbers():
            yield
    finally:
        for module, training in modes:
            module.training = training
