"""WAV files: what the header says, and the samples.

Python's `wave` knows neither floats nor the extensible header, which ffmpeg writes for 24 bits.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

_PCM, _FLOAT, _EXTENSIBLE = 0x0001, 0x0003, 0xFFFE
_KINDS = {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}
# Written to a pipe, the length is not known yet: it is that of the file.
_UNKNOWN_LENGTH = 0xFFFFFFFF
_MAX_CHUNKS = 1000
_MAX_FORMAT_BYTES = 4096


class WaveError(ValueError):
    """Not a WAV file that can be read, and why."""


@dataclass(frozen=True)
class WaveHeader:
    """What a WAV file says of its samples, and where they stand."""

    rate_hz: int
    num_channels: int
    num_samples: int
    """Of one channel."""
    bits: int
    is_float: bool
    offset: int


def read_header(file: BinaryIO) -> WaveHeader:
    """Of the RIFF chunks, `fmt ` and the place of `data`; no sample is read.

    Raises:
        WaveError: another format, or a file that ends before its header says.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(12)
    if len(start) < 12 or start[:4] != b"RIFF" or start[8:] != b"WAVE":
        raise WaveError("it does not begin as a RIFF/WAVE file does")
    layout = None
    for _ in range(_MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise WaveError("it has no samples (no data chunk)")
        name, length = struct.unpack("<4sI", head)
        if name == b"data":
            break
        if name == b"fmt ":
            content = file.read(min(length, _MAX_FORMAT_BYTES))
            layout = _layout(content)
            file.seek(length - len(content), io.SEEK_CUR)
        else:
            file.seek(length, io.SEEK_CUR)
        file.seek(length % 2, io.SEEK_CUR)
    else:
        raise WaveError(f"its samples do not come within {_MAX_CHUNKS} chunks")
    if layout is None:
        raise WaveError("its samples come before their format")
    offset = file.tell()
    if length == _UNKNOWN_LENGTH:
        length = size - offset
    if length > size - offset:
        raise WaveError(
            f"it is cut off: {length:,} bytes of samples are announced, {size - offset:,} are there"
        )
    rate, channels, bits, is_float = layout
    return WaveHeader(rate, channels, length // (channels * bits // 8), bits, is_float, offset)


def _layout(content: bytes) -> tuple[int, int, int, bool]:
    """(samples a second, channels, bits, whether they are floats)"""
    if len(content) < 16:
        raise WaveError("its format chunk is too short")
    kind, channels, rate, _, block, bits = struct.unpack("<HHIIHH", content[:16])
    if kind == _EXTENSIBLE and len(content) >= 26:
        (kind,) = struct.unpack("<H", content[24:26])
    if (kind, bits) not in _KINDS:
        raise WaveError(f"samples of kind {kind} with {bits} bits are not read, PCM and floats are")
    if not channels or not rate or block != channels * bits // 8:
        raise WaveError("its format chunk contradicts itself")
    return rate, channels, bits, kind == _FLOAT


def read_samples(file: BinaryIO, header: WaveHeader) -> np.ndarray:
    """[N] float32 in [-1, 1], the mean of the channels.

    Raises:
        WaveError: fewer bytes than there were, or a float that is no number.
    """
    width = header.bits // 8
    num_bytes = header.num_samples * header.num_channels * width
    file.seek(header.offset)
    raw = file.read(num_bytes)
    if len(raw) != num_bytes:
        raise WaveError("it is cut off")
    if header.is_float:
        samples = np.frombuffer(raw, dtype=f"<f{width}").astype(np.float32)
        if not np.isfinite(samples).all():
            raise WaveError("a sample is not a finite number")
    elif header.bits == 8:  # unsigned
        samples = (np.frombuffer(raw, dtype=np.uint8).astype(np.float32) - 128) / 128
    elif header.bits == 24:
        wide = np.zeros((num_bytes // 3, 4), dtype=np.uint8)
        wide[:, 1:] = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 3)
        samples = (wide.view("<i4")[:, 0] / 2**31).astype(np.float32)
    else:
        values = np.frombuffer(raw, dtype=f"<i{width}")
        samples = (values / 2 ** (header.bits - 1)).astype(np.float32)
    if header.num_channels == 1:
        return samples
    return samples.reshape(-1, header.num_channels).mean(axis=1, dtype=np.float32)
