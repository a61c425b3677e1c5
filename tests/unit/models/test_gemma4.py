"""Building from a seed, reading from a folder, naming parts; what is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from gemma4_zoo import model_folder
from safetensors.torch import load_file, save_file
from transformers import Gemma4ForConditionalGeneration

import gemtune
from gemtune.adapters import Lora, attach
from gemtune.errors import ModelError
from gemtune.models import (
    ModelConfig,
    freeze,
    load_model,
    load_processing,
    part_parameters,
    trained_modalities,
)

ASSETS = Path(gemtune.__file__).parent / "assets" / "tiny"
TINY = {"path": "bundled:tiny", "weights": "random"}


def load(config: ModelConfig, seed: int = 0):
    return load_model(config, load_processing(config), seed)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(ASSETS, folder)
    load(ModelConfig(**TINY), seed=3).save_pretrained(folder)
    return folder


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (load(ModelConfig(**TINY), seed) for seed in (1, 1, 2))
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.training
    assert first.lm_head.weight is first.get_input_embeddings().weight


def test_bfloat16_casts_parameters_and_leaves_buffers() -> None:
    model = load(ModelConfig(**TINY, dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inverse_frequencies = [b for n, b in model.named_buffers() if "inv_freq" in n]
    assert inverse_frequencies
    assert all(buffer.dtype == torch.float32 for buffer in inverse_frequencies)


def test_a_local_checkpoint_is_read_as_it_was_saved(checkpoint: Path) -> None:
    config = ModelConfig(path=str(checkpoint), attention="eager")
    model = load(config)
    stock = Gemma4ForConditionalGeneration.from_pretrained(checkpoint)
    expected = stock.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    processing = load_processing(config)
    assert processing.source == str(checkpoint)
    assert processing.processor_file == checkpoint / "processor_config.json"
    assert model.config.text_config._attn_implementation == "eager"


def test_checkpointing_is_not_reentrant() -> None:
    model = load(ModelConfig(**TINY, gradient_checkpointing=True))
    layer = model.model.language_model.layers[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is False


def test_parts_cover_every_parameter_once() -> None:
    model = load(ModelConfig(**TINY))
    counts = part_parameters(model)
    assert set(counts) == {"embeddings", "ple", "language", "vision", "projector"}
    assert sum(total for total, _ in counts.values()) == sum(p.numel() for p in model.parameters())
    freeze(model, ["ple", "vision"])
    frozen = {part for part, (_, trainable) in part_parameters(model).items() if not trainable}
    assert frozen == {"ple", "vision"}
    assert counts["ple"][0] == model.model.language_model.embed_tokens_per_layer.weight.numel()


def test_a_trained_tower_is_noticed_also_when_only_its_adapter_or_projector_is() -> None:
    model = load(ModelConfig(**TINY))
    assert trained_modalities(model) == {"vision"}
    freeze(model, ["vision"])
    assert trained_modalities(model) == {"vision"}  # the projector gets no gradient from text
    freeze(model, ["projector"])
    assert trained_modalities(model) == set()
    adapted = attach(load(ModelConfig(**TINY)), Lora(parts=["vision"]))
    assert trained_modalities(adapted) == {"vision"}
    assert trained_modalities(attach(load(ModelConfig(**TINY)), Lora())) == set()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        load_processing(ModelConfig(path=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"without config\.json"):
        load_processing(ModelConfig(path=str(tmp_path / "empty")))
    with pytest.raises(ModelError, match="only bundled model"):
        load_processing(ModelConfig(path="bundled:huge"))
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of .* model\.language_model\.norm\.weight"):
        load(ModelConfig(path=str(checkpoint)))
    weights.write_bytes(b"broken")
    with pytest.raises(ModelError, match="cannot be read"):
        load(ModelConfig(path=str(checkpoint)))


def test_another_architecture_is_refused_by_name(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="is a 'llama' model, not a Gemma 4"):
        load_processing(ModelConfig(path=str(checkpoint)))


@pytest.mark.parametrize(
    ("release", "family", "is_refused"),
    [
        ("5.9.0", "31b", True),
        ("5.12.1", "26b_a4b", True),
        ("5.9.0", "e4b", False),
        ("5.8.1", "31b", False),
        ("5.13.0", "31b", False),
    ],
)
def test_releases_with_other_masks_for_images_are_refused(
    release: str,
    family: str,
    is_refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ModelConfig(path=model_folder(family, tmp_path), weights="random")
    monkeypatch.setattr("gemtune.models.gemma4.version", lambda _: release)
    with (
        pytest.raises(ModelError, match=r"Install transformers 5\.13")
        if is_refused
        else nullcontext()
    ):
        load_processing(config)


def test_a_base_model_without_chat_template_is_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat template.*-it"):
        load_processing(ModelConfig(path=str(checkpoint)))


def test_without_the_hub_the_remedies_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as error:
        load_processing(ModelConfig(path="google/gemma-4-E2B-it"))
    for remedy in ("accept the licence", "hf auth login", "HF_HUB_OFFLINE", "model.path=FOLDER"):
        assert remedy in str(error.value)
