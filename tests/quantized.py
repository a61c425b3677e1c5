"""Kinds of weights in few bits, each where its library is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")


def _with_library(kind: str, library: str, extra: str) -> Any:
    is_missing = importlib.util.find_spec(library) is None
    reason = f"needs {library}: pip install -e '.[{extra}]'"
    return pytest.param(kind, marks=pytest.mark.skipif(is_missing, reason=reason))


NF4 = _with_library("nf4", "bitsandbytes", "nf4")
INT4 = _with_library("int4", "torchao", "quant")
INT8 = _with_library("int8", "torchao", "quant")
KINDS = pytest.mark.parametrize("kind", [NF4, INT4, INT8])
OF_TORCHAO = pytest.mark.parametrize("kind", [INT4, INT8])
