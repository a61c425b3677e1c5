"""The bundled tiny model and digits data are what the documents say they are."""

import io
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Gemma4ForConditionalGeneration
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

ASSETS = Path(__file__).resolve().parents[3] / "src" / "gemtune" / "assets"
TINY = ASSETS / "tiny"
DIGITS = ASSETS / "digits"
KINDS = {"digit", "word", "parity", "pair", "follow_up"}
SPLITS = ("train", "heldout")
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def config():
    return json.loads((TINY / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Gemma4ForConditionalGeneration(AutoConfig.from_pretrained(TINY)).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def image_processor():
    return Gemma4ImageProcessorPil.from_pretrained(TINY)


@pytest.fixture(scope="module")
def rows():
    return {name: pq.read_table(DIGITS / f"{name}.parquet").to_pylist() for name in SPLITS}


def pixels(image: dict) -> bytes:
    return Image.open(io.BytesIO(image["bytes"])).tobytes()


def text_of(turn: dict) -> str:
    return "".join(part["text"] for part in turn["content"])


# The model


def test_model_has_at_most_two_million_parameters(model):
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000


def test_config_has_every_structural_feature_of_e2b(config):
    text, vision = config["text_config"], config["vision_config"]
    assert config["architectures"] == ["Gemma4ForConditionalGeneration"]
    assert config["audio_config"] is None
    assert config["tie_word_embeddings"] and text["tie_word_embeddings"]
    assert text["hidden_size_per_layer_input"] > 0
    assert text["head_dim"] < text["global_head_dim"]
    assert text["num_key_value_heads"] < text["num_attention_heads"]
    assert text["final_logit_softcapping"] == 30.0
    assert text["use_double_wide_mlp"]
    assert 0 < text["num_kv_shared_layers"] < text["num_hidden_layers"]
    assert set(text["layer_types"]) == {"sliding_attention", "full_attention"}
    assert (vision["patch_size"], vision["pooling_kernel_size"]) == (16, 3)
    assert vision["use_clipped_linears"] and not vision["standardize"]


def test_config_has_the_keys_that_readers_before_5_15_need(config):
    assert "num_global_key_value_heads" in config["text_config"]
    assert "per_layer_config" not in config["text_config"]


def test_built_layers_differ_as_in_e2b(model, config):
    text = config["text_config"]
    layers = model.model.language_model.layers
    first_shared = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    for index, (layer, layer_type) in enumerate(zip(layers, text["layer_types"], strict=True)):
        full, shared = layer_type == "full_attention", index >= first_shared
        assert layer.self_attn.head_dim == text["global_head_dim" if full else "head_dim"]
        assert layer.mlp.gate_proj.out_features == text["intermediate_size"] * (1 + shared)
        assert hasattr(layer.self_attn, "k_proj") is not shared
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_window_is_shorter_than_most_rows(tokenizer, config, rows):
    lengths = [len(encode(tokenizer, row["messages"])) for row in rows["heldout"]]
    window = config["text_config"]["sliding_window"]
    assert sum(length > window for length in lengths) > len(lengths) / 2


def encode(tokenizer, messages) -> list[int]:
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False).input_ids


def test_model_reads_a_bundled_image(model, tokenizer, image_processor, rows):
    row = next(row for row in rows["heldout"] if row["kind"] == "pair")
    media = image_processor(
        [Image.open(io.BytesIO(image["bytes"])) for image in row["images"]], return_tensors="pt"
    )
    num_tokens = int(media.pop("num_soft_tokens_per_image")[0])
    rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    expanded = tokenizer.boi_token + tokenizer.image_token * num_tokens + tokenizer.eoi_token
    rendered = rendered.replace(tokenizer.image_token, expanded)
    ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids
    mm_token_type_ids = (ids == tokenizer.image_token_id).long()
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=mm_token_type_ids, **media).logits
    assert logits.shape == (1, ids.shape[1], len(tokenizer))
    assert logits.isfinite().all() and logits.abs().max() <= 30


# The tokenizer


def test_vocabulary_matches_the_config(tokenizer, config):
    text = config["text_config"]
    assert len(tokenizer) == text["vocab_size"] == text["vocab_size_per_layer_input"]
    expected = {
        "boi_token_id": "<|image>",
        "eoi_token_id": "<image|>",
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "boa_token_id": "<|audio>",
        "eoa_token_index": "<audio|>",
        "audio_token_id": "<|audio|>",
    }
    for key, token in expected.items():
        assert tokenizer.convert_ids_to_tokens(config[key]) == token
    assert tokenizer.convert_ids_to_tokens(config["eos_token_id"]) == ["<eos>", "<turn|>"]


def test_first_ids_are_gemmas(tokenizer, config):
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert tokenizer.convert_ids_to_tokens(range(5)) == first
    assert tokenizer.pad_token_id == config["text_config"]["pad_token_id"] == 0
    assert tokenizer.eos_token_id == config["text_config"]["eos_token_id"] == 1
    assert tokenizer.bos_token_id == config["text_config"]["bos_token_id"] == 2
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    ("attribute", "token"),
    [
        ("image_token", "<|image|>"),
        ("boi_token", "<|image>"),
        ("eoi_token", "<image|>"),
        ("audio_token", "<|audio|>"),
        ("boa_token", "<|audio>"),
        ("eoa_token", "<audio|>"),
        ("sot_token", "<|turn>"),
        ("eot_token", "<turn|>"),
        ("soc_token", "<|channel>"),
        ("eoc_token", "<channel|>"),
        ("think_token", "<|think|>"),
        ("escape_token", '<|"|>'),
        ("std_token", "<|tool>"),
        ("etd_token", "<tool|>"),
        ("stc_token", "<|tool_call>"),
        ("etc_token", "<tool_call|>"),
        ("str_token", "<|tool_response>"),
        ("etr_token", "<tool_response|>"),
    ],
)
def test_special_tokens_have_their_real_names_and_are_one_token(tokenizer, attribute, token):
    assert getattr(tokenizer, attribute) == token
    ids = tokenizer(f"a{token}b", add_special_tokens=False).input_ids
    assert ids[1] == tokenizer.convert_tokens_to_ids(token) != tokenizer.unk_token_id
    assert len(ids) == 3
    assert token in tokenizer.all_special_tokens


@pytest.mark.parametrize(
    "text",
    [
        "What digit is this?",
        " leading, trailing and  double  spaces ",
        "tab\tnewline\n\nreturn\r\n",
        "It isn't , really .",
        "naïve façade, 日本語, Ελληνικά, עברית",
        "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301",
        "".join(map(chr, range(0x250))),
        "\u0000\u007f\ufffd\ufeff\U0010ffff",
    ],
)
def test_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_ordinary_english_needs_few_tokens(tokenizer):
    text = "The answer is not in the text, so the model should say that it does not know."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) < len(text) / 2
    assert not any(token.startswith("<0x") for token in tokenizer.convert_ids_to_tokens(ids))


# The chat template


def test_template_renders_the_documented_turns(tokenizer):
    messages = [
        {"role": "system", "content": "You are terse."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": " What is this?\n"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Colour?"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<bos><|turn>system\nYou are terse.<turn|>\n"
        "<|turn>user\n<|image|>What is this?<turn|>\n<|turn>model\nA cat.<turn|>\n"
        "<|turn>user\nColour?<turn|>\n<|turn>model\n"
    )


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "tool", "content": "x"}, "'tool'"),
        ({"role": "user", "content": [{"type": "audio"}]}, "'audio'"),
    ],
)
def test_template_refuses_what_it_cannot_render(tokenizer, message, named):
    with pytest.raises(Exception, match=named):
        tokenizer.apply_chat_template([message], tokenize=False)


# The image processor


def test_processor_file_has_the_published_layout(image_processor):
    stored = json.loads((TINY / "processor_config.json").read_text(encoding="utf-8"))
    assert stored["processor_class"] == "Gemma4Processor"
    assert stored["image_processor"]["image_processor_type"] == "Gemma4ImageProcessor"
    assert {"feature_extractor", "video_processor", "image_seq_length"} <= stored.keys()
    assert image_processor.max_soft_tokens == 70
    assert image_processor.do_resize is False


def test_stored_images_are_on_the_patch_grid(image_processor, rows):
    sizes = {
        Image.open(io.BytesIO(image["bytes"])).size
        for split in SPLITS
        for row in rows[split]
        for image in row["images"]
    }
    assert sizes == {(96, 96)}
    image = Image.open(io.BytesIO(rows["train"][0]["images"][0]["bytes"]))
    media = image_processor([image], return_tensors="pt")
    assert media["pixel_values"].shape == (1, 9 * 70, 3 * 16 * 16)
    assert int(media["num_soft_tokens_per_image"][0]) == 4
    assert int((media["image_position_ids"][0, :, 0] >= 0).sum()) == 36


# The digits


def test_no_held_out_image_is_trained_on(rows):
    seen = {
        name: {pixels(image) for row in rows[name] for image in row["images"]} for name in SPLITS
    }
    assert not seen["train"] & seen["heldout"]
    assert len(seen["heldout"]) == 360
    assert len(seen["train"] | seen["heldout"]) == 1797


def test_every_image_is_asked_once_as_a_digit(rows):
    for name, expected in (("train", 1437), ("heldout", 360)):
        asked = [row["images"][0]["path"] for row in rows[name] if row["kind"] == "digit"]
        assert len(asked) == len(set(asked)) == expected


def test_every_kind_is_in_both_splits(rows):
    for name in SPLITS:
        counts = Counter(row["kind"] for row in rows[name])
        assert counts.keys() == KINDS
        assert min(counts.values()) >= 60


def test_answers_agree_with_the_digits(rows):
    digit_of = {
        row["images"][0]["path"]: int(text_of(row["messages"][1]))
        for name in SPLITS
        for row in rows[name]
        if row["kind"] == "digit"
    }
    for row in rows["train"] + rows["heldout"]:
        shown = [digit_of[image["path"]] for image in row["images"]]
        answers = [text_of(turn) for turn in row["messages"] if turn["role"] == "assistant"]
        expected = {
            "digit": [str(shown[0])],
            "word": [WORDS[shown[0]]],
            "parity": [("even", "odd")[shown[0] % 2]],
            "pair": [" and ".join(map(str, shown))],
            "follow_up": list(map(str, shown)),
        }
        assert answers == expected[row["kind"]]


def test_image_parts_match_the_images(rows):
    for row in rows["train"] + rows["heldout"]:
        per_turn = [
            sum(part["type"] == "image" for part in turn["content"]) for turn in row["messages"]
        ]
        assert sum(per_turn) == len(row["images"])
        assert per_turn == {"pair": [2, 0], "follow_up": [1, 0, 1, 0]}.get(row["kind"], [1, 0])


def test_datasets_sees_images():
    metadata = pq.read_schema(DIGITS / "heldout.parquet").metadata[b"huggingface"]
    features = json.loads(metadata)["info"]["features"]
    assert features["images"]["feature"] == {"_type": "Image"}


def test_readme_attributes_the_images():
    readme = (DIGITS / "README.md").read_text(encoding="utf-8")
    for fact in ("Alpaydin", "Kaynak", "1998", "10.24432/C50P49", "CC BY 4.0", "Changes"):
        assert fact in readme
