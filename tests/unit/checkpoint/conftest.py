from __future__ import annotations

from pathlib import Path

import pytest
from small_training import build, train, write


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of step 2."""
    model, optimizer = build()
    train(model, optimizer, 2)
    return write(tmp_path, model, optimizer, 2)
