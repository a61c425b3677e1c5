"""Tensors come back to the bit, and reading them executes nothing."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from gemtune.checkpoint.tensors import (
    INDEX_FILE,
    load_tensors,
    missing_pieces,
    read_index,
    read_tensors,
    save_tensors,
)
from gemtune.errors import CheckpointError

TENSORS = {
    "model|a.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "model|scalar": torch.tensor(3.5),
    "model|empty": torch.empty(0, 3),
    "model|half": torch.tensor([1.0, -0.0, torch.inf, torch.nan], dtype=torch.bfloat16),
    "optimizer|a.weight|step": torch.tensor(7.0),
    "optimizer|a.weight|ids": torch.arange(5),
}


class Payload:
    """Unpickled, it runs a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


class Disguised(Payload):
    """The same behind names that belong to torch."""

    def __reduce__(self) -> Any:
        import torch.serialization

        return torch.serialization.load, (str(self.trace),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "saved", TENSORS, None)
    return tmp_path / "saved"


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_comes_back_to_the_bit(folder: Path) -> None:
    found = read_tensors(folder)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor)
    assert missing_pieces(folder, TENSORS) == []


def test_a_view_is_saved_alone(tmp_path: Path) -> None:
    wide = torch.arange(10000.0).view(100, 100)
    save_tensors(tmp_path / "view", {"part": wide[:2].t()}, None)
    assert torch.equal(read_tensors(tmp_path / "view")["part"], wide[:2].t())
    assert (tmp_path / "view" / "__0_0.distcp").stat().st_size < 5000


def test_equal_states_give_equal_files(folder: Path, tmp_path: Path) -> None:
    save_tensors(tmp_path / "again", TENSORS, None)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_the_index_tells_no_path_of_this_machine(folder: Path) -> None:
    assert str(folder.parent).encode() not in (folder / INDEX_FILE).read_bytes()


def test_other_programs_can_read_it(folder: Path) -> None:
    plain = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(plain, checkpoint_id=folder, no_dist=True)
    assert all(bits(plain[name]) == bits(tensor) for name, tensor in TENSORS.items())


def test_what_is_asked_for_must_be_there(folder: Path) -> None:
    with pytest.raises(Exception, match=r"model\|other"):
        load_tensors(folder, {"model|other": torch.zeros(1)}, None)
    with pytest.raises(Exception, match=r"[Ss]ize|shape"):
        load_tensors(folder, {"model|a.weight": torch.zeros(4, 3)}, None)


@pytest.mark.parametrize("payload", [Payload, Disguised])
@pytest.mark.parametrize("place", ["whole", "entry", "storage"])
def test_an_index_executes_nothing(
    folder: Path, tmp_path: Path, payload: Callable[[Path], Payload], place: str
) -> None:
    trace = tmp_path / "ran"
    index: Any = read_index(folder)
    if place == "whole":
        index = payload(trace)
    elif place == "entry":
        index.state_dict_metadata["model|a.weight"] = payload(trace)
    else:
        index.planner_data = payload(trace)
    (folder / INDEX_FILE).write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: it asks for"):
        read_tensors(folder)
    assert not trace.exists()


def test_a_piece_executes_nothing(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    path = folder / "__0_0.distcp"
    index = read_index(folder)
    (place,) = [info for piece, info in index.storage_data.items() if piece.fqn == "model|a.weight"]
    # The archive of one tensor, with a payload in the place of its description.
    honest = path.read_bytes()[place.offset : place.offset + place.length]
    forged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(honest)) as there, zipfile.ZipFile(forged, "w") as new:
        for name in there.namelist():
            evil = name.endswith("data.pkl")
            new.writestr(name, pickle.dumps(Payload(trace)) if evil else there.read(name))
    content = forged.getvalue()
    place.offset, place.length = path.stat().st_size, len(content)
    with path.open("ab") as file:
        file.write(content)
    (folder / INDEX_FILE).write_bytes(pickle.dumps(index))
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        read_tensors(folder)
    assert not trace.exists()


def test_bytes_that_dcp_would_unpickle_are_refused(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    dcp.save({"model|a": Payload(trace)}, checkpoint_id=tmp_path / "evil", no_dist=True)
    with pytest.raises(CheckpointError, match=r"cannot be read|more than tensors"):
        read_tensors(tmp_path / "evil")
    assert not trace.exists()


@pytest.mark.parametrize("place", ["../outside", "/etc/hostname", "sub/file"])
def test_an_index_does_not_lead_out_of_its_folder(folder: Path, place: str) -> None:
    index = read_index(folder)
    next(iter(index.storage_data.values())).relative_path = place
    (folder / INDEX_FILE).write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        read_index(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04.", pickle.dumps([1, 2])])
def test_an_index_that_is_none(folder: Path, content: bytes) -> None:
    (folder / INDEX_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        read_index(folder)


def test_what_a_writer_left_out_is_found(folder: Path) -> None:
    """As DCP does with several threads where the disk is full (pytorch#191391)."""
    index = read_index(folder)
    lost = next(piece for piece in index.storage_data if piece.fqn == "model|a.weight")
    del index.storage_data[lost]
    (folder / INDEX_FILE).write_bytes(pickle.dumps(index))
    assert missing_pieces(folder, TENSORS) == ["model|a.weight: 0 of 12 values were written"]
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    assert any("ends before it" in problem for problem in missing_pieces(folder, TENSORS))
    assert "model|new: 0 of -1 values were written" in missing_pieces(folder, ["model|new"])
