"""Control tokens: those that a template writes are tokens, those in the data's texts are text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gemtune.data.rendering.words import WordEncoder
from gemtune.errors import DataError

# Texts whose tokens must not depend on the control token before them.
_SAMPLES = ("user\nHello  world.\n\n1 + 1", " a", "\n", "é日本 x", "model\n", "{a:", "  \n\tb ")


class ControlTokens:
    """The control tokens of a tokenizer, and its way to encode what stands between them.

    A control token is a special one, or one of the added ones that the template names.

    Args:
        tokenizer: a fast one.
        template: the source of its chat template.

    Raises:
        DataError: a tokenizer that reads a text differently behind a control token.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        added = tokenizer.added_tokens_decoder
        self.ids: dict[str, int] = {
            token.content: number
            for number, token in added.items()
            if token.special or (token.content.strip() and token.content in template)
        }
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._split = re.compile(f"({self.pattern.pattern})")
        self._begins = tuple({token[0] for token in self.ids})
        self._all = frozenset(self.ids.values())
        self._backend = tokenizer.backend_tokenizer
        self._words = WordEncoder(self._backend)
        self._check_independence(tokenizer)

    def found_in(self, text: str) -> bool:
        """Whether a control token stands in the text."""
        # There are thousands of tokens, and few characters that begin one.
        return any(begin in text for begin in self._begins) and bool(self.pattern.search(text))

    def split(self, text: str) -> list[str]:
        """Text, control token, text, ..., text."""
        return self._split.split(text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, none of them a control token's whatever the text says."""
        if not texts:
            return []
        ids = self._words.encode(texts)
        for number, text in enumerate(texts):
            if self.found_in(text):
                ids[number] = self._as_text(text)
        return ids

    def _as_text(self, text: str) -> list[int]:
        backend = self._backend
        before = backend.encode_special_tokens
        backend.encode_special_tokens = True
        try:
            ids = backend.encode(text, add_special_tokens=False).ids
            if not self._all.isdisjoint(ids):  # one that is added but not special: letter by letter
                pieces = [
                    backend.encode(letter, add_special_tokens=False).ids
                    for number, piece in enumerate(self.split(text))
                    for letter in (piece if number % 2 else [piece])
                ]
                ids = [token for piece in pieces for token in piece]
        finally:
            backend.encode_special_tokens = before
        if not self._all.isdisjoint(ids):
            raise DataError(
                f"The tokenizer makes a control token of the text {text[:60]!r}, however it is "
                "written. Remove it."
            )
        return ids

    def _check_independence(self, tokenizer: Any) -> None:
        begin = "<|turn>" if "<|turn>" in self.ids else next(iter(self.ids))
        self._backend.no_padding()
        self._backend.no_truncation()
        alone = self.encode(_SAMPLES)
        for text, ids in zip(_SAMPLES, alone, strict=True):
            whole = tokenizer(begin + text + begin, add_special_tokens=False)["input_ids"]
            if whole != [self.ids[begin], *ids, self.ids[begin]]:
                raise DataError(
                    f"This tokenizer encodes {text!r} differently beside {begin!r} than alone. It "
                    "is none of Gemma 4's."
                )
