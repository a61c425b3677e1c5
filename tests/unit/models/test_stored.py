"""Tensors of safetensors files, read by parts: against safetensors' own reading of the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gemtune.models.stored import mark_of, stored_tensors, weight_files

VALUES = {
    "scalar": torch.tensor(2.5),
    "vector": torch.arange(7, dtype=torch.float32),
    "matrix": torch.arange(35, dtype=torch.bfloat16).view(7, 5),
    "experts": torch.randn(4, 3, 6, dtype=torch.float64),
    "nothing": torch.empty(0, 3),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(VALUES, path)
    return path


@pytest.mark.parametrize("name", VALUES)
def test_parts_are_those_of_the_whole(file: Path, name: str) -> None:
    stored, value = stored_tensors([file])[name], VALUES[name]
    assert stored.shape == value.shape
    assert torch.equal(stored.whole(), value)
    for start, stop in ((0, 2), (3, 4), (1, 7)) if value.dim() and value.numel() else ():
        rows = stored.rows(start, min(stop, len(value)))
        assert rows.dtype == value.dtype and torch.equal(rows, value[start:stop])
    places = range(0, value.numel(), 3)
    assert torch.equal(stored.values_at(places).to(value.dtype), value.flatten()[::3])


def test_of_two_files_the_later_holds(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"vector": torch.ones(2), "new": torch.ones(1)}, other)
    found = stored_tensors([file, other])
    assert found.keys() == {*VALUES, "new"}
    assert torch.equal(found["vector"].whole(), torch.ones(2))


def test_a_file_that_ends_early_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(SafetensorError):
        stored_tensors([file])


def test_a_folder_has_one_file_or_those_of_its_index(file: Path, tmp_path: Path) -> None:
    assert weight_files(str(tmp_path), {}) == [file]
    parts = [tmp_path / f"part{number}.safetensors" for number in (1, 2)]
    for part in parts:
        save_file({part.stem: torch.ones(1)}, part)
    index = {"weight_map": {"part2": parts[1].name, "part1": parts[0].name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(str(tmp_path), {}) == [file]  # as transformers prefers it
    file.unlink()
    assert weight_files(str(tmp_path), {}) == parts
    parts[0].unlink()
    with pytest.raises(OSError, match=r"part1\.safetensors"):
        weight_files(str(tmp_path), {})
    (tmp_path / "model.safetensors.index.json").unlink()
    assert weight_files(str(tmp_path), {}) == []


def test_a_mark_is_of_the_content(file: Path, tmp_path: Path) -> None:
    first = mark_of([file])
    assert mark_of([file]) == first
    save_file(VALUES, file)
    assert mark_of([file]) == first
    save_file({name: value + 1 for name, value in VALUES.items()}, file)
    assert mark_of([file]) != first
