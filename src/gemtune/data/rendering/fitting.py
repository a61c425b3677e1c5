"""Rows that are longer than allowed: text is cut, a run of media tokens never."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gemtune.errors import DataError


@dataclass
class EncodedText:
    """Ids of a row, the stretches that are learned, and which of its images it still has."""

    ids: list[int]
    runs: list[tuple[int, int]]
    """Begin and end of each learned stretch, in order."""
    where: str
    num_images: int = 0
    first_image: int = 0
    """Images before it were cut away."""

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


class Fitter:
    """Cuts rows to `max_length` tokens.

    Args:
        truncate: "none": a longer row is refused. "right": its end is cut. "left": whole turns are
            cut from the oldest on, so that it begins with a user's turn again, and if that is not
            enough the beginning of that turn's text; the system turn stays.
        turn, turn_end: ids of `<|turn>` and `<turn|>`.
        user: the ids that follow `<|turn>` in the header of a user's turn.
        media: ids that begin a run of media tokens -> ids that end it.
    """

    def __init__(
        self,
        max_length: int,
        truncate: str,
        *,
        turn: int,
        turn_end: int,
        user: list[int],
        media: dict[int, int],
    ) -> None:
        self.max_length = max_length
        self.truncate = truncate
        self._turn, self._turn_end = turn, turn_end
        self._user = user
        self._media = media

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
        if shorter.num_images < text.num_images:
            raise DataError(
                f"{text.where}: data.max_length={self.max_length} would cut an image out of the "
                "question to its last answer. Raise it, or leave such rows out with "
                "data.on_bad_row=skip."
            )
        return shorter

    def _without(self, text: EncodedText, begin: int, end: int) -> EncodedText:
        """Tokens [begin, end) cut out."""
        cut_images = 0
        for first, last in self._media_runs(text):
            if begin <= first and last < end:
                cut_images += 1
            elif first < end and last >= begin:
                raise DataError(
                    f"{text.where}: data.max_length={self.max_length} cuts through an image "
                    f"(tokens {first} to {last}). Raise it to at least "
                    f"{last + 1 if self.truncate == 'right' else len(text.ids)}, or leave such "
                    "rows out with data.on_bad_row=skip."
                )

        def moved(place: int) -> int:
            return place if place <= begin else max(place - (end - begin), begin)

        runs = [(moved(first), moved(last)) for first, last in text.runs]
        return EncodedText(
            text.ids[:begin] + text.ids[end:],
            [(first, last) for first, last in runs if last > first],
            text.where,
            text.num_images - cut_images,
            text.first_image + (cut_images if end < len(text.ids) else 0),
        )

    def _media_runs(self, text: EncodedText) -> list[tuple[int, int]]:
        """(first, last) token of every medium, its begin and end tokens with it."""
        ids = np.array(text.ids)
        runs: list[tuple[int, int]] = []
        for begin, end in self._media.items():
            firsts, lasts = np.flatnonzero(ids == begin), np.flatnonzero(ids == end)
            runs += list(zip(firsts.tolist(), lasts.tolist(), strict=True))
        return sorted(runs)
