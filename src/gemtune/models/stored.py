"""The tensors in the safetensors files of a checkpoint, of which one reads what one needs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_BLOCK_BYTES = 4096
_BLOCKS = 64  # of each file, in its mark


@dataclass(frozen=True)
class StoredTensor:
    """One of them. A file is open while it is read: what was mapped of it is not held any longer.

    Raises OSError or SafetensorError where it cannot be read.
    """

    file: Path
    key: str
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        """[start:stop] of its first dimension, in the dtype of the file."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_slice(self.key)[start:stop]

    def whole(self) -> Tensor:
        """All of it, in the dtype of the file."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.key)

    def values_at(self, positions: Sequence[int]) -> Tensor:
        """[len(positions)]: single values, by their places in the tensor laid flat."""
        if not self.shape:
            return self.whole().reshape(1)[list(positions)]
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        values = []
        with safe_open(self.file, framework="pt") as opened:
            stored = opened.get_slice(self.key)
            for position in positions:
                places = (
                    position // stride % size
                    for stride, size in zip(strides, self.shape, strict=True)
                )
                values.append(stored[tuple(slice(at, at + 1) for at in places)].flatten())
        return torch.cat(values) if values else torch.empty(0)


def weight_files(source: str, hub: dict[str, str]) -> list[Path]:
    """The safetensors files of a folder or a hub id, downloaded where they are not yet; none where
    it has no such files. They are those that transformers would read, in its order.

    Raises:
        OSError: one that the index names is not there, or cannot be downloaded.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_files

    if (single := cached_path(source, SAFE_WEIGHTS_NAME, hub)) is not None:
        return [single]
    if (index := cached_path(source, SAFE_WEIGHTS_INDEX_NAME, hub)) is None:
        return []
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [Path(path) for path in cached_files(source, names, **hub)]


def cached_path(source: str, name: str, hub: dict[str, str]) -> Path | None:
    """A file of a folder or a hub id; None where it has no such file."""
    from transformers.utils import cached_file

    try:
        return Path(cached_file(source, name, **hub))
    except OSError:
        return None


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """All tensors by the names that the files have for them; of one in two files the later.

    Raises:
        SafetensorError: a file is damaged, or ends before its last tensor.
    """
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no dict
                shape = tuple(opened.get_slice(key).get_shape())
                found[key] = StoredTensor(file, key, shape)
    return found


def mark_of(files: Sequence[Path]) -> str:
    """What tells these files from others of the same names: their sizes, headers, and 64 blocks.

    Training changes values everywhere, so that some are enough.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, size)))
            for place in range(0, size, max(1, size // _BLOCKS)):
                file.seek(place)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
