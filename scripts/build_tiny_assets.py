"""Build the bundled tiny model: src/gemtune/assets/tiny (configuration, tokenizer, processor).

    python scripts/build_tiny_assets.py            # write
    python scripts/build_tiny_assets.py --check    # exit 1 if a file on disk differs

A real Gemma4ForConditionalGeneration with every structural feature of E2B, small enough to learn
the bundled digits on a CPU within minutes. There are no weights: the model is built from a seed.
The vocabulary has Gemma's special tokens under their real names, at other ids.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from build_digits import training_texts
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

TARGET = Path(__file__).resolve().parents[1] / "src" / "gemtune" / "assets" / "tiny"
VOCAB_SIZE = 640
MAX_SOFT_TOKENS = 70

# Ids 0-4 are the real ones; the others keep the order of their real ids.
SPECIAL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
    "<|think|>",
    "<|channel>",
    "<channel|>",
    "<|turn>",
    "<turn|>",
    "<|image>",
    "<|audio>",
    "<|image|>",
    "<|audio|>",
    "<image|>",
    "<audio|>",
    "<|video|>",
)
TOKEN_ID = {token: token_id for token_id, token in enumerate(SPECIAL_TOKENS)}

# Written for this file, so that ordinary English is split into few tokens.
ENGLISH = """
You are a helpful assistant. You are terse. Please answer in one word. Think about it first.
What is in the image? Describe the picture in a sentence. What is this? A cat. Which colour is it?
The answer is not in the text that was given, so the model should say that it does not know.
We went there in the morning, and when the rain had stopped they were already on their way home.
He said that she would be here at the end of the week with the others, but nobody had seen her.
How many people can read and write this language? Why do you ask? Who told you about the house?
The train leaves the station at ten, stops at every village along the river and returns by noon.
There is nothing better than a warm room, a good book and some time for thinking and reading it.
To train a model, show it a question and the answer that it should give, then measure the loss.
Each of these images has a number on it; look at the first one, then at the second one, in order.
Could you please explain how this works? It takes the words, counts them and adds what is left.
After the war the old bridge was built again with stone from the same hill, as it had been before.
This is what they call an example: short, clear, and made for nothing other than being tested.
From now on every user and every system message will have its own turn, and the model has its own.
Some things are large and some are small; most of them are something in between, like this line.
"""

CHAT_TEMPLATE = """\
{#- Gemma 4 turns: text and images, no tools and no thinking. -#}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("message role is '" ~ message.role ~ "'; it must be 'system', 'user' or 'assistant'") -}}
    {%- endif -%}
    {{- '<|turn>' ~ ('model' if message.role == 'assistant' else message.role) ~ '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content | trim -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'text' -%}
                {{- part.text | trim -}}
            {%- elif part.type == 'image' -%}
                {{- '<|image|>' -}}
            {%- else -%}
                {{- raise_exception("content part type is '" ~ part.type ~ "'; it must be 'text' or 'image'") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""  # noqa: E501


def text_config() -> dict:
    return {
        "model_type": "gemma4_text",
        "vocab_size": VOCAB_SIZE,
        "head_dim": 16,
        "global_head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.06,
        "rms_norm_eps": 1e-06,
        "use_cache": True,
        "pad_token_id": TOKEN_ID["<pad>"],
        "eos_token_id": TOKEN_ID["<eos>"],
        "bos_token_id": TOKEN_ID["<bos>"],
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "dtype": "float32",
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 16,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 3,
        "enable_moe_block": False,
        "use_double_wide_mlp": True,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
        "num_global_key_value_heads": None,
        "use_bidirectional_attention": None,
        "max_position_embeddings": 4096,
        # Shorter than most rows of the digits data, so that the window does cut.
        "sliding_window": 16,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    }


def vision_config() -> dict:
    return {
        "model_type": "gemma4_vision",
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 16,
        "global_head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": 4096,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "pooling_kernel_size": 3,
        "patch_size": 16,
        # The longest side that MAX_SOFT_TOKENS allows has 3 x 70 = 210 patches.
        "position_embedding_size": 256,
        "use_clipped_linears": True,
        "standardize": False,
        "initializer_range": 0.1,
        "default_output_length": MAX_SOFT_TOKENS,
        "dtype": "float32",
    }


def model_config() -> dict:
    """The configuration in the key style of the published checkpoints, which 5.5 reads too."""
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "float32",
        "text_config": text_config(),
        "vision_config": vision_config(),
        "audio_config": None,
        "boi_token_id": TOKEN_ID["<|image>"],
        "eoi_token_id": TOKEN_ID["<image|>"],
        "image_token_id": TOKEN_ID["<|image|>"],
        "video_token_id": TOKEN_ID["<|video|>"],
        "boa_token_id": TOKEN_ID["<|audio>"],
        "eoa_token_index": TOKEN_ID["<audio|>"],
        "audio_token_id": TOKEN_ID["<|audio|>"],
        "initializer_range": 0.06,
        "tie_word_embeddings": True,
        "eos_token_id": [TOKEN_ID["<eos>"], TOKEN_ID["<turn|>"]],
        "vision_soft_tokens_per_image": MAX_SOFT_TOKENS,
    }


def generation_config() -> dict:
    return {
        "bos_token_id": TOKEN_ID["<bos>"],
        "pad_token_id": TOKEN_ID["<pad>"],
        "eos_token_id": [TOKEN_ID[name] for name in ("<eos>", "<turn|>", "<|tool_response>")],
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }


def processor_config() -> dict:
    pixels = {
        "do_convert_rgb": True,
        "do_rescale": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "max_soft_tokens": MAX_SOFT_TOKENS,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    return {
        "audio_ms_per_token": 40,
        "audio_seq_length": 750,
        "feature_extractor": {
            "dither": 0.0,
            "feature_extractor_type": "Gemma4AudioFeatureExtractor",
            "feature_size": 128,
            "fft_length": 512,
            "fft_overdrive": False,
            "frame_length": 320,
            "hop_length": 160,
            "input_scale_factor": 1.0,
            "max_frequency": 8000.0,
            "mel_floor": 0.001,
            "min_frequency": 0.0,
            "padding_side": "right",
            "padding_value": 0.0,
            "per_bin_mean": None,
            "per_bin_stddev": None,
            "preemphasis": 0.0,
            "preemphasis_htk_flavor": True,
            "return_attention_mask": True,
            "sampling_rate": 16000,
        },
        # The bundled images are on the patch grid; resizing would enlarge each one to about
        # MAX_SOFT_TOKENS tokens and make the CPU demonstration many times slower.
        "image_processor": pixels
        | {
            "do_normalize": False,
            "do_resize": False,
            "image_processor_type": "Gemma4ImageProcessor",
            "image_seq_length": MAX_SOFT_TOKENS,
        },
        "image_seq_length": MAX_SOFT_TOKENS,
        "processor_class": "Gemma4Processor",
        "video_processor": pixels
        | {
            "do_normalize": True,
            "do_resize": True,
            "do_sample_frames": True,
            "num_frames": 32,
            "return_metadata": False,
            "video_processor_type": "Gemma4VideoProcessor",
        },
    }


def tokenizer_config() -> dict:
    named = {
        "audio": "<|audio|>",
        "boa": "<|audio>",
        "boi": "<|image>",
        "bos": "<bos>",
        "eoa": "<audio|>",
        "eoc": "<channel|>",
        "eoi": "<image|>",
        "eos": "<eos>",
        "eot": "<turn|>",
        "escape": '<|"|>',
        "etc": "<tool_call|>",
        "etd": "<tool|>",
        "etr": "<tool_response|>",
        "image": "<|image|>",
        "mask": "<mask>",
        "pad": "<pad>",
        "soc": "<|channel>",
        "sot": "<|turn>",
        "stc": "<|tool_call>",
        "std": "<|tool>",
        "str": "<|tool_response>",
        "think": "<|think|>",
        "unk": "<unk>",
    }
    return {f"{name}_token": token for name, token in named.items()} | {
        "backend": "tokenizers",
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": ["<|video|>"],
        "model_max_length": 4096,
        "padding_side": "left",
        "processor_class": "Gemma4Processor",
        "tokenizer_class": "GemmaTokenizer",
    }


def learn_merges(texts: list[str], num_tokens: int) -> list[tuple[str, str]]:
    """BPE merges that yield `num_tokens` tokens, characters of `texts` included.

    Merges stay within a word with its leading space, a digit or a punctuation mark: the trainer
    sees the texts already cut up, the finished tokenizer needs no such rule.
    """
    words = [word for text in texts for word in re.findall(r" ?[A-Za-z]+|[^A-Za-z]", text)]
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, initial_alphabet=ALPHABET, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) for merge in merges]


ALPHABET = ["▁", "\n", "\t", *map(chr, range(ord("!"), ord("~") + 1))]


def build_tokenizer() -> Tokenizer:
    """Gemma's kind of tokenizer: BPE, "▁" for a space, a byte token where no other fits."""
    fixed = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *ALPHABET]
    num_learned = VOCAB_SIZE - len(fixed)
    merges = learn_merges([*training_texts(), *ENGLISH.split("\n")], len(ALPHABET) + num_learned)
    tokens = [*fixed, *("".join(merge) for merge in merges)]
    if len(set(tokens)) != VOCAB_SIZE:
        raise SystemExit(f"built {len(set(tokens))} distinct tokens, wanted {VOCAB_SIZE}")
    tokenizer = Tokenizer(
        BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def build() -> dict[str, str]:
    """{file name: text}, the same on every machine."""

    def as_json(value: dict) -> str:
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    return {
        "config.json": as_json(model_config()),
        "generation_config.json": as_json(generation_config()),
        "processor_config.json": as_json(processor_config()),
        "tokenizer_config.json": as_json(tokenizer_config()),
        "tokenizer.json": as_json(json.loads(build_tokenizer().to_str())),
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    wrong = []
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, text in build().items():
        path = TARGET / name
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.exists() or path.read_bytes() != text.encode():
            wrong.append(name)
    for name in wrong:
        print(
            f"{name} differs from what this script builds; run it without --check", file=sys.stderr
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
