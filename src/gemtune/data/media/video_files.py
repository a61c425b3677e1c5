"""Video files, decoded by PyAV where it is installed."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from gemtune.data.media.files import MediaPolicy
from gemtune.errors import DataError

# What data may be decoded by. FFmpeg knows hundreds, some of which open other files or addresses
# (hls, concat), run scripts, or are no videos.
CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg")
CODECS = (
    *("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libaom-av1", "mpeg4", "mpeg1video"),
    *("mpeg2video", "mjpeg", "theora", "flv1", "flv", "h263", "ffv1", "prores", "libvpx-vp9"),
)
_WITH_HIDDEN_FRAMES = ("vp8", "libvpx")
# Of the announced time, so much may be missing: it is an estimate in some files.
_TAIL = 0.05
# Their headers come first; what is probed for them is little.
_PROBE = {"probesize": "5000000", "analyzeduration": "5000000"}


@dataclass(frozen=True)
class VideoHeader:
    """What a file says of its first video stream."""

    num_frames: int
    fps: float
    width: int
    height: int


def read_header(content: bytes | Path, where: str, policy: MediaPolicy) -> VideoHeader:
    """Frames, rate and size, within what the policy allows; no frame is decoded.

    Raises:
        DataError: beginning with `where`: PyAV is missing, no video, or one that is too long or
            too large.
    """
    with _opened(content, where, policy) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or Fraction(0))
        width, height = stream.codec_context.width, stream.codec_context.height
        if fps <= 0 or width <= 0 or height <= 0:
            raise DataError(f"{where}: {_no_video('it has no rate or no size')}")
        if width * height > policy.max_image_pixels:
            raise DataError(
                f"{where}: the frames of the video are too large: {width} x {height} are "
                f"{width * height:,} pixels, and data.max_image_pixels="
                f"{policy.max_image_pixels:,} are allowed. Make it smaller, or raise the limit."
            )
        num_frames = stream.frames or _count(container, stream, policy, where)
    header = VideoHeader(num_frames, fps, width, height)
    _check_length(header, where, policy)
    return header


def _check_length(header: VideoHeader, where: str, policy: MediaPolicy) -> None:
    if not header.num_frames:
        raise DataError(f"{where}: {_no_video('it has no frames')}")
    seconds = header.num_frames / header.fps
    if seconds > policy.max_video_seconds:
        raise DataError(
            f"{where}: the video takes {seconds:.1f} s, and data.max_video_seconds="
            f"{policy.max_video_seconds:g} are allowed. Cut it, or raise the limit."
        )
    if header.num_frames > policy.max_video_frames:
        raise DataError(
            f"{where}: the video has {header.num_frames:,} frames, and data.max_video_frames="
            f"{policy.max_video_frames:,} are allowed. Cut it, or raise the limit."
        )


def decode(
    content: bytes | Path,
    header: VideoHeader,
    indices: Sequence[int],
    where: str,
    policy: MediaPolicy,
) -> Iterator[Image.Image]:
    """The frames of these numbers, in growing order, in RGB and as they are shown.

    Every frame before the last of them is decoded: to seek would be faster, and finds another
    frame in files whose times are not even.

    Raises:
        DataError: damaged, or shorter than its header says.
    """
    wanted = iter(indices)
    due = next(wanted, None)
    with _opened(content, where, policy) as (container, stream):
        for number, frame in enumerate(_frames(container, stream, where)):
            if due is None:
                return
            if (frame.width, frame.height) != (header.width, header.height):
                raise DataError(
                    f"{where}: the video is damaged (a frame is not of the size that it says)."
                )
            while number == due:
                yield _upright(frame)
                due = next(wanted, None)
    if due is not None:
        raise DataError(
            f"{where}: the video is damaged or cut off: it says that it has {header.num_frames:,} "
            f"frames, and frame {due + 1:,} is not there. Convert it anew: ffmpeg -i FILE NEW.mp4"
        )


def _frames(container: Any, stream: Any, where: str) -> Iterator[Any]:
    import av

    frames = container.decode(stream)
    while True:
        try:
            frame = next(frames, None)
        except (av.FFmpegError, ValueError, MemoryError) as error:
            raise DataError(
                f"{where}: the video is damaged or cut off ({_said(error)}). Convert it anew: "
                "ffmpeg -i FILE NEW.mp4"
            ) from error
        if frame is None:
            return
        yield frame


def _upright(frame: Any) -> Image.Image:
    """Telephones film lying down, and say so."""
    image = frame.to_image()
    turned = int(getattr(frame, "rotation", 0)) % 360
    turns = {
        90: Image.Transpose.ROTATE_90,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }
    return image.transpose(turns[turned]) if turned in turns else image


def _count(container: Any, stream: Any, policy: MediaPolicy, where: str) -> int:
    """Frames of a file whose header does not say it: one a packet, but where some are not shown."""
    import av

    count, end = 0, 0.0
    try:
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, float(packet.pts * packet.time_base))
            count += packet.stream.index == stream.index and packet.size > 0
            if count > policy.max_video_frames:
                return count
    except av.FFmpegError as error:
        raise DataError(f"{where}: {_no_video(_said(error))}") from error
    announced = (container.duration or 0) / av.time_base
    if end < announced * (1 - _TAIL) - 1:
        raise DataError(
            f"{where}: the video is cut off: it says that it takes {announced:.1f} s, and ends "
            f"after {end:.1f} s. Convert it anew: ffmpeg -i FILE NEW.mp4"
        )
    if stream.codec_context.name in _WITH_HIDDEN_FRAMES:
        container.seek(0)
        count = sum(1 for _ in _frames(container, stream, where))
    return count


@contextlib.contextmanager
def _opened(content: bytes | Path, where: str, policy: MediaPolicy) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream), decoders limited to what may be read."""
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"{where}: video files are decoded by PyAV, which is not installed. Install it: "
            "pip install av; or give the frames as images."
        ) from error
    file = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
    with file:
        try:
            container = av.open(
                file,
                container_options={
                    "format_whitelist": ",".join(CONTAINERS),
                    "codec_whitelist": ",".join(CODECS),
                    "protocol_whitelist": "",
                    **_PROBE,
                },
            )
        except (av.FFmpegError, ValueError, OSError) as error:
            raise DataError(f"{where}: {_no_video(_said(error))}") from error
        with container:
            if not container.streams.video:
                raise DataError(f"{where}: {_no_video('there is no video in it')}")
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None or context.name not in CODECS:
                name = None if context is None else context.name
                raise DataError(f"{where}: {_no_video(f'codec {name!r}')}")
            context.options = {**context.options, "max_pixels": str(policy.max_image_pixels)}
            yield container, stream


def _no_video(why: str) -> str:
    return (
        f"not a video that can be read ({why}). The containers are {', '.join(CONTAINERS)}. "
        "Convert it: ffmpeg -i FILE NEW.mp4"
    )


def _said(error: BaseException) -> str:
    """Without the name of the file object."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
