"""The names of an exported folder are those that vLLM and llama.cpp look up.

Their lists in fixtures/readers/gemma4_names.json were made by reading the sources that it names;
neither program was run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exported import patterns, processing_of, tensor_names
from gemma4_zoo import build, model_folder

from gemtune.export import export_model

EXPECTED = json.loads(
    (Path(__file__).parents[2] / "fixtures" / "readers" / "gemma4_names.json").read_text()
)
_SUFFIXES = (".weight", ".bias", ".input_max", ".input_min", ".output_max", ".output_min")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Of a small E2B that hears and of a small 26B-A4B, exported."""
    found: set[str] = set()
    for family, hears in (("e2b", True), ("26b_a4b", False)):
        parent = tmp_path_factory.mktemp(family)
        processing = processing_of(model_folder(family, parent, hears))
        model = build(family, torch.float32, hears=hears)
        folder = export_model(
            model, processing.tokenizer, processing.image_processor, parent / "exported"
        )
        found |= patterns(tensor_names(folder))
    return found


def is_medium(name: str) -> bool:
    return name.startswith(tuple(EXPECTED["vllm"]["media_prefixes"]))


def test_vllm_finds_every_weight_of_the_language_model_and_no_other(names: set[str]) -> None:
    assert {n for n in names if not is_medium(n)} == set(EXPECTED["vllm"]["text"])
    prefixes = {n.split(".")[1] for n in names if is_medium(n)}
    assert prefixes == {"vision_tower", "embed_vision", "audio_tower", "embed_audio"}


def llama_text(name: str) -> str | None:
    """What the converter looks a name up as; None: it handles it by itself."""
    name = name.replace("language_model.", "")
    if name.endswith(("router.scale", "per_expert_scale")):
        return None
    return name.removesuffix(".weight")


def llama_medium(name: str) -> str:
    if "audio" in name:
        name = name.replace("model.audio_tower.", "conformer.").replace(".linear.", ".")
    else:
        name = name.replace("model.vision_tower.encoder.", "vision_model.model.")
        name = name.replace(".linear.weight", ".weight")
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def test_llama_cpp_has_a_tensor_for_every_name(names: set[str]) -> None:
    text = {llama_text(n) for n in names if not is_medium(n)} - {None}
    assert text == set(EXPECTED["llama.cpp"]["text"])
    media = {llama_medium(n) for n in names if is_medium(n)}
    assert media == set(EXPECTED["llama.cpp"]["media"])
