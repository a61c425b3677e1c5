"""Videos: a file or a list of frames, which of them are used, and their patches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gemtune.data.media.files import (
    MediaPolicy,
    bytes_or_path,
    open_medium,
    path_of,
    real_path,
)
from gemtune.data.media.images import ImageEncoder, load
from gemtune.data.media.video_files import VideoHeader, decode, read_header
from gemtune.errors import DataError

# What transformers takes for frames without a rate.
_USUAL_FPS = 24.0
_FRAME_NAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm")


@dataclass(frozen=True)
class Video:
    """A video that was found and measured: the frames that are used, not decoded."""

    indices: Sequence[int]
    """[F] numbers of the frames in the video, from 0, growing."""
    timestamps: Sequence[float]
    """[F] seconds from its beginning."""
    size: tuple[int, int]
    """Width and height of a frame."""
    content: bytes | Path | list[Image.Image]
    """Of a file, or the frames that are used, opened."""
    header: VideoHeader | None = None
    """Of a file."""


@dataclass
class EncodedVideo:
    """The frames of one video as patches: [F, P, 3 * patch_size**2] float32, [F, P, 2] int64."""

    pixels: np.ndarray
    positions: np.ndarray
    num_soft_tokens: int
    """Of all frames."""


class VideoEncoder:
    """Turns videos into patches of their frames, as `Gemma4VideoProcessor` does.

    Frames are chosen as there, at even distances from the first on; a video of fewer gives all that
    it has, where transformers refuses it. A frame is resized by Pillow and not by torchvision,
    whose results differ in the last of 8 bits.

    Args:
        frames: the encoder of one frame, with the soft tokens that a frame may take.
        num_frames: at most so many of a video.
    """

    def __init__(self, frames: ImageEncoder, num_frames: int = 32) -> None:
        self.frames = frames
        self.num_frames = num_frames

    @property
    def policy(self) -> MediaPolicy:
        return self.frames.policy

    @property
    def options(self) -> dict[str, Any]:
        """All that decides the patches and their number."""
        return {**self.frames.processor.to_dict(), "num_frames": self.num_frames}

    def open(self, medium: Any, where: str, media_root: Path | None = None) -> Video:
        """A video file (bytes or path), a list of images, a folder of images, or
        `{frames or path, fps or timestamps}`.

        Raises:
            DataError: beginning with `where`: missing, not allowed, no video, too long or large.
        """
        root = media_root if media_root is not None else self.frames.media_root
        times: dict[str, Any] = {}
        if isinstance(medium, Mapping):
            times = {k: medium[k] for k in ("fps", "timestamps") if medium.get(k) is not None}
            if medium.get("frames") is not None:
                medium = medium["frames"]
        if isinstance(medium, Mapping):
            medium = bytes_or_path(medium, "video", where)
        if isinstance(medium, str) and "://" not in medium and not medium.startswith("data:"):
            real = Path(real_path(medium, "video", where, root))
            if real.is_dir():
                medium = [str(path) for path in self._in_folder(real, where)]
        if isinstance(medium, list | tuple):
            video = self._of_frames(medium, times, where, root)
        else:
            if times:
                raise DataError(
                    f"{where}: '{next(iter(times))}' belongs to frames given as images; a video "
                    "file says it itself. Remove it."
                )
            video = self._of_file(bytes_or_path(medium, "video", where), where, root)
        if self.policy.verify_media:
            for image in self._images(video, where):
                load(image, where)
        return video

    def num_soft_tokens(self, video: Video) -> int:
        """Of each of its frames."""
        return self.frames.num_soft_tokens_of(*video.size)

    def stamps(self, video: Video) -> list[str]:
        """What is written before each frame: `mm:ss`, as `Gemma4Processor` writes it."""
        return [f"{int(t // 60):02d}:{int(t % 60):02d}" for t in video.timestamps]

    def encode(self, video: Video, where: str) -> EncodedVideo:
        """Patches of its frames and their positions.

        Raises:
            DataError: damaged, or shorter than its header says.
        """
        encoded = [self.frames.encode(image, where) for image in self._images(video, where)]
        return EncodedVideo(
            np.stack([frame.pixels for frame in encoded]),
            np.stack([frame.positions for frame in encoded]),
            sum(frame.num_soft_tokens for frame in encoded),
        )

    def first_frame(self, video: Video, where: str) -> Image.Image:
        """To be looked at."""
        return next(self._images(video, where))

    def _images(self, video: Video, where: str) -> Iterator[Image.Image]:
        """Its frames, of a file one after another: as many in full size would take gigabytes."""
        if isinstance(video.content, list):
            yield from video.content
            return
        assert video.header is not None
        yield from decode(video.content, video.header, video.indices, where, self.policy)

    def _of_file(self, given: bytes | str, where: str, root: Path | None) -> Video:
        with open_medium(given, "video", where, root, self.policy) as file:
            is_path = isinstance(given, str) and "://" not in given
            content: bytes | Path = path_of(file) if is_path else file.read()
        header = read_header(content, where, self.policy)
        indices = self._chosen(header.num_frames)
        times = [index / header.fps for index in indices]
        return Video(indices, times, (header.width, header.height), content, header)

    def _of_frames(
        self, given: Sequence[Any], times: Mapping[str, Any], where: str, root: Path | None
    ) -> Video:
        if not given:
            raise DataError(f"{where}: the video has no frames.")
        if len(given) > self.policy.max_video_frames:
            raise DataError(
                f"{where}: the video has {len(given):,} frames, and data.max_video_frames="
                f"{self.policy.max_video_frames:,} are allowed. Cut it, or raise the limit."
            )
        seconds = _timestamps(len(given), times, where)
        indices = self._chosen(len(given))
        images = [
            self.frames.open(given[index], f"{where}, frame {index + 1}", root) for index in indices
        ]
        for index, image in zip(indices, images, strict=True):
            if image.size != images[0].size:
                raise DataError(
                    f"{where}: the frames of a video must be of one size; frame {index + 1} has "
                    f"{image.size[0]} x {image.size[1]} pixels, the first "
                    f"{images[0].size[0]} x {images[0].size[1]}."
                )
        return Video(indices, [seconds[i] for i in indices], images[0].size, images)

    def _chosen(self, total: int) -> list[int]:
        """As `default_sample_indices_fn` of transformers chooses them."""
        count = min(self.num_frames, total)
        return [number * total // count for number in range(count)]

    def _in_folder(self, folder: Path, where: str) -> list[Path]:
        """Its images in the order of their names."""
        found = []
        for path in folder.iterdir():
            if path.suffix.lower() in _FRAME_NAMES:
                found.append(path)
            if len(found) > self.policy.max_video_frames:
                break  # refused where they are counted
        if not found:
            raise DataError(
                f"{where}: the folder {folder} has no images to be the frames of a video."
            )
        return sorted(found)


def _timestamps(count: int, times: Mapping[str, Any], where: str) -> list[float]:
    """[count] seconds of each frame.

    Raises:
        DataError: given twice, or not such numbers.
    """
    if len(times) == 2:
        raise DataError(f"{where}: 'fps' and 'timestamps' of a video both say when. Keep one.")
    if "timestamps" in times:
        given = times["timestamps"]
        is_list = isinstance(given, list | tuple) and len(given) == count
        if not is_list or not all(_is_number(t) and t >= 0 for t in given):
            raise DataError(
                f"{where}: 'timestamps' of a video must be a list of the seconds of each of its "
                f"{count} frames."
            )
        if any(later < earlier for earlier, later in itertools.pairwise(given)):
            raise DataError(f"{where}: 'timestamps' of a video must not go back.")
        return [float(t) for t in given]
    fps = times.get("fps", _USUAL_FPS)
    if not _is_number(fps) or fps <= 0:
        raise DataError(f"{where}: 'fps' of a video must be a number above 0, not {fps!r}.")
    return [index / fps for index in range(count)]


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
