"""Small recordings for tests: WAV files of every kind, frames and, where PyAV is, video files."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image

RATE_HZ = 16_000


def tone(seconds: float, hertz: float = 440.0, seed: int = 0) -> np.ndarray:
    """[N] float64 in [-0.8, 0.8]: a tone with a little noise."""
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    noise = np.random.default_rng(seed).uniform(-0.1, 0.1, len(time))
    return 0.7 * np.sin(2 * np.pi * hertz * time) + noise


def wav(
    samples: np.ndarray,
    bits: int = 16,
    *,
    is_float: bool = False,
    rate: int = RATE_HZ,
    extensible: bool = False,
    announced_bytes: int | None = None,
    before: bytes = b"",
) -> bytes:
    """A WAV file of [N] or [N, channels] values in [-1, 1], by the RIFF specification.

    `before`: chunks between the format and the samples.
    """
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    if is_float:
        data = samples.astype(f"<f{bits // 8}").tobytes()
    else:
        values = np.round(samples * (2 ** (bits - 1) - 1)).astype(np.int64)
        if bits == 8:
            values += 128
        wide = values.astype("<i8").reshape(-1, 1).view(np.uint8)
        data = wide[:, : bits // 8].tobytes()
    block = channels * bits // 8
    kind = 3 if is_float else 1
    layout = struct.pack(
        "<HHIIHH", 0xFFFE if extensible else kind, channels, rate, rate * block, block, bits
    )
    if extensible:
        guid = bytes.fromhex("000000001000800000aa00389b71")
        layout += struct.pack("<HHIH", 22, bits, 4, kind) + guid
    size = len(data) if announced_bytes is None else announced_bytes
    chunks = b"fmt " + struct.pack("<I", len(layout)) + layout + before
    chunks += b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def frame(number: int, width: int = 96, height: int = 96) -> Image.Image:
    """A picture whose grey tells its number: 5 more for each."""
    return Image.new("RGB", (width, height), (5 * number,) * 3)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def video(
    num_frames: int = 50,
    fps: int = 10,
    container: str = "mp4",
    codec: str = "mpeg4",
    size: tuple[int, int] = (96, 96),
    rows: Any = frame,
) -> bytes:
    """A video file of `frame`s, made by PyAV."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            file.mux(stream.encode(av.VideoFrame.from_image(rows(number, *size))))
        file.mux(stream.encode())
    return buffer.getvalue()
