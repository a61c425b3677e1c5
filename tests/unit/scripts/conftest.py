"""What tests of benchmarks/ share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"

Load = Callable[[str], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a module of benchmarks/, which is no package."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def new_runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs of the test start anew, and on the CPU wherever it runs."""

    def forget() -> None:
        # accelerate keeps its state in the classes.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    forget()
    yield
    forget()
