"""The configuration keys that readers before transformers 5.15 need, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gemma4_zoo import TINY_CONFIG
from transformers import Gemma4Config

from gemtune.checkpoint.export import _add_legacy_keys


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
