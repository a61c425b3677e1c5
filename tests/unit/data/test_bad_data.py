"""Every file of tests/fixtures/bad_data: one error with file, row and remedy, or an exact count.

None hangs, none opens a socket, none starts a program.
"""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
from transformers import Gemma4ImageProcessorPil
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

from gemtune.data import DataConfig, OtherMedia, prepare
from gemtune.errors import DataError

FOLDER = Path(__file__).parents[2] / "fixtures" / "bad_data"
SECONDS = 20
CHECKED = {"verify_media": True}
URLS = {"allow_urls": True}

# file: (row that is named, what is said and what to do). Two other rows of the file are good.
BAD_ROWS = {
    "broken_line.jsonl": ("line 2", "not valid JSON .* Each line must hold one whole object"),
    "list_line.jsonl": ("line 2", r"a row must be a JSON object \{"),
    "null_line.jsonl": ("line 2", r"a row must be a JSON object \{"),
    "two_objects_in_a_line.jsonl": ("line 2", "Extra data.* Each line must hold one whole object"),
    "key_twice.jsonl": ("line 2", "the key 'messages' stands twice in one object. Keep one"),
    "latin1.jsonl": ("line 2", "not UTF-8 .*iconv -f LATIN1 -t UTF-8"),
    "pickle_line.jsonl": ("line 2", "not UTF-8 .*iconv"),
    "deep_nesting.jsonl": ("line 2", "nested too deeply. Leave such rows out"),
    "row_without_messages.jsonl": ("line 2", "no 'messages'; the columns here are: dialog"),
    "number_for_text.jsonl": ("line 2", "message 1: 'content' must be a text or .*, not int"),
    "nan_for_text.jsonl": ("line 2", "message 1: 'content' must be a text or .*, not float"),
    "null_content.jsonl": ("line 2", "message 1: 'content' must be a text or .*, not NoneType"),
    "null_message.jsonl": ("line 2", "message 2 must be an object with 'role' and 'content'"),
    "messages_null.jsonl": ("line 2", "'messages' must be a list with at least one message"),
    "messages_text.jsonl": ("line 2", "'messages' must be a list with at least one message"),
    "no_assistant.jsonl": ("line 2", "no assistant message, so there is nothing to learn"),
    "empty_assistant.jsonl": ("line 2", "message 2: the assistant message is empty"),
    "roles_out_of_order.jsonl": ("line 2", r"message 2 \(user\) is out of order: .* take turns"),
    "assistant_first.jsonl": ("line 2", r"message 1 \(assistant\) is out of order"),
    "unknown_role.jsonl": ("line 2", "message 1 has role 'wizard'; allowed are system, user, ass"),
    "list_in_content.jsonl": ("line 2", "message 1: a part of type None is not read"),
    "nan_weight.jsonl": ("line 2", "message 2.*'weight'"),
    "lone_surrogate.jsonl": ("line 2", "half of a surrogate pair, which is no character. Remove"),
    "overlong.jsonl": ("line 2", "tokens are more than data.max_length=2048. Raise it, cut"),
    "image_count.jsonl": ("line 2", "2 images are given but the messages have 1 image parts"),
    "image_missing_from_column.jsonl": ("line 2", "more image parts than the 0 images given"),
    "images_no_list.jsonl": ("line 2", "'images' must be a list, not str"),
    "image_file_missing.jsonl": ("line 2", "there is no image file .*media/gone.png"),
    "image_of_169_megapixels.jsonl": ("line 2", "the image is too large.* Make it smaller"),
    "image_is_text.jsonl": ("line 2", "not an image that can be read. The formats are PNG, JPEG"),
    "image_is_eps.jsonl": ("line 2", "not an image that can be read. The formats are PNG, JPEG"),
    "image_by_link_out.jsonl": ("line 2", "which leads to .* is outside of .* data.media_root"),
    "image_by_dotdot.jsonl": ("line 2", "is outside of .* Move it inside, or set data.media_root"),
    "image_by_absolute_path.jsonl": ("line 2", "is outside of .* or set data.media_root"),
    "image_is_a_folder.jsonl": ("line 2", "media is not a regular file"),
    "image_by_loopback_url.jsonl": ("line 2", "images are not fetched from URLs .* Save it first"),
    "image_by_metadata_url.jsonl": ("line 2", "images are not fetched from URLs .* Save it first"),
    "image_by_data_url.jsonl": ("line 2", "images are not fetched from URLs .* Save it first"),
    "image_in_assistant.jsonl": ("line 2", "'image' is not read from the assistant role"),
    "audio_wrong_rate.jsonl": ("line 2", "8000 samples a second; 16000 are needed. Resample it"),
    "audio_truncated.jsonl": ("line 2", "not a WAV file .*is cut off: 6,400 bytes .*Convert it"),
    "audio_is_text.jsonl": ("line 2", "not a WAV file that can be read .*Convert it: ffmpeg"),
    "audio_without_rate.jsonl": ("line 2", "audio as an 'array' needs its 'sampling_rate'"),
    "audio_of_integers.jsonl": ("line 2", "here is one of 300. Divide integers of 16 bits by"),
    "video_frame_missing.jsonl": ("line 2", "there is no image file .*media/gone.png"),
    "video_of_no_rate.jsonl": ("line 2", "'fps' of a video must be a number above 0, not 0"),
    "audio_without_part.jsonl": ("line 2", "1 audios are given but the messages have 0 audio"),
    "tool_call_broken.jsonl": ("line 2", "tool"),
    "sharegpt_unknown_speaker.jsonl": ("line 2", "turn 1 is from 'alien'; allowed are human"),
    "alpaca_null_output.jsonl": ("line 2", "'output' must be a text, not NoneType"),
    "short_row.csv": ("line 3", "1 fields where the first line names 2 columns"),
    "open_quote.csv": ("line 4", "not valid CSV .* Is a quote left open"),
    "latin1.csv": ("line 3", "not UTF-8 .*iconv -f LATIN1 -t UTF-8"),
    "row_no_object.json": ("row 1", r"a row must be a JSON object \{"),
    "null_prompt.parquet": ("row 1", "'prompt' must be a text, not NoneType"),
}
# The same rows under other settings.
SETTINGS = {
    "image_truncated.jsonl": (CHECKED, "line 2", "the image is damaged"),
    "image_by_loopback_url.jsonl": (URLS, "line 2", "127.0.0.1, which is not a public address"),
    "image_by_metadata_url.jsonl": (URLS, "line 2", "169.254.169.254, which is not a public addr"),
    "image_by_data_url.jsonl": (URLS, "line 2", "not fetched from URLs .* Save it first"),
}
# The same with PyAV.
VIDEO_FILES = {
    "video_too_long.jsonl": ({"max_video_seconds": 1.0}, "the video takes 2.0 s, and data.max_v"),
    "video_truncated.jsonl": ({}, "not a video that can be read .*Convert it: ffmpeg"),
    "video_truncated_behind.jsonl": (
        CHECKED,
        "the video is damaged or cut off .*Convert it anew: ffm",
    ),
    "video_is_a_playlist.jsonl": ({}, "not a video that can be read"),
}
# Nothing of the file can be used, whatever is skipped.
BAD_FILES = {
    "utf16.jsonl": "is UTF-16; UTF-8 is read. .*iconv -f UTF-16 -t UTF-8",
    "empty.jsonl": "holds no rows",
    "blank_lines.jsonl": "holds no rows",
    "missing_column.jsonl": r"its columns are: query, reply.*data.columns='\{prompt: query, compl",
    "column_twice.csv": "line 1: the first line must name every column once",
    "no_list.json": r'must hold a list of rows, or \{"data": .* it holds an object with \'rows\'',
    "broken.json": r"line \d+: not valid JSON",
    "corrupt.parquet": "cannot be read as Parquet: ",
    "no_parquet.parquet": "cannot be read as Parquet: ",
    "empty.parquet": "holds no rows",
    "corrupt.arrow": "cannot be read as Arrow: ",
}
# Looks wrong and is not; or has a test of its own below.
OTHERS = {
    "audio_too_long.jsonl",
    "bom.jsonl",
    "duplicate_ids.jsonl",
    "forged_turn.jsonl",
    "forged_image.jsonl",
}

_forbidden = ("socket.__new__", "socket.connect", "socket.bind", "subprocess.Popen", "os.system",
              "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pickle.find_class")  # fmt: skip
_seen: list[str] | None = None


def _watch(event, _arguments):
    if _seen is not None and event in _forbidden:
        _seen.append(event)
        raise RuntimeError(f"{event} while reading bad data")


sys.addaudithook(_watch)  # it cannot be taken away again, so that a switch is kept


@pytest.fixture(autouse=True)
def nothing_but_reading():
    """No socket, no program, no unpickling, and an end after some seconds."""
    global _seen

    def stop(*_):
        raise TimeoutError(f"reading bad data took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    _seen = []
    yield
    seen, _seen = _seen, None
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert not seen


EVERY_KIND = OtherMedia(
    frames=Gemma4ImageProcessorPil(max_soft_tokens=70), extractor=Gemma4AudioFeatureExtractor()
)


@pytest.fixture
def run(tokenizer, tiny_processor):
    def run(name, others=EVERY_KIND, **settings):
        config = DataConfig(path=str(FOLDER / name), eval_fraction=0.0, **settings)
        return prepare(config, tokenizer, tiny_processor, 0, others=others)[0]

    return run


def check_row(run, name, row, says, settings):
    path = FOLDER / name
    with pytest.raises(DataError) as caught:
        run(name, **settings)
    said = str(caught.value)
    assert re.match(rf"{re.escape(str(path))} {row}[:,] ", said), said
    assert re.search(says, said), said
    assert said.count(str(path)) == 1 and "\n" not in said
    kept = run(name, on_bad_row="skip", **settings)
    assert (len(kept), kept.rejected) == (2, [said])


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_or_left_out_alone(run, name):
    check_row(run, name, *BAD_ROWS[name], {})


@pytest.mark.parametrize("name", SETTINGS)
def test_a_bad_row_under_other_settings(run, name):
    settings, row, says = SETTINGS[name]
    check_row(run, name, row, says, settings)


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_whatever_may_be_skipped(run, name):
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError, match=BAD_FILES[name]) as caught:
            run(name, on_bad_row=on_bad_row)
        assert str(FOLDER / name) in str(caught.value)


def test_a_byte_order_mark_is_no_fault(run):
    assert len(run("bom.jsonl")) == 2


def test_ids_that_stand_twice(run):
    """1 and "1" are one id; 7 is another."""
    with pytest.raises(DataError, match=r"line 2: its id '1' stands already at .* line 1\. Remove"):
        run("duplicate_ids.jsonl")
    kept = run("duplicate_ids.jsonl", on_bad_row="skip")
    assert (len(kept), len(kept.rejected)) == (3, 1)
    assert len(run("duplicate_ids.jsonl", id_column=None)) == 4


def test_a_truncated_image_is_named_when_it_is_decoded(run):
    kept = run("image_truncated.jsonl")
    with pytest.raises(DataError, match=r"image_truncated.jsonl line 2: the image is damaged"):
        kept[1]


@pytest.mark.parametrize("name", VIDEO_FILES)
def test_a_bad_video_file(run, name):
    pytest.importorskip("av", reason="PyAV is not installed: pip install -e '.[video]'")
    settings, says = VIDEO_FILES[name]
    check_row(run, name, "line 2", says, settings)


def test_a_video_file_without_what_decodes_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    check_row(run, "video_too_long.jsonl", "line 2", "pip install av; or give", {})


def test_a_recording_that_is_longer_than_the_model_hears(run):
    deaf = OtherMedia(extractor=Gemma4AudioFeatureExtractor(), max_audio_tokens=4)
    says = "the audio takes 0.2 s; Gemma 4 hears at most 0.16 s. Cut it"
    check_row(run, "audio_too_long.jsonl", "line 2", says, {"others": deaf})


@pytest.mark.parametrize("name", ["audio_too_long.jsonl", "video_too_long.jsonl"])
def test_media_that_the_model_does_not_take(run, name):
    none = OtherMedia(refusals=dict.fromkeys(("audio", "video"), "the model has no tower for it"))
    says = "is not read: the model has no tower for it. Leave such rows out"
    check_row(run, name, "line 2", says, {"others": none})


def test_pipes_and_loops_are_not_waited_for(run, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name in ("pipe.jsonl", "loop.jsonl"):
        with pytest.raises(DataError, match=name):
            run(tmp_path / name)


def test_every_file_is_tried():
    tried = {*BAD_ROWS, *SETTINGS, *VIDEO_FILES, *BAD_FILES, *OTHERS}
    assert tried == {file.name for file in FOLDER.iterdir() if file.is_file()} - {"README.md"}
    assert len(tried) >= 30


def test_the_watch_sees_what_it_is_to_see():
    """Otherwise nothing above says anything about sockets and programs."""
    import pickle
    import socket
    import subprocess

    for forbidden in (
        lambda: socket.socket(),
        lambda: subprocess.run(["true"]),
        lambda: os.system("true"),
        lambda: pickle.loads(pickle.dumps(print)),
    ):
        with pytest.raises(RuntimeError, match="while reading bad data"):
            forbidden()
    assert _seen is not None
    _seen.clear()
