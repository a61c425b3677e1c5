"""Paths stay inside their root, and headers are looked at before anything is decoded."""

import io
import os
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from gemtune.data.media.files import MediaPolicy
from gemtune.data.media.images import ImageEncoder
from gemtune.errors import DataError


@pytest.fixture
def root(tmp_path, png):
    """root/in/a.png and, outside of the root, secret.png."""
    (tmp_path / "root" / "in").mkdir(parents=True)
    (tmp_path / "root" / "in" / "a.png").write_bytes(png(96, 48))
    (tmp_path / "secret.png").write_bytes(png(48, 48))
    return tmp_path / "root"


@pytest.fixture
def open_in(stock_processor, root):
    def open_in(path, **policy):
        return ImageEncoder(stock_processor, root, MediaPolicy(**policy)).open(path, "row 3")

    return open_in


def test_paths_inside(open_in, root, tmp_path):
    (root / "link.png").symlink_to("in/a.png")
    (tmp_path / "door").symlink_to(root)
    for path in ("in/a.png", "in/../in/a.png", "link.png", str(root / "in" / "a.png"), "./in/a.png",
                 str(tmp_path / "door" / "in" / "a.png")):  # fmt: skip
        assert open_in(path).size == (96, 48)


def test_a_root_that_is_a_link(stock_processor, root, tmp_path):
    (tmp_path / "door").symlink_to(root)
    assert ImageEncoder(stock_processor, tmp_path / "door").open("in/a.png", "").size == (96, 48)


def test_paths_that_lead_outside(open_in, root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (root / "file").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "twice").symlink_to("file")
    (tmp_path / "rooted").mkdir()  # begins with the name of the root
    (tmp_path / "rooted" / "a.png").write_bytes(b"")
    for path in ("../secret.png", "in/../../secret.png", "file", "folder/secret.png", "twice",
                 str(tmp_path / "secret.png"), "/etc/passwd", "~/secret.png", "../rooted/a.png",
                 "/proc/self/environ"):  # fmt: skip
        with pytest.raises(DataError, match=r"^row 3: image .* is outside of .*data.media_root"):
            open_in(path)


def test_a_link_that_turns_in_a_circle(open_in, root):
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    with pytest.raises(DataError, match=r"^row 3: "):
        open_in("a")


def test_what_is_no_regular_file_is_not_waited_for(open_in, root):
    os.mkfifo(root / "pipe.png")
    for path in ("pipe.png", "in"):
        with pytest.raises(DataError, match=r"^row 3: .* is not a regular file"):
            open_in(path)


def test_too_many_bytes_and_pixels(open_in, root, png):
    with pytest.raises(DataError, match=r"^row 3: the image has .* data.max_media_bytes=100 are"):
        open_in("in/a.png", max_media_bytes=100)
    with pytest.raises(DataError, match=r"^row 3: the image has .* data.max_media_bytes=100 are"):
        open_in(png(96, 48), max_media_bytes=100)
    said = r"^row 3: the image is too large: 96 x 48 are 4,608 pixels, and data.max_image_pixels="
    with pytest.raises(DataError, match=said):
        open_in("in/a.png", max_image_pixels=4607)
    assert open_in("in/a.png", max_image_pixels=4608).size == (96, 48)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def black_png(side):
    """A square of one bit a pixel: a few kilobytes, whatever its size."""
    lines = zlib.compressobj(9)
    line = b"\0" * (1 + (side + 7) // 8)
    data = b"".join(lines.compress(line) for _ in range(side)) + lines.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_169_megapixels_are_refused_by_their_header(open_in, root):
    data = black_png(13_000)
    assert len(data) < 100_000
    (root / "big.png").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"^row 3: the image is too large"):
        open_in("big.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_formats_that_run_programs_are_not_tried(open_in, root, tmp_path):
    """Pillow hands EPS to Ghostscript."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for data in (eps, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0\0\1\0\1\0"):
        with pytest.raises(DataError, match=r"^row 3: not an image that can be read. The formats"):
            open_in(data)


def test_an_animation_gives_its_first_frame(tiny_processor):
    frames = [Image.new("RGB", (48, 48), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], lossless=True)
        encoder = ImageEncoder(tiny_processor)
        encoded = encoder.encode(encoder.open(buffer.getvalue(), ""), "")
        red = np.array([254 / 255, 0, 0])
        assert np.abs(encoded.pixels.reshape(-1, 3) - red).max() < 0.02, kind


def test_cmyk_jpeg(tiny_processor, make_image, encode_file):
    image = Image.new("CMYK", (48, 48), (0, 255, 255, 0))
    encoder = ImageEncoder(tiny_processor)
    encoded = encoder.encode(encoder.open(encode_file(image, "JPEG"), ""), "")
    assert np.abs(encoded.pixels.reshape(-1, 3) - [1, 0, 0]).max() < 0.02


def test_images_can_be_decoded_when_they_are_opened(stock_processor, png, make_image, encode_file):
    encoder = ImageEncoder(stock_processor, None, MediaPolicy(verify_media=True))
    assert encoder.open(png(96, 48), "row 3").size == (96, 48)
    for data in (encode_file(make_image(200, 200), "JPEG")[:5000], png(200, 200)[:5000]):
        with pytest.raises(DataError, match=r"^row 3: the image is damaged"):
            encoder.open(data, "row 3")


def test_reading_an_image_starts_no_program_and_opens_no_socket(root):
    """In a process of its own, whose audit hook ends it at the first attempt."""
    code = """if True:
        import os, sys
        from pathlib import Path
        from transformers import Gemma4ImageProcessorPil
        from gemtune.data.media.images import ImageEncoder
        from gemtune.errors import DataError
        encoder = ImageEncoder(Gemma4ImageProcessorPil(), Path(sys.argv[1]))
        starting = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system")
        def stop(event, _):
            if event.split(".")[0] in ("socket", "subprocess") or event in starting:
                os._exit(7)
        sys.addaudithook(stop)
        assert encoder.open("in/a.png", "").size == (96, 48)
        for bad in ("http://127.0.0.1/a.png", "../secret.png", b"%!PS-Adobe-3.0 EPSF-3.0\\n"):
            try:
                encoder.open(bad, "")
            except DataError:
                continue
            os._exit(8)
    """
    assert subprocess.run([sys.executable, "-c", code, str(root)], timeout=120).returncode == 0
