"""The tokens that stand for media in a row."""

from __future__ import annotations

from typing import Any

from gemtune.data.media.audio import AudioClip
from gemtune.data.media.encoders import Encoders
from gemtune.data.media.videos import Video
from gemtune.data.rendering.control_tokens import ControlTokens
from gemtune.data.rendering.conversation import Conversation
from gemtune.data.rendering.plans import MediumIds
from gemtune.errors import DataError

# No name of the tokenizer's says it: transformers' own processor has it as a constant.
VIDEO_TOKEN = "<|video|>"


class Placeholders:
    """What `Gemma4Processor` puts in the place of each medium's token, as ids.

    Args:
        tokenizer: with the tokens of every kind that `media` takes.
        media: measures each medium.

    Raises:
        DataError: a kind is taken whose tokens the tokenizer lacks.
    """

    def __init__(self, tokenizer: Any, media: Encoders, control: ControlTokens) -> None:
        self._media = media
        self._control = control
        self._edges: dict[str, tuple[int, int]] = {}
        self.kinds: dict[str, str] = {}
        """The token that templates write for a medium -> its kind."""
        self.soft_ids: dict[str, int] = {}
        """Kind -> the token that stands for one soft token."""
        self._stamps: dict[str, list[int]] = {}
        for kind in media.kinds:
            # boi and eoi for images and the frames of videos, boa and eoa for audio.
            letter = "a" if kind == "audio" else "i"
            begin = getattr(tokenizer, f"bo{letter}_token", None)
            end = getattr(tokenizer, f"eo{letter}_token", None)
            token = VIDEO_TOKEN if kind == "video" else getattr(tokenizer, f"{kind}_token", None)
            if any(name not in control.ids for name in (begin, token, end)):
                raise DataError(
                    f"The tokenizer has no tokens for {kind} ({begin}, {token}, {end}), which the "
                    "model takes. Take the tokenizer of the newest checkpoint of the same size."
                )
            self.kinds[token] = kind
            self.soft_ids[kind] = control.ids[token]
            self._edges[kind] = (control.ids[begin], control.ids[end])

    def of(self, conversation: Conversation) -> dict[str, list[MediumIds]]:
        """Kind -> what stands for each of its media, from what their headers say."""
        return {
            "image": [
                self._run("image", self._media.image.num_soft_tokens(image))
                for image in conversation.images
            ],
            "video": list(map(self._of_video, conversation.videos)),
            "audio": list(map(self._of_audio, conversation.audios)),
        }

    def _run(self, kind: str, num_soft_tokens: int) -> MediumIds:
        begin, end = self._edges[kind]
        return MediumIds([begin, *[self.soft_ids[kind]] * num_soft_tokens, end])

    def _of_audio(self, clip: AudioClip) -> MediumIds:
        assert self._media.audio is not None
        return self._run("audio", self._media.audio.num_soft_tokens(clip))

    def _of_video(self, video: Video) -> MediumIds:
        """`mm:ss <frame> mm:ss <frame>`; the first time is not among the ids."""
        encoder = self._media.video
        assert encoder is not None
        first, *others = encoder.stamps(video)
        frame = self._run("video", encoder.num_soft_tokens(video)).ids
        ids = list(frame)
        for stamp in others:
            ids += [*self._encoded(f" {stamp} "), *frame]
        return MediumIds(ids, f"{first} ", self._encoded(f"{first} "))

    def _encoded(self, stamp: str) -> list[int]:
        if stamp not in self._stamps:
            self._stamps[stamp] = self._control.encode([stamp])[0]
        return self._stamps[stamp]
