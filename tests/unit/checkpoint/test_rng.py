from __future__ import annotations

import json
import random

import numpy as np
import torch

from gemtune.checkpoint.rng import rng_state, set_rng_state


def draw() -> list[float]:
    """Of every generator, more than one block of Mersenne Twister."""
    numbers = [random.random() for _ in range(700)] + [random.gauss(0, 1) for _ in range(3)]
    numbers += np.random.random(700).tolist() + np.random.standard_normal(3).tolist()
    numbers += torch.rand(700).tolist() + torch.randn(3).tolist()
    if torch.cuda.is_available():
        numbers += torch.rand(700, device="cuda").tolist()
    return numbers


def test_goes_on_with_the_same_numbers() -> None:
    draw()  # an odd number of normal deviates: the spare one is part of the state
    state = json.loads(json.dumps(rng_state()))
    expected = draw()
    assert draw() != expected
    set_rng_state(state)
    assert draw() == expected


def test_a_state_from_a_machine_without_cuda_fits_everywhere() -> None:
    state = rng_state() | {"cuda": None}
    expected = torch.rand(3)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), expected)
