"""Audio: opening it, how many soft tokens it takes, and its features."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gemtune.data.media.files import MediaPolicy, bytes_or_path, open_medium, path_of
from gemtune.data.media.waves import WaveError, WaveHeader, read_header, read_samples
from gemtune.errors import DataError

# The two convolutions in front of the audio tower halve the frames each.
FRAMES_PER_TOKEN = 4
# Resampled music may reach a little beyond 1; integers reach far.
_LOUDEST = 4.0


@dataclass(frozen=True)
class AudioClip:
    """A recording that was found and measured, not decoded."""

    num_samples: int
    seconds: float
    content: bytes | np.ndarray | Path
    """Of a file, or its samples: [N] float32."""


@dataclass
class EncodedAudio:
    """One recording as log-mel features: [T, 128] float32, and which of them are of sound: [T]."""

    features: np.ndarray
    mask: np.ndarray
    num_soft_tokens: int


class AudioEncoder:
    """Turns recordings into features by the checkpoint's own feature extractor.

    WAV files of 8, 16, 24 and 32 bits and of floats, or `{array, sampling_rate}`. Channels are
    averaged. Nothing is resampled: which filter to use is not ours to guess.

    Args:
        extractor: a `Gemma4AudioFeatureExtractor`.
        media_root: the folder that paths start from and may not leave; None: no path is read.
        policy: what may be read.
        max_soft_tokens: a longer recording is refused; transformers would cut it.
    """

    def __init__(
        self,
        extractor: Any,
        media_root: Path | None = None,
        policy: MediaPolicy | None = None,
        max_soft_tokens: int = 750,
    ) -> None:
        self.extractor = extractor
        self.media_root = media_root
        self.policy = policy or MediaPolicy()
        self.max_soft_tokens = max_soft_tokens

    @property
    def options(self) -> dict[str, Any]:
        """All that decides the features and their number."""
        return {**self.extractor.to_dict(), "max_soft_tokens": self.max_soft_tokens}

    def open(self, medium: Any, where: str, media_root: Path | None = None) -> AudioClip:
        """A recording by its header.

        Raises:
            DataError: beginning with `where`: missing, not allowed, no WAV file, another rate, or
                of a length that Gemma 4 does not hear.
        """
        if isinstance(medium, Mapping):
            if medium.get("sampling_rate") is not None:
                self._check_rate(medium["sampling_rate"], where)
            if medium.get("array") is not None:
                return self._of_array(medium, where)
        given = bytes_or_path(medium, "audio", where)
        root = media_root if media_root is not None else self.media_root
        with open_medium(given, "audio", where, root, self.policy) as file:
            header = _header(file, where)
            if isinstance(given, str) and "://" not in given:
                content: bytes | Path = path_of(file)
            else:
                file.seek(0)
                content = file.read()
        self._check_rate(header.rate_hz, where)
        clip = self._checked(header.num_samples, content, where)
        if self.policy.verify_media:
            _samples(clip, where)
        return clip

    def num_soft_tokens(self, clip: AudioClip) -> int:
        """How many placeholder tokens the recording takes, from its length alone."""
        return -(-self._num_frames(clip.num_samples) // FRAMES_PER_TOKEN)

    def encode(self, clip: AudioClip, where: str) -> EncodedAudio:
        """Its features, with the frames of silence that the extractor puts behind them.

        Raises:
            DataError: the samples cannot be read.
        """
        found = self.extractor([_samples(clip, where)], return_tensors="np")
        mask = np.asarray(found["input_features_mask"][0], dtype=bool)
        return EncodedAudio(
            np.asarray(found["input_features"][0], dtype=np.float32),
            mask,
            int(mask[::FRAMES_PER_TOKEN].sum()),
        )

    def _num_frames(self, num_samples: int) -> int:
        """Frames whose window holds nothing but sound, as the extractor marks them."""
        behind_first = num_samples + self.extractor.frame_length // 2
        behind_first -= self.extractor.frame_length + 1
        return max(0, behind_first // self.extractor.hop_length + 1)

    def _of_array(self, medium: Mapping[str, Any], where: str) -> AudioClip:
        if medium.get("sampling_rate") is None:
            raise DataError(f"{where}: audio as an 'array' needs its 'sampling_rate'.")
        try:
            samples = np.asarray(medium["array"])
            samples = samples.astype(np.float32) if samples.dtype.kind in "fiu" else None
        except ValueError:
            samples = None
        if samples is None or samples.ndim != 1:
            raise DataError(
                f"{where}: the 'array' of an audio must be a list of numbers, those of one channel."
            )
        loudest = float(np.abs(samples).max(initial=0))
        if not loudest <= _LOUDEST:  # or no number
            raise DataError(
                f"{where}: the samples of an audio lie in [-1, 1]; here is one of {loudest:g}. "
                "Divide integers of 16 bits by 32768."
            )
        return self._checked(len(samples), samples, where)

    def _checked(
        self, num_samples: int, content: bytes | np.ndarray | Path, where: str
    ) -> AudioClip:
        clip = AudioClip(num_samples, num_samples / self.extractor.sampling_rate, content)
        num_tokens = self.num_soft_tokens(clip)
        if num_tokens > self.max_soft_tokens:
            longest = self._seconds(self.max_soft_tokens * FRAMES_PER_TOKEN)
            raise DataError(
                f"{where}: the audio takes {clip.seconds:.1f} s; Gemma 4 hears at most "
                f"{longest:g} s. Cut it."
            )
        if not num_tokens:
            raise DataError(
                f"{where}: the audio takes {clip.seconds * 1000:.0f} ms, too short for one token. "
                "Leave it out."
            )
        return clip

    def _seconds(self, num_frames: int) -> float:
        return num_frames * self.extractor.hop_length / self.extractor.sampling_rate

    def _check_rate(self, rate: Any, where: str) -> None:
        needed = self.extractor.sampling_rate
        if rate != needed:
            raise DataError(
                f"{where}: the audio has {rate} samples a second; {needed} are needed. Resample "
                f"it: ffmpeg -i FILE -ac 1 -ar {needed} NEW.wav"
            )


def _samples(clip: AudioClip, where: str) -> np.ndarray:
    """[N] float32"""
    content = clip.content
    if isinstance(content, np.ndarray):
        return content
    try:
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            header = _header(file, where)
            samples = read_samples(file, header)
    except (WaveError, OSError) as error:
        raise DataError(f"{where}: the audio cannot be read ({error}).") from error
    if len(samples) != clip.num_samples:
        raise DataError(f"{where}: the audio is not as long as it was: it was changed just now.")
    return samples


def _header(file: BinaryIO, where: str) -> WaveHeader:
    try:
        return read_header(file)
    except WaveError as error:
        raise DataError(
            f"{where}: not a WAV file that can be read ({error}). Convert it: "
            "ffmpeg -i FILE -ac 1 -ar 16000 NEW.wav"
        ) from error
