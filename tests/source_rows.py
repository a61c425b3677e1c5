"""Small sources of conversations, and what is said of those that are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gemtune.data.sources.source import Source, read_source
from gemtune.errors import DataError

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
LINE = json.dumps(ROW).encode()


def read(path: str, split: str = "train") -> Source:
    return read_source(path, split, "data.path")


def refusal(path: str, **options: Any) -> str:
    """What is said when the source is opened, or when its first bad row is read."""
    with pytest.raises(DataError) as caught:
        list(read_source(path, "train", "data.path", **options).rows)
    return str(caught.value)
