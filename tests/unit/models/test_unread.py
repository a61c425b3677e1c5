"""A model that nobody has read yet, against the one that transformers reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gemma4_zoo import build, model_folder
from safetensors.torch import load_file, save_file

from gemtune.checkpoint import base_identity
from gemtune.models import ModelConfig, load_model, load_processing
from gemtune.models.stored import weight_files
from gemtune.models.unread import UnreadModel, load_unread

KINDS = {"e2b": True, "26b_a4b": False, "31b": False}


def save(family: str, parent: Path, dtype: torch.dtype) -> Path:
    folder = Path(model_folder(family, parent, KINDS[family]))
    build(family, torch.float32, seed=3, hears=KINDS[family]).to(dtype).save_pretrained(folder)
    return folder


def read_both(folder: Path, **settings) -> tuple[torch.nn.Module, UnreadModel]:
    config = ModelConfig(path=str(folder), freeze=["vision", "ple"], **settings)
    processing = load_processing(config)
    files = weight_files(processing.source, processing.hub_options)
    unread = load_unread(config, processing, files)
    assert isinstance(unread, UnreadModel)
    return load_model(config, processing, seed=0), unread


def check_same(whole: torch.nn.Module, unread: UnreadModel) -> None:
    parameters = dict(unread.model.named_parameters())
    expected = dict(whole.named_parameters())
    assert parameters.keys() == expected.keys()
    assert unread.stored.keys() == {*parameters.values()}
    for name, parameter in parameters.items():
        other, stored = expected[name], unread.stored[parameter]
        assert parameter.is_meta and parameter.requires_grad == other.requires_grad
        assert (
            (parameter.shape, parameter.dtype)
            == (other.shape, other.dtype)
            == (
                stored.shape,
                other.dtype,
            )
        )
        assert torch.equal(stored.whole().to(parameter.dtype), other), name
    buffers = dict(unread.model.named_buffers())
    for name, buffer in whole.named_buffers():
        assert buffers.pop(name).dtype == buffer.dtype, name
        assert torch.equal(dict(unread.model.named_buffers())[name], buffer), name
    assert not buffers
    head, table = unread.model.get_output_embeddings(), unread.model.get_input_embeddings()
    assert head.weight is table.weight
    assert unread.model.training


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("stored, held", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_it_is_the_model_that_transformers_reads(
    family: str, stored: str, held: str, tmp_path: Path
) -> None:
    folder = save(family, tmp_path, getattr(torch, stored))
    whole, unread = read_both(folder, dtype=held)
    check_same(whole, unread)
    assert base_identity(unread.model) is None
    identity = base_identity(whole)
    assert base_identity(unread.model, unread.stored) == identity
    held_otherwise, _ = read_both(folder, dtype=stored)
    assert base_identity(held_otherwise) != identity  # the hash is of values as they are held


def test_an_audio_tower_is_left_out(tmp_path: Path) -> None:
    folder = save("e2b", tmp_path, torch.bfloat16)
    whole, unread = read_both(folder, dtype="bfloat16", audio_tower=False)
    check_same(whole, unread)
    assert not any("audio" in name for name, _ in unread.model.named_parameters())


def test_names_are_for_transformers_to_map(tmp_path: Path) -> None:
    """A checkpoint of the model below the head has no `model.` in its names."""
    folder = save("e2b", tmp_path, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    renamed = {key.removeprefix("model."): value for key, value in tensors.items()}
    assert renamed.keys().isdisjoint(tensors)
    renamed["language_model.something.else"] = torch.ones(3)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    check_same(*read_both(folder, dtype="bfloat16"))


def test_one_changed_value_is_another_base(tmp_path: Path) -> None:
    folder = save("e2b", tmp_path, torch.bfloat16)
    _, unread = read_both(folder, dtype="bfloat16")
    before = base_identity(unread.model, unread.stored)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.embed_tokens_per_layer.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, unread = read_both(folder, dtype="bfloat16")
    assert base_identity(unread.model, unread.stored) != before
