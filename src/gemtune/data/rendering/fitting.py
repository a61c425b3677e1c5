"""Rows that are longer than allowed: text is cut, a run of media tokens never."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gemtune.data.rendering.plans import Span
from gemtune.errors import DataError


@dataclass
class EncodedText:
    """Ids of a row, the stretches that are learned, and which of its media it still has."""

    ids: list[int]
    runs: list[tuple[int, int]]
    """Begin and end of each learned stretch, in order."""
    where: str
    media: list[Span] = field(default_factory=list)
    """In order; none is cut through."""
    cut_before: Mapping[str, int] = field(default_factory=dict)
    """Of each kind, how many media before them were cut away."""

    def num_media(self, kind: str) -> int:
        return sum(span.kind == kind for span in self.media)

    @property
    def num_supervised_tokens(self) -> int:
        """The first token is predicted by nothing."""
        return sum(end - (begin or 1) for begin, end in self.runs)


def labels_of(ids: np.ndarray, runs: Iterable[Sequence[int]], ignored: int) -> np.ndarray:
    """[S] the ids within the runs, `ignored` elsewhere."""
    labels = np.full_like(ids, ignored)
    for begin, end in runs:
        labels[begin:end] = ids[begin:end]
    return labels


MEDIA_NAMES = {"image": "an image", "video": "a video", "audio": "an audio"}


class Fitter:
    """Cuts rows to `max_length` tokens.

    Args:
        truncate: "none": a longer row is refused. "right": its end is cut. "left": whole turns are
            cut from the oldest on, so that it begins with a user's turn again, and if that is not
            enough the beginning of that turn's text; the system turn stays.
        turn, turn_end: ids of `<|turn>` and `<turn|>`.
        user: the ids that follow `<|turn>` in the header of a user's turn.
    """

    def __init__(
        self,
        max_length: int,
        truncate: str,
        *,
        turn: int,
        turn_end: int,
        user: list[int],
    ) -> None:
        self.max_length = max_length
        self.truncate = truncate
        self._turn, self._turn_end = turn, turn_end
        self._user = user

    def fit(self, text: EncodedText) -> EncodedText:
        """The row, cut if need be.

        Raises:
            DataError: too long, or a cut through media.
        """
        length = len(text.ids)
        if length <= self.max_length:
            return text
        if self.truncate == "none":
            raise DataError(
                f"{text.where}: {length} tokens are more than data.max_length={self.max_length}. "
                "Raise it, cut text with data.truncate=right or left, or leave such rows out with "
                "data.on_bad_row=skip."
            )
        if self.truncate == "right":
            return self._without(text, self.max_length, length)
        return self._fit_left(text)

    def _fit_left(self, text: EncodedText) -> EncodedText:
        ids, length = np.array(text.ids), len(text.ids)
        header = [self._turn, *self._user]
        users = [
            place
            for place in np.flatnonzero(ids == self._turn).tolist()
            if ids[place : place + len(header)].tolist() == header
        ]
        if not users:
            raise DataError(f"{text.where}: no user's turn to begin with after a cut on the left.")
        first, last = users[0], users[-1]
        excess = length - self.max_length
        whole = next((user for user in users[1:] if user - first >= excess), None)
        if whole is not None:
            return self._without(text, first, whole)
        if last > first:
            text = self._without(text, first, last)
            excess, last = excess - (last - first), first
        begin = last + len(header)
        turn_end = begin + int(np.flatnonzero(np.array(text.ids[begin:]) == self._turn_end)[0])
        if begin + excess >= turn_end:
            raise DataError(
                f"{text.where}: data.max_length={self.max_length} is too short for its last answer "
                "and the system turn, with all before the answer cut away. Raise it, or leave such "
                "rows out with data.on_bad_row=skip."
            )
        shorter = self._without(text, begin, begin + excess)
        if len(shorter.media) < len(text.media):
            kind = next(k for k in MEDIA_NAMES if shorter.num_media(k) < text.num_media(k))
            raise DataError(
                f"{text.where}: data.max_length={self.max_length} would cut {MEDIA_NAMES[kind]} "
                "out of the question to its last answer. Raise it, or leave such rows out with "
                "data.on_bad_row=skip."
            )
        return shorter

    def _without(self, text: EncodedText, begin: int, end: int) -> EncodedText:
        """Tokens [begin, end) cut out."""
        kept, cut_before = [], dict(text.cut_before)
        for span in text.media:
            if begin <= span.begin and span.end <= end:
                if end < len(text.ids):
                    cut_before[span.kind] = cut_before.get(span.kind, 0) + 1
            elif span.begin < end and span.end > begin:
                needed = span.end if self.truncate == "right" else len(text.ids)
                raise DataError(
                    f"{text.where}: data.max_length={self.max_length} cuts through "
                    f"{MEDIA_NAMES[span.kind]} (tokens {span.begin} to {span.end - 1}). Raise it "
                    f"to at least {needed}, or leave such rows out with data.on_bad_row=skip."
                )
            else:
                moved_by = end - begin if span.begin >= end else 0
                kept.append(Span(span.kind, span.begin - moved_by, span.end - moved_by))

        def moved(place: int) -> int:
            return place if place <= begin else max(place - (end - begin), begin)

        runs = [(moved(first), moved(last)) for first, last in text.runs]
        return EncodedText(
            text.ids[:begin] + text.ids[end:],
            [(first, last) for first, last in runs if last > first],
            text.where,
            kept,
            cut_before,
        )
