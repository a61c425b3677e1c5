"""The encoders of all media of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemtune.data.media.audio import AudioEncoder
from gemtune.data.media.files import MediaPolicy
from gemtune.data.media.images import ImageEncoder
from gemtune.data.media.videos import VideoEncoder

MEDIA = ("image", "video", "audio")
"""The kinds, in the order in which Gemma 4 encodes them; as `mm_token_type_ids` from 1 on."""


@dataclass(frozen=True)
class OtherMedia:
    """What a checkpoint has for videos and audio beside its image processor."""

    frames: Any = None
    """A `Gemma4ImageProcessorPil` with the soft tokens of a frame; None: it takes no videos."""
    num_frames: int = 32
    extractor: Any = None
    """A `Gemma4AudioFeatureExtractor`; None: it takes no audio."""
    max_audio_tokens: int = 750
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Kind -> why it is not taken."""


@dataclass(frozen=True)
class Encoders:
    """An encoder for each kind that is taken."""

    image: ImageEncoder
    video: VideoEncoder | None = None
    audio: AudioEncoder | None = None
    refusals: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, image_processor: Any, others: OtherMedia, root: Path | None, policy: MediaPolicy
    ) -> Encoders:
        video = audio = None
        if others.frames is not None:
            video = VideoEncoder(ImageEncoder(others.frames, root, policy), others.num_frames)
        if others.extractor is not None:
            audio = AudioEncoder(others.extractor, root, policy, others.max_audio_tokens)
        return cls(ImageEncoder(image_processor, root, policy), video, audio, others.refusals)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that are taken."""
        return tuple(kind for kind in MEDIA if getattr(self, kind) is not None)

    def open(self, kind: str, medium: Any, where: str, root: Path | None) -> Any:
        """An image, `Video` or `AudioClip`, measured and not decoded; see the encoders."""
        return getattr(self, kind).open(medium, where, root)
