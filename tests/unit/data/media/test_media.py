"""Images become what the stock image processor makes of them, and damage is named."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import Gemma4ImageProcessorPil

from gemtune.data.media.images import ImageEncoder
from gemtune.errors import DataError

SIZES = [
    (640, 480), (480, 640), (1, 1), (7, 5), (48, 48), (47, 49), (96, 96), (100, 3000),
    (3000, 100), (5000, 1), (1, 5000), (20000, 2), (13, 2500), (1920, 1080), (768, 840),
    (1000, 999), (33, 61), (336, 240), (1680, 30),
]  # fmt: skip
BUDGETS = [70, 140, 280, 560, 1120]
ORIENTATION = 0x0112


@pytest.fixture
def encoder(stock_processor):
    return ImageEncoder(stock_processor)


@pytest.fixture
def tiny(tiny_processor):
    return ImageEncoder(tiny_processor)


def stock_patches(processor, image, **options):
    """(pixels, positions, tokens) of the stock processor, its padding taken off by position."""
    features = processor(image, return_tensors="np", **options)
    real = features["image_position_ids"][0][:, 0] >= 0
    positions = features["image_position_ids"][0][real]
    tokens = int(features["num_soft_tokens_per_image"][0])
    return features["pixel_values"][0][real], positions, tokens


def assert_encodes_like(encoder, given, image, **options):
    """`given` (bytes) is encoded as the stock processor encodes `image`."""
    opened = encoder.open(given, "row 1")
    pixels, positions, tokens = stock_patches(encoder.processor, image, **options)
    assert encoder.num_soft_tokens(opened) == tokens
    encoded = encoder.encode(opened, "row 1")
    assert encoded.num_soft_tokens == tokens
    assert encoded.pixels.dtype == np.float32 and encoded.positions.dtype == np.int64
    np.testing.assert_array_equal(encoded.pixels, pixels)
    np.testing.assert_array_equal(encoded.positions, positions)


# Size and patches


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_count_from_the_size_is_the_processors(budget):
    processor = Gemma4ImageProcessorPil(max_soft_tokens=budget)
    encoder = ImageEncoder(processor)
    # The largest budget makes the largest arrays: fewer sizes there.
    for size in SIZES if budget <= 280 else SIZES[::4]:
        image = Image.new("RGB", size)
        tokens = int(processor(image, return_tensors="np")["num_soft_tokens_per_image"][0])
        assert encoder.num_soft_tokens(image) == tokens, size


def test_640x480_takes_266_tokens(encoder):
    assert encoder.num_soft_tokens(Image.new("RGB", (640, 480))) == 266


@pytest.mark.parametrize("size", [(640, 480), (9, 400), (768, 840), (50, 50)])
def test_patches_are_the_processors_without_padding(encoder, make_image, encode_file, size):
    image = make_image(*size)
    assert_encodes_like(encoder, encode_file(image), image)


@pytest.mark.parametrize("size", [(48, 48), (96, 144), (480, 336)])
def test_without_resizing_an_image_on_the_grid_is_untouched(tiny, make_image, encode_file, size):
    image = make_image(*size)
    encoded = tiny.encode(tiny.open(encode_file(image), ""), "")
    width, height = size
    expected = np.asarray(image).reshape(height // 16, 16, width // 16, 16, 3).swapaxes(1, 2)
    expected = expected.reshape(-1, 768) / 255
    np.testing.assert_allclose(encoded.pixels, expected, atol=1e-6)
    assert encoded.positions[1].tolist() == [1, 0]  # x first
    assert tiny.num_soft_tokens(image) == width * height // 48**2 == encoded.num_soft_tokens


@pytest.mark.parametrize("size", [(50, 48), (47, 47), (10, 300), (960, 480), (640, 480)])
def test_without_resizing_any_other_image_is_resized(tiny, make_image, encode_file, size):
    image = make_image(*size)
    assert_encodes_like(tiny, encode_file(image), image, do_resize=True)


# Orientation and colours


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_in_count_and_pixels(
    tiny, make_image, encode_file, format, orientation
):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode_file(make_image(96, 48), format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((96, 48) if orientation < 5 else (48, 96))
    assert_encodes_like(tiny, data, upright.convert("RGB"))


@pytest.mark.parametrize("size", SIZES)
def test_the_count_of_a_turned_image_is_the_same(encoder, tiny, encode_file, size):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encode_file(Image.new("RGB", size), "TIFF" if max(size) > 4000 else "JPEG", exif=exif)
    for each in (encoder, tiny):
        turned = each.open(data, "")
        counted = each.num_soft_tokens(turned)
        assert counted == each.encode(turned, "").num_soft_tokens


def test_exif_behind_the_pixels_of_a_png_counts_too(tiny, make_image, encode_file):
    image = make_image(96, 48)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encode_file(image, exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert_encodes_like(tiny, moved, image.transpose(Image.Transpose.ROTATE_270))


@pytest.mark.filterwarnings("ignore:.*EXIF")
@pytest.mark.parametrize("exif", [b"MM\0*" + b"\xff" * 40, b"garbage, no header", b"II", b""])
def test_malformed_exif_is_no_orientation(tiny, make_image, encode_file, exif):
    image = make_image(96, 48)
    data = encode_file(image, exif=b"Exif\0\0" + exif)
    assert_encodes_like(tiny, data, image)


def test_counting_does_not_decode_a_png(encoder, png):
    image = encoder.open(png(640, 480), "")
    encoder.num_soft_tokens(image)
    assert image._im is None


def test_transparency_becomes_white(tiny, encode_file):
    rgba = np.zeros((48, 48, 4), np.uint8)
    rgba[:24] = (200, 100, 50, 255)  # opaque above; black, hidden, below
    rgba[24:36] = (0, 0, 0, 0)
    rgba[36:] = (0, 0, 0, 51)  # a fifth
    encoded = tiny.encode(tiny.open(encode_file(Image.fromarray(rgba)), ""), "")
    rows = encoded.pixels.reshape(3, 3, 16, 16, 3).swapaxes(1, 2).reshape(48, 48, 3) * 255
    np.testing.assert_allclose(rows[:24], np.broadcast_to([200, 100, 50], (24, 48, 3)), atol=1e-3)
    np.testing.assert_allclose(rows[24:36], 255, atol=1e-3)
    np.testing.assert_allclose(rows[36:], 204, atol=1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_become_the_rgb_that_the_processor_makes(tiny, make_image, encode_file, mode):
    image = make_image(48, 48).convert(mode)
    data = encode_file(image, "TIFF" if mode == "CMYK" else "PNG")
    assert_encodes_like(tiny, data, image)


def test_palette_with_a_transparent_colour(tiny, make_image, encode_file):
    image = make_image(48, 48).quantize(4)
    data = encode_file(image, transparency=0)
    hidden = np.asarray(image) == 0
    encoded = tiny.encode(tiny.open(data, ""), "")
    pixels = encoded.pixels.reshape(3, 3, 16, 16, 3).swapaxes(1, 2).reshape(48, 48, 3)
    assert (pixels[hidden] == 1).all()
    assert not (pixels[~hidden] == 1).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_high_byte(tiny, encode_file, format):
    values = np.arange(48 * 48, dtype=np.uint16).reshape(48, 48) * 28
    data = encode_file(Image.fromarray(values), format)
    assert_encodes_like(tiny, data, Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB"))


def test_16_bit_rgb(tiny):
    """Pillow cannot write one, so the file is made by hand."""
    values = np.random.default_rng(0).integers(0, 65536, (48, 48, 3)).astype(">u2")

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    lines = b"".join(b"\0" + line.tobytes() for line in values)
    header = struct.pack(">IIBBBBB", 48, 48, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    assert_encodes_like(tiny, data, Image.fromarray((values >> 8).astype(np.uint8)))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bit_values_are_refused(tiny, encode_file, dtype):
    data = encode_file(Image.fromarray(np.full((48, 48), 70000, dtype)), "TIFF")
    with pytest.raises(DataError, match=r"^row 4: .*32-bit .*8 bits a channel"):
        tiny.encode(tiny.open(data, "row 4"), "row 4")


# What is not an image


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_truncated_image_is_named(encoder, make_image, encode_file, format):
    data = encode_file(make_image(200, 200), format)
    with pytest.raises(DataError, match=r"^f\.parquet row 7: "):
        image = encoder.open(data[: len(data) // 2], "f.parquet row 7")
        encoder.num_soft_tokens(image)
        encoder.encode(image, "f.parquet row 7")


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_truncated_image_is_damaged_when_decoded(encoder, make_image, encode_file, format):
    data = encode_file(make_image(200, 200), format)
    image = encoder.open(data[: len(data) // 2], "row 7")
    assert encoder.num_soft_tokens(image) == 256  # the header is whole
    with pytest.raises(DataError, match=r"^row 7: the image is damaged"):
        encoder.encode(image, "row 7")


@pytest.mark.parametrize("given", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_bytes_that_are_no_image(encoder, given):
    with pytest.raises(DataError, match=r"^row 2: not an image"):
        encoder.open(given, "row 2")


@pytest.mark.parametrize("given", [None, 3, ["a.png"], {}, {"bytes": None, "path": None}, {"a": 1}])
def test_a_wrong_type(encoder, given):
    with pytest.raises(DataError, match=r"^row 2: an image must be bytes, a file path or a PIL"):
        encoder.open(given, "row 2")


def test_a_path_starts_from_the_media_root(stock_processor, tmp_path, png, monkeypatch):
    (tmp_path / "pictures").mkdir()
    file = tmp_path / "pictures" / "a.png"
    file.write_bytes(png(96, 48))
    encoder = ImageEncoder(stock_processor, tmp_path)
    for given in ("pictures/a.png", {"path": "pictures/a.png"}, str(file)):
        assert encoder.open(given, "").size == (96, 48)
    assert encoder.open({"bytes": png(48, 48), "path": "pictures/a.png"}, "").size == (48, 48)
    monkeypatch.chdir(tmp_path)  # which is no root
    with pytest.raises(DataError, match=r"^row 5: .* below data.media_root only, .* not set"):
        ImageEncoder(stock_processor).open("pictures/a.png", "row 5")
    encoder = ImageEncoder(stock_processor, tmp_path / "gone")
    assert encoder.open("a.png", "", tmp_path / "pictures").size == (96, 48)


@pytest.mark.parametrize("path", ["gone.png", "gone/../gone.png"])
def test_a_missing_file(stock_processor, tmp_path, path):
    full = str(tmp_path / path)
    with pytest.raises(DataError, match=r"^row 5: there is no image file") as caught:
        ImageEncoder(stock_processor, tmp_path).open(path, "row 5")
    assert full in str(caught.value)


@pytest.mark.parametrize("path", ["", ".", "a\0b", "x" * 5000])
def test_a_path_that_is_no_file(stock_processor, tmp_path, path):
    with pytest.raises(DataError, match=r"^row 5: (not a path that can be|.* not a regular file)"):
        ImageEncoder(stock_processor, tmp_path).open(path, "row 5")


@pytest.mark.parametrize("url", ["https://a.org/b.png", "file:///b.png", "data:image/png;base64,A"])
def test_urls_are_refused(encoder, url):
    with pytest.raises(DataError, match=r"^row 5: .*URLs .*Save it first"):
        encoder.open(url, "row 5")


@pytest.mark.parametrize("limit", [3000, 1000])
def test_decompression_bombs_are_refused_without_a_warning(encoder, png, monkeypatch, limit):
    """Pillow only warns between its limit and twice that."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match=r"^row 6: the image is too large"):
            encoder.open(png(64, 64), "row 6")
    assert not shown
