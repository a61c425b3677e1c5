"""Rows with video and audio: ids, token types and features are those of `Gemma4Processor`."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from recordings import RATE_HZ, frame, tone, wav
from transformers import Gemma4ImageProcessorPil
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.video_utils import VideoMetadata

from gemtune.data import ChatEncoder, OtherMedia, collate, collate_packed
from gemtune.data.media.encoders import Encoders
from gemtune.data.media.files import MediaPolicy
from gemtune.data.preparation.key import preparation_key
from gemtune.data.rendering.chat import Rendering
from gemtune.errors import DataError

TEMPLATE = Path(__file__).parents[3] / "fixtures" / "templates" / "gemma4_small.jinja"
EXTRACTOR = Gemma4AudioFeatureExtractor()
FRAMES = Gemma4ImageProcessorPil(max_soft_tokens=70)


@pytest.fixture(scope="module")
def knowing(tokenizer):
    """The bundled tokenizer with a template that knows video and audio."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = TEMPLATE.read_text()
    return changed


@pytest.fixture(scope="module")
def make(knowing):
    def of(max_length=4096, truncate="none", others=None, **rendering):
        others = others or OtherMedia(frames=FRAMES, extractor=EXTRACTOR)
        media = Encoders.of(FRAMES, others, None, MediaPolicy())
        return ChatEncoder(
            knowing,
            media,
            max_length=max_length,
            truncate=truncate,
            rendering=Rendering(**rendering),
        )

    return of


class Pixels:
    """In the place of the video processor, which torchvision is needed for: frames by Pillow."""

    model_input_names = ("pixel_values_videos", "video_position_ids", "num_frames_per_video")

    def to_dict(self):
        return {}

    def __call__(self, videos, fps=None, **_):
        several = [FRAMES(video, return_tensors="pt") for video in videos]
        return BatchFeature(
            {
                "pixel_values_videos": torch.cat([each["pixel_values"] for each in several]),
                "video_position_ids": torch.cat([each["image_position_ids"] for each in several]),
                "num_frames_per_video": torch.tensor([len(video) for video in videos]),
                "num_soft_tokens_per_video": [
                    int(each["num_soft_tokens_per_image"][0]) for each in several
                ],
                "video_metadata": [
                    VideoMetadata(len(video), fps, frames_indices=list(range(len(video))))
                    for video in videos
                ],
            }
        )


@pytest.fixture(scope="module")
def processor(knowing, stock_processor_class):
    """The stock processor; all that it does with ids is its own."""
    if not hasattr(stock_processor_class, "replace_video_token"):
        pytest.skip("this Gemma4Processor checks for torchvision before it looks at a row")
    name = "check_argument_for_proper_class"
    with mock.patch.object(stock_processor_class, name, lambda *_: None):
        return stock_processor_class(EXTRACTOR, FRAMES, copy.deepcopy(knowing), Pixels())


def user(*parts):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def model(text):
    return {"role": "assistant", "content": text}


IMAGE, VIDEO, AUDIO = ({"type": kind} for kind in ("image", "video", "audio"))


def noise(seed, width=96, height=96):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def clip(seconds, seed=0):
    samples = tone(seconds, seed=seed).astype(np.float32)
    return {"array": samples, "sampling_rate": RATE_HZ}


def moving(count, seed=0, width=96):
    return {"frames": [noise(100 * seed + n, width) for n in range(count)], "fps": 2}


ROWS = {
    "audio": {"messages": [user(AUDIO, "what?"), model("a")], "audios": [clip(1)]},
    "audios": {
        "messages": [user("1:", AUDIO, "2:", AUDIO, AUDIO), model("a"), user(AUDIO), model("b")],
        "audios": [clip(1), clip(0.3, 1), clip(0.77, 2), clip(2, 3)],
    },
    "video": {"messages": [user(VIDEO, "what?"), model("a")], "videos": [moving(5)]},
    "video in text": {
        "messages": [user("at 12", VIDEO, "3 of what?"), model("00:01 it is")],
        "videos": [moving(3)],
    },
    "videos": {
        "messages": [user(VIDEO, VIDEO), model("a"), user("0", VIDEO, "0"), model("b")],
        "videos": [moving(3), moving(1, 1), moving(2, 2, 160)],
    },
    "all": {
        "messages": [user(IMAGE, VIDEO, AUDIO, "?"), model("a"), user(AUDIO, IMAGE), model("b")],
        "images": [noise(1), noise(2, 160)],
        "videos": [moving(4)],
        "audios": [clip(0.5), clip(0.9)],
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_the_processor_makes_of_it(make, processor, knowing, name):
    row = ROWS[name]
    encoder = make()
    example = encoder.encode(row, "row 3")
    ours = collate([example], pad_id=0, soft_ids=encoder.placeholders.soft_ids).inputs

    messages = [
        m | {"content": [{"type": "text", "text": m["content"]}]} if m["role"] != "user" else m
        for m in row["messages"]
    ]
    text = knowing.apply_chat_template(messages, tokenize=False)
    given = {
        "images": [row["images"]] if "images" in row else None,
        "videos": [v["frames"] for v in row["videos"]] if "videos" in row else None,
        "audio": [a["array"] for a in row["audios"]] if "audios" in row else None,
    }
    options = {"fps": 2} if "videos" in row else {}
    expected = processor(
        text=[text],
        **{kind: media for kind, media in given.items() if media},
        **options,
        return_tensors="pt",
    )
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(ours[key], expected[key]), key
    assert set(ours) >= {key for key in expected if key in ours or "pixel" in key or "input" in key}
    for key in ("input_features", "input_features_mask"):
        assert (key in ours) == (key in expected)
        assert key not in ours or torch.equal(ours[key], expected[key]), key
    for pixels, places in (
        ("pixel_values", "image_position_ids"),
        ("pixel_values_videos", "video_position_ids"),
    ):
        if pixels in expected:
            found = ours[pixels].flatten(0, -3)  # an axis of videos until transformers 5.19
            count = found.shape[1]
            assert torch.equal(found, expected[pixels].flatten(0, -3)[:, :count])
            positions = expected[places].flatten(0, -3)
            assert torch.equal(ours[places].flatten(0, -3), positions[:, :count])
            assert (positions[:, count:] == -1).all()


def spans(ids, soft):
    """(kind, count) of each run of soft tokens."""
    kinds = {number: kind for kind, number in soft.items()}
    found, previous = [], None
    for number in ids.tolist():
        if number in kinds:
            if number != previous:
                found.append([kinds[number], 0])
            found[-1][1] += 1
        previous = number
    return found


def test_a_row_is_learned_without_its_media(make, knowing):
    for learn in ("assistant", "all"):
        example = make(learn=learn).encode(ROWS["all"], "")
        learned = example.input_ids[example.labels != -100]
        text = knowing.decode(learned)
        assert not {"<|image|>", "<|video|>", "<|audio|>", "<image|>", "00:00"} & set(text.split())
        assert "00:0" not in text and "|audio" not in text and "|video" not in text
        if learn == "assistant":
            assert text == "a<turn|>b<turn|>"
        else:
            assert text.startswith("<bos><|turn>user\n") and "?<turn|>" in text


@pytest.mark.parametrize("name", ["audios", "videos", "all"])
@pytest.mark.parametrize("truncate", ["right", "left"])
def test_no_cut_goes_through_a_medium(make, name, truncate):
    """At every length: media are there whole with their features, or not at all."""
    row = ROWS[name]
    whole = make().encode(row, "")
    soft = make().placeholders.soft_ids
    outcomes = set()
    for length in range(4, len(whole.input_ids), 3):
        encoder = make(length, truncate)
        try:
            example = encoder.encode(row, "row 3")
        except DataError as error:
            assert str(error).startswith("row 3: ")
            outcomes.add("refused")
            continue
        outcomes.add("cut")
        assert len(example.input_ids) <= length
        kept = [*example.images, *example.videos, *example.audios]
        all_media = [*whole.images, *whole.videos, *whole.audios]
        count = sum(int((example.input_ids == token).sum()) for token in soft.values())
        assert count == sum(medium.num_soft_tokens for medium in kept)
        assert len(kept) < len(all_media) or truncate == "right"
        # Of a video every frame or none, each of them closed.
        edges = [encoder.control.ids[t] for t in ("<|image>", "<image|>", "<|audio>", "<audio|>")]
        begins, ends, *others = ((example.input_ids == edge).sum() for edge in edges)
        assert begins == ends and others[0] == others[1]
        frames = sum(len(video.pixels) for video in example.videos)
        assert begins == len(example.images) + frames
    assert outcomes == {"refused", "cut"}


def test_what_a_cut_on_the_left_leaves_has_its_own_media(make):
    row = ROWS["all"]
    last = {"messages": row["messages"][2:], "images": row["images"][1:], "audios": [clip(0.9)]}
    alone = make().encode(last, "")
    cut = make(len(alone.input_ids), "left").encode(row, "")
    assert cut.input_ids.tolist() == alone.input_ids.tolist()
    assert np.array_equal(cut.audios[0].features, alone.audios[0].features)
    assert np.array_equal(cut.images[0].pixels, alone.images[0].pixels)
    assert (len(cut.images), len(cut.videos), len(cut.audios)) == (1, 0, 1)


def test_packed_and_padded_batches_have_features_in_the_order_of_their_documents(make):
    encoder = make()
    soft = encoder.placeholders.soft_ids
    examples = [encoder.encode(ROWS[name], name) for name in ("all", "videos", "audios")]
    padded = collate(examples, pad_id=0, soft_ids=soft).inputs
    packed = collate_packed([examples[:2], examples[2:]], pad_id=0, soft_ids=soft).inputs
    for key in set(padded) - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        assert torch.equal(padded[key], packed[key]), key
    audios = [audio for example in examples for audio in example.audios]
    for number, audio in enumerate(audios):
        features, mask = (padded[k][number] for k in ("input_features", "input_features_mask"))
        assert np.array_equal(features[: len(audio.mask)].numpy(), audio.features)
        assert int(mask.sum()) == int(audio.mask.sum())
        assert not features[len(audio.mask) :].any()
    for inputs in (padded, packed):
        ids, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]
        for number, kind in enumerate(("image", "video", "audio"), start=1):
            assert torch.equal(kinds == number, ids == soft[kind])


def test_a_prompt_has_the_media_before_its_answer(make, knowing):
    prompt, answer = make().encode_prompt(ROWS["all"], "")
    assert answer == "b"
    assert (len(prompt.images), len(prompt.videos), len(prompt.audios)) == (2, 1, 2)
    row = {"messages": [*ROWS["audio"]["messages"], user("no"), model("c")]}
    row["audios"] = ROWS["audio"]["audios"]
    prompt, answer = make().encode_prompt(row, "")
    assert answer == "c" and len(prompt.audios) == 1
    assert knowing.decode(prompt.input_ids).endswith("no<turn|>\n<|turn>model\n")


def test_inline_parts_say_what_their_medium_is(make):
    encoder = make()
    expected = encoder.encode(ROWS["video"], "")
    part = {"type": "video", "video": ROWS["video"]["videos"][0]["frames"], "fps": 2}
    found = encoder.encode({"messages": [user(part, "what?"), model("a")]}, "")
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    part = {"type": "audio", "bytes": wav(tone(1, seed=0), 32, is_float=True)}
    found = encoder.encode({"messages": [user(part, "what?"), model("a")]}, "")
    assert found.input_ids.tolist() == encoder.encode(ROWS["audio"], "").input_ids.tolist()
    with pytest.raises(DataError, match="'fps' of a video part belongs to the video itself"):
        encoder.encode({"messages": [user({"type": "video", "fps": 2}), model("a")]}, "")


def test_a_kind_that_the_model_has_no_tower_for_is_refused_with_the_reason(make):
    encoder = make(others=OtherMedia(frames=FRAMES, refusals={"audio": "it has no audio tower"}))
    with pytest.raises(DataError, match=r"^row 3, message 1: .*'audio' is not read: it has no aud"):
        encoder.encode(ROWS["audio"], "row 3")
    assert encoder.encode(ROWS["video"], "").videos


def test_what_is_made_of_media_is_in_the_name_of_a_preparation(make, write_jsonl):
    from gemtune.data.sources.source import read_source

    source = read_source(write_jsonl([{"messages": [user("q"), model("a")]}]), "train", "k")
    several = [
        OtherMedia(frames=FRAMES, extractor=EXTRACTOR),
        OtherMedia(frames=FRAMES, extractor=EXTRACTOR, num_frames=16),
        OtherMedia(frames=FRAMES, extractor=EXTRACTOR, max_audio_tokens=100),
        OtherMedia(frames=FRAMES, extractor=Gemma4AudioFeatureExtractor(mel_floor=1e-5)),
        OtherMedia(frames=Gemma4ImageProcessorPil(max_soft_tokens=140), extractor=EXTRACTOR),
        OtherMedia(frames=FRAMES, refusals={"audio": "a"}),
        OtherMedia(extractor=EXTRACTOR, refusals={"video": "a"}),
    ]
    keys = [preparation_key(source, make(others=others)) for others in several]
    assert None not in keys and len(set(keys)) == len(keys)
    assert preparation_key(source, make(others=copy.deepcopy(several[0]))) == keys[0]


def test_a_recording_that_was_changed_since_it_was_counted_is_named(make, tmp_path):
    encoder = make()
    example, kept = encoder.encode_text(ROWS["audio"], "row 3")
    other = ROWS["audio"] | {"audios": [clip(1.5)]}
    with pytest.raises(DataError, match=r"^row 3: its audios take 38 tokens where 25 were counted"):
        encoder.add_media(example, other, kept)
    example, kept = encoder.encode_text(ROWS["video"], "row 3")
    other = ROWS["video"] | {"videos": [[frame(n) for n in range(4)]]}
    with pytest.raises(DataError, match=r"^row 3: its videos take \d+ tokens where \d+ were count"):
        encoder.add_media(example, other, kept)
