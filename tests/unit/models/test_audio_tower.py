"""A model without its audio tower: what is read, what is left out, and what comes back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hearing import all_tensors, hearing_checkpoint, is_audio
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Gemma4ForConditionalGeneration

from gemtune.errors import ModelError
from gemtune.models import ModelConfig, load_model, load_processing, put_back_audio_tower
from gemtune.models import audio_tower as module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = hearing_checkpoint(tmp_path_factory.mktemp("hearing"))
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def config_of(folder: Path, **keys: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), dtype="bfloat16", **keys)


def load(config: ModelConfig, **options: Any) -> Any:
    return load_model(config, load_processing(config), 0, **options)


def test_everything_else_is_as_in_the_whole_model(checkpoint: Path) -> None:
    whole = load(config_of(checkpoint)).state_dict()
    deaf = load(config_of(checkpoint, audio_tower=False))
    assert deaf.config.audio_config is None and deaf.model.config.audio_config is None
    state = deaf.state_dict()
    assert state.keys() == {name for name in whole if not is_audio(name)}
    assert sum(map(is_audio, whole)) > 40
    assert all(torch.equal(value, whole[name]) for name, value in state.items())


class _Recorded:
    """A slice of a safetensors file that tells when its values are read."""

    def __init__(self, inner: Any, name: str, read: set[str]) -> None:
        self._inner, self._name, self._read = inner, name, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        self._read.add(self._name)
        return self._inner[index]


def test_not_a_byte_of_the_tower_is_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()

    class Opened:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._inner = safe_open(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *error: object) -> None:
            self._inner.__exit__(*error)

        def get_slice(self, name: str) -> _Recorded:
            return _Recorded(self._inner.get_slice(name), name, read)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.add(name)
            return self._inner.get_tensor(name)

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", Opened)
    monkeypatch.setattr(module, "safe_open", Opened)
    stored = set(all_tensors(checkpoint))
    load(config_of(checkpoint))
    assert read == stored
    read.clear()
    config = config_of(checkpoint, audio_tower=False)
    model = load(config)
    assert read == {name for name in stored if not is_audio(name)}
    read.clear()
    put_back_audio_tower(model, config, load_processing(config), 0)
    assert read == {name for name in stored if is_audio(name)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_comes_back_is_to_the_bit_what_was_left_out(checkpoint: Path, dtype: str) -> None:
    config = ModelConfig(path=str(checkpoint), dtype=dtype, audio_tower=False)
    whole = load(ModelConfig(path=str(checkpoint), dtype=dtype))
    back = put_back_audio_tower(load(config), config, load_processing(config), 0)
    state = back.state_dict()
    assert state.keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
    assert back.config.to_dict() == whole.config.to_dict()


def test_a_seed_gives_the_rest_the_same_weights(checkpoint: Path) -> None:
    keys = {"path": str(checkpoint), "weights": "random"}
    config = ModelConfig(**keys, audio_tower=False)
    whole, deaf = load(ModelConfig(**keys)).state_dict(), load(config)
    assert not any(map(is_audio, deaf.state_dict()))
    assert all(torch.equal(value, whole[name]) for name, value in deaf.state_dict().items())
    back = put_back_audio_tower(deaf, config, load_processing(config), 0).state_dict()
    assert back.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in back.items())


def test_without_weights_it_has_the_same_tensors(checkpoint: Path) -> None:
    config = config_of(checkpoint, audio_tower=False)
    real, meta = load(config), load(config, without_weights=True)
    for kind in ("named_parameters", "named_buffers"):
        shapes = [{n: t.shape for n, t in getattr(m, kind)()} for m in (real, meta)]
        assert shapes[0] == shapes[1]


def test_a_model_that_has_none_stays_as_it_is() -> None:
    config = ModelConfig(weights="random", audio_tower=False)
    model = load(config)
    names = set(model.state_dict())
    assert put_back_audio_tower(model, config, load_processing(config), 0) is model
    assert set(model.state_dict()) == names


def test_transformers_says_nothing_of_what_is_not_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("transformers"), Keep(logging.WARNING)
    logger.addHandler(handler)
    before = Gemma4ForConditionalGeneration._keys_to_ignore_on_load_unexpected
    try:
        load(config_of(checkpoint, audio_tower=False))
        assert said == []
        assert Gemma4ForConditionalGeneration._keys_to_ignore_on_load_unexpected == before
        # It would have: and it still names what nobody left out on purpose.
        config = load_processing(config_of(checkpoint)).model_config
        config = module.without_audio(config)
        Gemma4ForConditionalGeneration.from_pretrained(checkpoint, config=config)
        assert any("audio_tower" in line for line in said)
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("fault", ["missing", "another shape"])
def test_a_tower_that_could_not_come_back_is_refused_at_the_start(copied: Path, fault: str) -> None:
    index = copied / "model.safetensors.index.json"
    name = "model.embed_audio.embedding_projection.weight"
    placed = json.loads(index.read_text())
    shard = copied / placed["weight_map"][name]
    tensors = load_file(shard)
    if fault == "missing":
        del tensors[name], placed["weight_map"][name]
        index.write_text(json.dumps(placed))
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"has 1 of the audio.*such as {name}.*audio_tower=true"):
        load(config_of(copied, audio_tower=False))


def test_a_hub_checkpoint_stays_at_its_commit(checkpoint: Path, monkeypatch: Any) -> None:
    """Its branch may have moved when the training is done."""
    asked: list[tuple[str, str]] = []

    def cached(source: str, name: str, *, revision: str) -> str:
        asked.append((name, revision))
        if not (checkpoint / name).is_file():
            raise OSError(f"{source} has no {name}")
        return str(checkpoint / name)

    config = load_processing(config_of(checkpoint)).model_config
    monkeypatch.setattr("transformers.utils.cached_file", cached)
    config._commit_hash = "c" * 40
    files = module.audio_files("owner/name", {"revision": "main"}, config)
    assert {f.parent for f in files.values()} == {checkpoint} and all(map(is_audio, files))
    assert {revision for _, revision in asked} == {"c" * 40}
    # Shards without a weight of the tower are not asked for.
    shards = {name for name, _ in asked if name.startswith("model-")}
    assert shards == {f.name for f in files.values()}
    assert len(shards) < len(list(checkpoint.glob("*.safetensors")))
