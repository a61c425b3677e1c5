"""What every test of the losses runs with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors wait for busy cores longer than they compute."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
