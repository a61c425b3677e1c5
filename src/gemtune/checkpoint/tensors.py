"""Tensors through torch.distributed.checkpoint (DCP): any world size in, any out, nothing executed.

DCP pickles its index (`.metadata`). It is read here by an unpickler that knows the dozen classes of
an index and nothing else; tensors are read by torch.load with weights_only, and an index that names
anything but tensors is refused. A checkpoint can thus execute nothing.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

from gemtune.errors import CheckpointError

INDEX_FILE = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no index of tensors needs"
            )
        return super().find_class(module, name)


class _Writer(dcp.FileSystemWriter):
    """One file a rank, by one thread: with two, DCP swallows their errors (pytorch#191391)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, thread_count=1, overwrite=False)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # not the path and a random id: equal states give equal files


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = read_index(Path(self.path))
        index.storage_meta = StorageMeta(load_id=self.load_id)
        return index


def save_tensors(
    folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None
) -> None:
    """Write tensors and DTensors into `folder`; every rank of `group` calls it with its own.

    What several ranks hold alike is written once. Raises whatever the disk raises, on every rank.
    """
    with _plain_errors():
        dcp.save(
            dict(tensors),
            storage_writer=_Writer(folder),
            process_group=group,
            no_dist=group is None,
        )


def load_tensors(
    folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fill the given tensors and DTensors in place, whatever layout they were written from.

    All of `folder` need not be asked for; all that is asked for must be there, in its shape.
    """
    with _plain_errors():
        dcp.load(
            dict(tensors),
            storage_reader=_Reader(folder),
            process_group=group,
            no_dist=group is None,
        )


def read_index(folder: Path) -> Metadata:
    """Which tensors there are, their shapes and where each piece lies.

    Raises:
        CheckpointError: no index, or one that holds, or asks for, anything but tensors.
    """
    path = folder / INDEX_FILE
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        kinds = {type(entry) for entry in index.state_dict_metadata.values()}
        places = {info.relative_path for info in index.storage_data.values()}
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not kinds <= {TensorStorageMetadata}:
        raise CheckpointError(f"{path} names more than tensors, so it is none of gemtune's.")
    if not all(isinstance(place, str) and Path(place).name == place for place in places):
        raise CheckpointError(f"{path} leads out of its folder.")
    return index


def read_tensors(folder: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, in one process, whatever world size wrote them."""
    entries = read_index(folder).state_dict_metadata
    wanted = entries if names is None else names
    tensors = {
        name: torch.empty(entries[name].size, dtype=entries[name].properties.dtype)
        for name in wanted
    }
    load_tensors(folder, tensors, None)
    return tensors


def missing_pieces(folder: Path, names: Iterable[str]) -> list[str]:
    """What an index promises and the files do not hold, for these tensors; empty: nothing."""
    index = read_index(folder)
    problems = []
    held: dict[str, int] = {}
    for piece, info in index.storage_data.items():
        file = folder / info.relative_path
        size = file.stat().st_size if file.is_file() else -1
        if size < info.offset + info.length:
            problems.append(f"{piece.fqn}: {info.relative_path} ends before it")
        entry = index.state_dict_metadata[piece.fqn]
        sizes = {tuple(chunk.offsets): chunk.sizes for chunk in entry.chunks}
        offset = tuple(piece.offset) if piece.offset is not None else (0,) * len(entry.size)
        held[piece.fqn] = held.get(piece.fqn, 0) + sizes[offset].numel()
    for name in names:
        entry = index.state_dict_metadata.get(name)
        expected = -1 if entry is None else entry.size.numel()
        if held.get(name, 0) != expected:
            problems.append(f"{name}: {held.get(name, 0)} of {expected} values were written")
    return problems


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The reason of the first rank that failed, which is an OSError where the disk was it.

    DCP's own exception is a BaseException that quotes the tracebacks of all ranks.
    """
    try:
        with warnings.catch_warnings():
            # One process without a process group is what was meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (reason, _) = min(error.failures.items())
        if isinstance(reason, KeyboardInterrupt | SystemExit):
            raise reason from error
        raise OSError(f"rank {rank}: {_root_of(reason)}") from error


def _root_of(reason: BaseException) -> BaseException:
    """The disk's own words: torch.save answers them with "unexpected pos" in their place."""
    found: BaseException | None = reason
    while found is not None:
        if isinstance(found, OSError):
            return found
        found = found.__cause__ or found.__context__
    return reason
