"""What is in an exported folder: keys for older readers, shards, weights once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from exported import processing_of, tensor_names
from gemma4_zoo import TINY_CONFIG, build, model_folder
from safetensors.torch import load_file
from transformers import Gemma4Config

from gemtune.export.folder import _add_legacy_keys, export_model

READERS = Path(__file__).parents[2] / "fixtures" / "readers"


@pytest.mark.parametrize(
    ("num_layers", "attention_k_eq_v", "expected_kv_heads"),
    [(6, False, None), (12, False, None), (12, True, 1)],
    ids=["e2b", "ten layers and more", "31b"],
)
def test_legacy_keys_are_the_head_sizes_of_the_full_attention_layers(
    num_layers: int, attention_k_eq_v: bool, expected_kv_heads: int | None, tmp_path: Path
) -> None:
    values = json.loads(TINY_CONFIG.read_text())
    text = values["text_config"]
    text |= {
        "num_hidden_layers": num_layers,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]
        * (num_layers // 3),
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": attention_k_eq_v,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": expected_kv_heads,
        "global_head_dim": 32,
    }
    Gemma4Config.from_dict(values).save_pretrained(tmp_path)
    _add_legacy_keys(tmp_path / "config.json")
    written = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert written["global_head_dim"] == 32
    assert written["head_dim"] == 16
    assert written["num_global_key_value_heads"] == expected_kv_heads
    again = Gemma4Config.from_pretrained(tmp_path)
    assert again.text_config.to_dict() == Gemma4Config.from_dict(values).text_config.to_dict()


@pytest.mark.parametrize("family", ["e2b", "26b_a4b"])
def test_the_fixtures_of_the_older_readers_are_what_is_written(family: str, tmp_path: Path) -> None:
    """To make them anew, write `written` there."""
    processing = processing_of(model_folder(family, tmp_path))
    model = build(family, torch.float32)
    folder = export_model(
        model, processing.tokenizer, processing.image_processor, tmp_path / "exported"
    )
    tensors = load_file(folder / "model.safetensors")
    written = {
        "config": json.loads((folder / "config.json").read_text()),
        "shapes": {name: list(value.shape) for name, value in sorted(tensors.items())},
    }
    expected = json.loads((READERS / f"{family}_exported.json").read_text())
    if transformers.__version__ == expected["config"]["transformers_version"]:
        assert written == expected
    assert written["shapes"] == expected["shapes"]


def test_shards_hold_every_tensor_once_and_the_tied_head_never(tmp_path: Path) -> None:
    processing = processing_of(model_folder("e2b", tmp_path))
    model = build("e2b", torch.bfloat16)
    parts = (processing.tokenizer, processing.image_processor)
    folder = export_model(model, *parts, tmp_path / "exported", card="# A", shard_bytes=500_000)
    sizes = [p.stat().st_size for p in folder.glob("*.safetensors")]
    assert len(sizes) > 3 and sorted(sizes)[-2] < 510_000
    names = tensor_names(folder)
    assert names == model.state_dict().keys() - {"lm_head.weight"}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names
    assert (folder / "README.md").read_text() == "# A"
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_vision_rope_has_the_name_that_older_readers_know(tmp_path: Path) -> None:
    Gemma4Config.from_dict(json.loads(TINY_CONFIG.read_text())).save_pretrained(tmp_path)
    before = Gemma4Config.from_pretrained(tmp_path).vision_config.to_dict()
    _add_legacy_keys(tmp_path / "config.json")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["vision_config"]["rope_parameters"]["rope_type"] == "default"
    assert Gemma4Config.from_pretrained(tmp_path).vision_config.to_dict() == before
