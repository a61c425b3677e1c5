"""Ids of texts word by word, where the vocabulary proves that words are encoded apart anyway."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_SPACE = "▁"
_NORMALIZER = f'Replace(pattern=String(" "), content="{_SPACE}")'
_PRE_TOKENIZERS = (
    "None",
    'Split(pattern=String(" "), behavior=MergedWithPrevious, invert=False)',  # there are none left
)
_WORD = re.compile(" *[^ ]+| +")
_MAX_WORDS = 300_000  # about 60 MB
_MAX_WORD_CHARACTERS = 64


class WordEncoder:
    """Encodes texts as the tokenizer does, and each word of them once.

    Gemma's tokenizer takes a text between two control tokens as one word: spaces become `▁`, and
    byte-pair merges run over all of it. No merge joins what ends without `▁` to a `▁` behind it
    unless a token of the vocabulary has the two side by side. Where none has, the ids of a text are
    those of its words, each with the spaces before it, one after another; and words repeat.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.is_exact = _words_stand_alone(backend)
        """Whether words are looked up; else every text goes to the tokenizer whole."""
        self._known: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """[N] ids of each text, special tokens in it read as such."""
        if not self.is_exact:
            return self._encode(texts)
        split = [_WORD.findall(text) for text in texts]
        known = self._known
        new = {word for words in split for word in words if word not in known}
        if new:
            if len(known) + len(new) > _MAX_WORDS:
                known.clear()
                new = {word for words in split for word in words}
            listed = list(new)
            known.update(zip(listed, self._encode(listed), strict=True))
        encoded = []
        for words in split:
            ids: list[int] = []
            for word in words:
                ids += known[word]
            encoded.append(ids)
        if new:
            for word in new:
                if len(word) > _MAX_WORD_CHARACTERS:  # it will not come again
                    del known[word]
        return encoded

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in encoded]


def _words_stand_alone(backend: Any) -> bool:
    if str(backend.normalizer) != _NORMALIZER:
        return False
    if str(backend.pre_tokenizer) not in _PRE_TOKENIZERS:
        return False
    model = backend.model
    if type(model).__name__ != "BPE" or model.dropout or getattr(model, "ignore_merges", True):
        return False
    # Without bytes to fall back on, unknown characters of two words might become one token.
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not model.byte_fallback or any(f"<0x{byte:02X}>" not in vocabulary for byte in range(256)):
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    joins = re.compile(f"[^{_SPACE} ][{_SPACE} ]")
    if any(joins.search(token) for token in vocabulary):
        return False
    added = backend.get_added_tokens_decoder().values()
    # These are found in the whole text, before it is split; one that takes spaces along, or that
    # must stand alone, depends on what is beside it.
    return not any(token.lstrip or token.rstrip or token.single_word for token in added)
