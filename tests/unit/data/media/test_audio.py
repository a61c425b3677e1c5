"""WAV files of every kind, counted by their headers and heard by transformers' own extractor."""

from __future__ import annotations

import io
import wave
from types import SimpleNamespace

import numpy as np
import pytest
from recordings import RATE_HZ, tone, wav
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

from gemtune.data.media.audio import AudioEncoder
from gemtune.data.media.files import MediaPolicy
from gemtune.errors import DataError

EXTRACTOR = Gemma4AudioFeatureExtractor()
KINDS = [(8, False), (16, False), (24, False), (32, False), (32, True), (64, True)]


@pytest.fixture
def encoder(tmp_path):
    return AudioEncoder(EXTRACTOR, tmp_path)


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize(("bits", "is_float"), KINDS)
def test_samples_of_every_kind_are_those_that_were_written(encoder, bits, is_float, extensible):
    samples = tone(0.5)
    clip = encoder.open(wav(samples, bits, is_float=is_float, extensible=extensible), "row 3")
    found = encoder.encode(clip, "row 3")
    # Written as integers, they are off by half a step.
    stepped = samples if is_float else np.round(samples * (2 ** (bits - 1) - 1)) / 2 ** (bits - 1)
    expected = EXTRACTOR([stepped.astype(np.float32)], return_tensors="np")
    assert found.features.dtype == np.float32
    np.testing.assert_allclose(found.features, expected["input_features"][0], atol=1e-5, rtol=1e-5)
    assert np.array_equal(found.mask, expected["input_features_mask"][0])


def test_a_file_of_the_wave_module_gives_the_features_of_the_extractor_to_the_bit(encoder):
    values = np.round(tone(1.3) * 32767).astype(np.int16)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(RATE_HZ)
        file.writeframes(values.tobytes())
    found = encoder.encode(encoder.open(buffer.getvalue(), ""), "")
    expected = EXTRACTOR([values.astype(np.float32) / 32768], return_tensors="np")
    assert np.array_equal(found.features, expected["input_features"][0])


def test_channels_are_averaged(encoder):
    left, right = tone(0.5, 300), tone(0.5, 900)
    both = wav(np.stack([left, right], axis=1), 32, is_float=True)
    one = wav((left + right) / 2, 32, is_float=True)
    found, expected = (encoder.encode(encoder.open(each, ""), "") for each in (both, one))
    np.testing.assert_allclose(found.features, expected.features, atol=1e-5, rtol=1e-5)


def test_an_array_a_path_and_bytes_are_the_same(encoder, tmp_path):
    samples = tone(0.4).astype(np.float32)
    data = wav(samples, 32, is_float=True, before=b"LIST\x05\0\0\0abcde\0", announced_bytes=None)
    (tmp_path / "a.wav").write_bytes(data)
    given = [
        data,
        "a.wav",
        {"bytes": data, "path": "gone.wav"},
        {"path": "a.wav", "bytes": None, "sampling_rate": RATE_HZ},
        {"array": samples, "sampling_rate": RATE_HZ, "path": None},
        {"array": samples.tolist(), "sampling_rate": RATE_HZ},
    ]
    found = [encoder.encode(encoder.open(each, ""), "").features for each in given]
    assert all(np.array_equal(each, found[0]) for each in found[1:])


def test_a_file_written_to_a_pipe_announces_no_length(encoder):
    samples = tone(0.3)
    piped = wav(samples, announced_bytes=0xFFFFFFFF)
    assert encoder.open(piped, "").num_samples == len(samples)


# The shortest that are heard at all, edges of a frame and of a token, and the longest.
LENGTHS = [161, 320, 321, 480, 640, 800, 801, 960, 1120, 15_999, 16_000, 16_001, 123_457, 480_000]


def test_tokens_counted_from_the_header_are_those_of_the_processor(encoder, stock_processor_class):
    stock = SimpleNamespace(
        feature_extractor=EXTRACTOR,
        audio_seq_length=750,
        boa_token="<",
        audio_token="a",
        eoa_token=">",
    )
    for length in LENGTHS:
        samples = np.zeros(length, dtype=np.float32)
        clip = encoder.open({"array": samples, "sampling_rate": RATE_HZ}, "")
        count = encoder.num_soft_tokens(clip)
        computed = stock_processor_class._compute_audio_num_tokens(stock, samples, RATE_HZ)
        assert count == computed, length
        found = encoder.encode(clip, "")
        assert found.num_soft_tokens == count, length
        if hasattr(stock_processor_class, "replace_audio_token"):  # from transformers 5.10 on
            features = {"input_features_mask": found.mask[None]}
            written = stock_processor_class.replace_audio_token(stock, features, 0)
            assert written == f"<{'a' * count}>", length


BAD = [
    (wav(tone(0.1), rate=44100), "the audio has 44100 samples a second; 16000 are needed"),
    ({"bytes": wav(tone(0.1)), "sampling_rate": 8000}, "the audio has 8000 samples a second"),
    (wav(tone(31)), r"the audio takes 31\.0 s; Gemma 4 hears at most 30 s"),
    (wav(tone(0.01)), "the audio takes 10 ms, too short for one token"),
    (wav(tone(0.1))[:20], "not a WAV file that can be read"),
    (wav(tone(0.1))[:1000], r"not a WAV file .*cut off: 3,200 bytes .* are announced, 956 are"),
    (b"", "not a WAV file that can be read"),
    (b"ID3 and so on", "not a WAV file that can be read .* ffmpeg -i FILE -ac 1 -ar 16000"),
    (wav(tone(0.1), before=b"data\0\0\0\0"), "the audio takes 0 ms"),
    (b"RIFF\0\0\0\0WAVE" + b"junk\0\0\0\0" * 2000, "its samples do not come within 1000 chunks"),
    (b"RIFF\0\0\0\0WAVEfmt \xff\xff\xff\x7f" + b"\0" * 30, "samples of kind 0 with 0 bits"),
    (b"RIFF\0\0\0\0WAVEdata\4\0\0\0aaaa", "its samples come before their format"),
    (3, "an audio must be bytes or a file path, not int"),
    ("../a.wav", "there is no audio file"),
    ("https://a.org/b.wav", "audios are not fetched from URLs"),
    ({"array": [0.1] * 999}, "needs its 'sampling_rate'"),
    ({"array": [[0.1] * 999] * 2, "sampling_rate": RATE_HZ}, "a list of numbers"),
    ({"array": ["a"] * 999, "sampling_rate": RATE_HZ}, "a list of numbers"),
    ({"array": [0.1, [2]], "sampling_rate": RATE_HZ}, "a list of numbers"),
    ({"array": [300] * 999, "sampling_rate": RATE_HZ}, "lie in .* one of 300. Divide"),
    ({"array": [float("nan")] * 999, "sampling_rate": RATE_HZ}, "lie in .* one of nan"),
]


@pytest.mark.parametrize(("given", "says"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_heard_is_refused_by_its_header(encoder, given, says):
    with pytest.raises(DataError, match="^row 3: .*" + says):
        encoder.open(given, "row 3")


def test_a_float_that_is_no_number_is_found_when_it_is_decoded(encoder):
    samples = tone(0.1)
    samples[7] = np.inf
    data = wav(samples, 32, is_float=True)
    with pytest.raises(DataError, match=r"^row 3: the audio cannot be read .*finite"):
        encoder.encode(encoder.open(data, "row 3"), "row 3")
    with pytest.raises(DataError, match=r"^row 3: the audio cannot be read .*finite"):
        AudioEncoder(EXTRACTOR, None, MediaPolicy(verify_media=True)).open(data, "row 3")


def test_large_files_are_not_read(encoder):
    small = AudioEncoder(EXTRACTOR, None, MediaPolicy(max_media_bytes=1000))
    with pytest.raises(DataError, match=r"^row 3: the audio has 3,244 bytes; data.max_media_bytes"):
        small.open(wav(tone(0.1)), "row 3")
