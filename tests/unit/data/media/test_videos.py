"""Videos from files and from frames: which frames, when they are, and their patches."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image
from recordings import frame, png, video
from transformers import Gemma4ImageProcessorPil
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from gemtune.data.media.files import MediaPolicy
from gemtune.data.media.images import ImageEncoder
from gemtune.data.media.videos import VideoEncoder
from gemtune.errors import DataError

PROCESSOR = Gemma4ImageProcessorPil(max_soft_tokens=70)


@pytest.fixture
def make(tmp_path):
    def of(num_frames=32, **policy):
        images = ImageEncoder(PROCESSOR, tmp_path, MediaPolicy(**policy))
        return VideoEncoder(images, num_frames)

    return of


@pytest.fixture(scope="module")
def av():
    return pytest.importorskip("av", reason="PyAV is not installed: pip install -e '.[video]'")


def greys(encoded):
    """The number of each frame, by its grey: see `recordings.frame`."""
    return [round(float(pixels.mean()) * 51) for pixels in encoded.pixels]


# Frames given as images


@pytest.mark.parametrize("total", [1, 2, 31, 32, 33, 51])
def test_of_many_frames_those_are_taken_that_transformers_takes(make, total):
    encoder = make()
    found = encoder.open([frame(n) for n in range(total)], "")
    metadata = VideoMetadata(total_num_frames=total, fps=24.0)
    count = min(total, 32)  # of fewer, transformers takes none
    expected = default_sample_indices_fn(metadata, num_frames=count)
    assert list(found.indices) == expected.tolist()
    metadata.frames_indices = expected
    assert list(found.timestamps) == pytest.approx(metadata.timestamps)
    assert greys(encoder.encode(found, "")) == expected.tolist()


def test_a_frame_is_the_image_that_it_is(make):
    """Of each: pixels, positions, soft tokens, by the image processor with the video's budget."""
    encoder = make()
    noise = np.random.default_rng(0).integers(0, 256, (2, 90, 160, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in noise]
    found = encoder.open(images, "")
    encoded = encoder.encode(found, "")
    for number, image in enumerate(images):
        expected = PROCESSOR(image, return_tensors="np")
        count = int(expected["num_soft_tokens_per_image"][0])
        assert encoder.num_soft_tokens(found) == count == 66
        assert np.array_equal(encoded.pixels[number], expected["pixel_values"][0][: 9 * count])
        places = expected["image_position_ids"][0][: 9 * count]
        assert np.array_equal(encoded.positions[number], places)
    assert encoded.num_soft_tokens == 132


@pytest.mark.parametrize(
    ("times", "stamps"),
    [
        ({}, ["00:00", "00:00", "00:00"]),  # 24 a second
        ({"fps": 0.5}, ["00:00", "00:02", "00:04"]),
        ({"fps": 1}, ["00:00", "00:01", "00:02"]),
        ({"timestamps": [0, 59.99, 60]}, ["00:00", "00:59", "01:00"]),
        ({"timestamps": [3599, 3600, 6000]}, ["59:59", "60:00", "100:00"]),
    ],
)
def test_when_a_frame_is(make, times, stamps):
    encoder = make()
    found = encoder.open({"frames": [frame(n) for n in range(3)]} | times, "")
    assert encoder.stamps(found) == stamps


def test_frames_as_paths_bytes_and_a_folder_are_the_same(make, tmp_path):
    (tmp_path / "clip").mkdir()
    images = [png(frame(n)) for n in range(11)]
    for number, data in enumerate(images):
        (tmp_path / "clip" / f"{number:02d}.png").write_bytes(data)
    (tmp_path / "clip" / "notes.txt").write_text("no frame")
    encoder = make()
    given = [
        images,
        [f"clip/{n:02d}.png" for n in range(11)],
        "clip",
        {"path": "clip", "fps": 24},
        {"frames": [{"bytes": data, "path": None} for data in images], "fps": None},
    ]
    found = [encoder.encode(encoder.open(each, ""), "") for each in given]
    assert all(greys(each) == list(range(11)) for each in found)


FRAMES = [frame(0), frame(1)]
BAD = [
    ([], "the video has no frames"),
    ({"frames": FRAMES, "fps": 0}, "'fps' of a video must be a number above 0, not 0"),
    ({"frames": FRAMES, "fps": float("nan")}, "'fps' of a video must be a number above 0"),
    ({"frames": FRAMES, "fps": 1, "timestamps": [0, 1]}, "'fps' and 'timestamps' .* Keep one"),
    ({"frames": FRAMES, "timestamps": [0]}, "must be a list of the seconds of each of its 2"),
    ({"frames": FRAMES, "timestamps": [0, -1]}, "must be a list of the seconds of each of its 2"),
    ({"frames": FRAMES, "timestamps": [1, 0]}, "'timestamps' of a video must not go back"),
    ([frame(0), frame(1, 48, 96)], "frame 2 has 48 x 96 pixels, the first 96 x 96"),
    ([frame(0), "gone.png"], "there is no image file .*gone.png"),
    ([frame(0), b"no image"], "not an image that can be read"),
    (["../secret.png"], "there is no image file|is outside of"),
    ([frame(0)] * 101, "the video has 101 frames, and data.max_video_frames=100"),
    (3, "a video must be bytes or a file path, not int"),
    ("gone.mp4", "there is no video file"),
    ("/etc", "is outside of .* Move it inside"),
    (".", "the folder .* has no images to be the frames of a video"),
    ("https://a.org/b.mp4", "videos are not fetched from URLs"),
]


@pytest.mark.parametrize(("given", "says"), BAD, ids=range(len(BAD)))
def test_frames_that_are_no_video(make, given, says):
    with pytest.raises(DataError, match="^row 3[:,] .*(" + says + ")"):
        make(max_video_frames=100).open(given, "row 3")


# Files


FILES = [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")]


@pytest.mark.parametrize(("container", "codec"), FILES)
def test_a_file_is_counted_by_its_header_and_its_frames_are_those_chosen(
    av, make, container, codec
):
    data = video(50, 25, container, codec)
    encoder = make()
    found = encoder.open(data, "")
    assert (found.header.num_frames, found.header.fps, found.size) == (50, 25, (96, 96))
    assert list(found.indices) == [n * 50 // 32 for n in range(32)]
    assert list(found.timestamps) == pytest.approx([index / 25 for index in found.indices])
    assert encoder.num_soft_tokens(found) == 64
    encoded = encoder.encode(found, "")
    assert encoded.pixels.shape == (32, 576, 768)
    assert max(abs(a - b) for a, b in zip(greys(encoded), found.indices, strict=True)) <= 1


def test_a_file_by_path_and_by_bytes(av, make, tmp_path):
    data = video(3)
    (tmp_path / "a.mp4").write_bytes(data)
    encoder = make()
    by_path, by_bytes = (encoder.encode(encoder.open(x, ""), "") for x in ("a.mp4", data))
    assert np.array_equal(by_path.pixels, by_bytes.pixels) and len(by_path.pixels) == 3


def test_files_of_transformers_and_ours_have_the_same_frames(av, make, tmp_path):
    """`read_video_pyav` of transformers, with its own choice of frames."""
    from transformers.video_utils import read_video_pyav

    (tmp_path / "a.mp4").write_bytes(video(50))
    pixels, metadata = read_video_pyav(
        str(tmp_path / "a.mp4"), lambda metadata: default_sample_indices_fn(metadata, num_frames=32)
    )
    encoder = make()
    found = encoder.open("a.mp4", "")
    assert list(found.timestamps) == metadata.timestamps
    encoded = encoder.encode(found, "")
    expected = [PROCESSOR(each, return_tensors="np")["pixel_values"][0][:576] for each in pixels]
    assert np.array_equal(encoded.pixels, np.stack(expected))


def test_without_pyav_files_are_refused_and_frames_are_not(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    says = r"^row 3: .* PyAV, which is not installed. Install it: pip install av"
    with pytest.raises(DataError, match=says):
        make().open(b"a video", "row 3")
    assert len(make().open([frame(0)], "row 3").indices) == 1


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"max_media_bytes": 1000}, "data.max_media_bytes=1,000"),
        ({"max_video_seconds": 4.0}, r"the video takes 5\.0 s, and data.max_video_seconds=4 "),
        ({"max_video_frames": 49}, "the video has 50 frames, and data.max_video_frames=49 "),
        ({"max_image_pixels": 9000}, "96 x 96 are 9,216 pixels, and data.max_image_pixels=9,000"),
    ],
)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_what_is_too_much_is_not_decoded(av, make, policy, says, container, monkeypatch):
    import gemtune.data.media.video_files as files

    monkeypatch.setattr(files, "_frames", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="^row 3: .*" + says):
        make(**policy).open(video(50, container=container), "row 3")


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_a_file_that_is_cut_off_is_found_when_it_is_opened_or_decoded(av, make, container):
    whole = video(50, container=container)
    for share in (0, 0.01, 0.3, 0.7):
        data = whole[: int(len(whole) * share)]
        with pytest.raises(DataError, match=r"^row 3: (not a video|the video is (cut|damaged))"):
            encoder = make()
            encoder.encode(encoder.open(data, "row 3"), "row 3")
        with pytest.raises(DataError, match=r"^row 3: "):
            make(verify_media=True).open(data, "row 3")


HOSTILE = [
    b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile /etc/passwd\n",
    b"\0" * 10_000,
    png(frame(1)),
    b"RIFF\0\0\0\0WAVEfmt ",
]


@pytest.mark.parametrize("data", HOSTILE, ids=["hls", "concat", "zeros", "png", "wav"])
def test_what_is_no_video_or_leads_elsewhere_is_refused(av, make, data):
    with pytest.raises(DataError, match=r"^row 3: not a video that can be read"):
        make().open(data, "row 3")


def test_damaged_bytes_are_an_error_or_a_picture_and_never_a_crash(av, make):
    whole = bytearray(video(20))
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(40):
        data = bytearray(whole)
        for place in random.integers(0, len(data), 30):
            data[place] = random.integers(256)
        encoder = make()
        try:
            encoder.encode(encoder.open(bytes(data), "row 3"), "row 3")
            outcomes.add("read")
        except DataError as error:
            assert str(error).startswith("row 3")
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_telephone_that_lay_on_its_side(av, make):
    """The picture is turned as the file says, as EXIF turns an image."""
    from gemtune.data.media.video_files import _upright

    class Turned:
        rotation = -90

        def to_image(self):
            image = frame(0, 96, 48)
            image.putpixel((0, 0), (255, 0, 0))
            return image

    image = _upright(Turned())
    assert image.size == (48, 96)
    assert image.getpixel((47, 0)) == (255, 0, 0)  # a quarter turn clockwise
