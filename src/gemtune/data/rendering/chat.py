"""Renders a conversation with the checkpoint's own template and marks what is to be learned."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemtune.data.media.audio import EncodedAudio
from gemtune.data.media.encoders import MEDIA, Encoders
from gemtune.data.media.images import EncodedImage, ImageEncoder
from gemtune.data.media.videos import EncodedVideo
from gemtune.data.rendering.control_tokens import ControlTokens
from gemtune.data.rendering.conversation import MEDIA_COLUMNS, Conversation, ConversationReader
from gemtune.data.rendering.fitting import EncodedText, Fitter, labels_of
from gemtune.data.rendering.learning import LearnedMessages, refuse_unread_keys
from gemtune.data.rendering.leaves import plain_shape_key, read_shape
from gemtune.data.rendering.placeholders import Placeholders
from gemtune.data.rendering.plans import (
    MediumIds,
    Plan,
    assemble,
    filled,
    make_plan,
    texts_to_encode,
)
from gemtune.data.rendering.reasoning import has_reasoning, lift_reasoning
from gemtune.data.rendering.spans import (
    MODEL_TURN,
    THOUGHT_END,
    TURN_END,
    Piece,
    Rules,
    find_pieces,
)
from gemtune.data.rendering.template import ChatTemplate
from gemtune.errors import DataError

IGNORE_INDEX = -100

_ACCEPTS = ("tools", "reasoning", "weights")
# Shapes of conversations that are remembered: with tools there may be one for each row.
_MAX_PLANS = 4096


@dataclass
class Example:
    """One row as model inputs: two [S] integer arrays, and its media in order."""

    input_ids: np.ndarray
    labels: np.ndarray
    """The ids where they are learned, -100 elsewhere; not shifted."""
    images: list[EncodedImage] = field(default_factory=list)
    where: str = ""
    videos: list[EncodedVideo] = field(default_factory=list)
    audios: list[EncodedAudio] = field(default_factory=list)

    @property
    def num_supervised_tokens(self) -> int:
        """Labels that the shift leaves: the first token is predicted by nothing."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class Rendering:
    """How conversations are rendered and what of them is learned: the keys of `data`."""

    learn: str = "assistant"
    """assistant, last_assistant, completion (of prompt/completion rows), or all (but media)."""
    thinking: str = "auto"
    """Whether the template is told that the model thinks: on, off, or auto: rows with reasoning."""
    dropped_reasoning: str = "refuse"
    """What becomes of reasoning that the template leaves out: refuse, keep or drop."""
    empty_thought: str = "last"
    """Where the larger sizes answer after an empty thought: before the last answer, or all."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of messages that are not rendered and need not be."""


class ChatEncoder:
    """Rows with `messages` (and `images`, `videos`, `audios`, `tools`) -> `Example`.

    The whole conversation is rendered once and the spans to learn are found in the result from
    its turn tokens. Rendering prompt and answer apart and subtracting would be wrong: on the larger
    sizes a prompt is not a prefix of prompt + answer.

    A control token in a text of the data stays text.

    Args:
        tokenizer: with the Gemma 4 special tokens and a chat template.
        media: the encoders of a row's media; or that of images, where nothing else is taken.
        max_length: tokens of a row, those of media included.
        truncate: "none" (a longer row is refused), "right" or "left" (text is cut; a medium never).
        rendering: what is learned, and how.
    """

    def __init__(
        self,
        tokenizer: Any,
        media: Encoders | ImageEncoder,
        *,
        max_length: int,
        truncate: str = "none",
        rendering: Rendering | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.media = media if isinstance(media, Encoders) else Encoders(media)
        self.max_length = max_length
        self.truncate = truncate
        self.rendering = rendering or Rendering()
        source = tokenizer.chat_template
        if not isinstance(source, str) or not source:
            raise DataError(
                "The tokenizer has no chat template (base models ship none). Take that of the "
                "instruction-tuned checkpoint of the same size: chat_template.jinja in its folder."
            )
        self.control = ControlTokens(tokenizer, source)
        special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        self._template = ChatTemplate(source, self.control.pattern, special)
        self._reader = ConversationReader(tokenizer, self.media, _ACCEPTS, control_tokens="text")
        self.placeholders = Placeholders(tokenizer, self.media, self.control)
        turn, turn_end = tokenizer.convert_tokens_to_ids(["<|turn>", TURN_END])
        self._fitter = Fitter(
            max_length,
            truncate,
            turn=turn,
            turn_end=turn_end,
            user=self.control.encode(["user\n"])[0],
        )
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._prefixes: dict[bool, str] = {False: self._find_answer_prefix(False)}

    def encode_rows(
        self, rows: Sequence[tuple[dict[str, Any] | DataError, str]]
    ) -> list[EncodedText | DataError]:
        """Ids and what is learned of each (row, place): media are measured, not decoded.

        One call of the tokenizer for all of them. A row that cannot be learned from has its error,
        beginning with its place, in its place; and so has one that is given as an error.
        """
        results: list[Any] = [row if isinstance(row, DataError) else None for row, _ in rows]
        waiting: list[tuple[int, Plan, dict[str, list[MediumIds]], frozenset[int] | None, int]] = []
        texts: list[str] = []
        for number, (row, where) in enumerate(rows):
            if isinstance(row, DataError):
                continue
            try:
                conversation = self._read(row, where)
                plan, own, learned = self._plan(conversation)
                # Not the media themselves: each may be an open file.
                media = self.placeholders.of(conversation)
            except DataError as error:
                results[number] = error
                continue
            new = texts_to_encode(plan, own, media["video"])
            waiting.append((number, plan, media, learned, len(new)))
            texts += new
        encoded = self.control.encode(texts)
        at = 0
        for number, plan, media, learned, count in waiting:
            where = rows[number][1]
            try:
                ids, runs, spans = assemble(plan, encoded[at : at + count], media, learned, where)
                results[number] = self._fit(EncodedText(ids, runs, where, spans))
            except DataError as error:
                results[number] = error
            at += count
        return results

    def encode_text(
        self, row: dict[str, Any], where: str
    ) -> tuple[Example, dict[str, tuple[int, int]]]:
        """Ids and labels, and which media of the row belong to them: kind -> (first, how many).

        Raises:
            DataError: naming the row, for anything that cannot be learned from.
        """
        result = self.encode_rows([(row, where)])[0]
        if isinstance(result, DataError):
            raise result
        ids = np.array(result.ids, dtype=np.int32)
        example = Example(ids, labels_of(ids, result.runs, IGNORE_INDEX), where=where)
        if not result.media:
            return example, {}
        return example, {k: (result.cut_before.get(k, 0), result.num_media(k)) for k in MEDIA}

    def media_of(self, row: dict[str, Any], where: str) -> dict[str, list[Any]]:
        """All media of a row by kind, measured and not decoded."""
        return self._reader.read(row, where).media

    def encode(self, row: dict[str, Any], where: str) -> Example:
        """The row as a training example, media decoded."""
        example, kept = self.encode_text(row, where)
        return self.add_media(example, row, kept) if kept else example

    def add_media(
        self, example: Example, row: dict[str, Any], kept: dict[str, tuple[int, int]]
    ) -> Example:
        """Decode the media of the row that the example's ids were made from.

        Args:
            kept: kind -> (first, how many) of the row's.
        """
        media = self.media_of(row, example.where)
        return self._decode(
            example,
            {kind: media[kind][first : first + count] for kind, (first, count) in kept.items()},
        )

    def encode_prompt(self, row: dict[str, Any], where: str) -> tuple[Example, str]:
        """Everything before the last assistant message, ready to generate, and that message."""
        conversation = self._read(row, where)
        plan, texts, _ = self._plan(conversation)
        last = max(piece.message for piece in plan.pieces if piece.message is not None)
        answer = "".join(filled(p.atoms, texts) for p in plan.pieces if p.message == last)
        reference = answer.removesuffix(TURN_END).rpartition(THOUGHT_END)[2].strip()

        prompt = conversation.before_last_answer()
        shape, texts = read_shape(prompt)
        thinks = self._thinks(conversation)
        rendered = self._template.run(
            shape, texts, where, add_generation_prompt=True, enable_thinking=thinks
        )
        pieces = [Piece(rendered.atoms, None)]
        plan = make_plan(pieces, self.control, self.placeholders.kinds)
        media = self.placeholders.of(prompt)
        encoded = self.control.encode(texts_to_encode(plan, texts, media["video"]))
        ids, _, _ = assemble(plan, encoded, media, frozenset(), where)
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
        example = Example(np.array(ids, dtype=np.int32), labels, where=where)
        return self._decode(example, prompt.media), reference

    def _read(self, row: dict[str, Any], where: str) -> Conversation:
        conversation = self._reader.read(row, where)
        refuse_unread_keys(row["messages"], self.rendering.ignored_keys, where)
        return lift_reasoning(conversation, self.rendering.dropped_reasoning)

    def _thinks(self, conversation: Conversation) -> bool:
        if self.rendering.thinking == "auto":
            return has_reasoning(conversation)
        return self.rendering.thinking == "on"

    def _plan(
        self, conversation: Conversation
    ) -> tuple[Plan, Sequence[str], frozenset[int] | None]:
        """The steps to this row's ids, the texts for them, and the messages to learn."""
        learned = LearnedMessages.of(conversation, self.rendering.learn)
        plain = plain_shape_key(conversation)
        shape = None
        if plain is None:
            shape, texts = read_shape(conversation)
            key: Any = repr(shape.structure)
        else:
            key, texts = plain
        thinks = self._thinks(conversation)
        plan = self._plans.get((key, thinks))
        if plan is None:
            if shape is None:
                shape, texts = read_shape(conversation)
            options = {"add_generation_prompt": False, "enable_thinking": thinks}
            rendered = self._template.trace(shape, **options)
            is_traced = rendered is not None
            if rendered is None:
                rendered = self._template.run(shape, texts, conversation.where, **options)
            elif not self._agrees(rendered, shape, texts, conversation.where, options):
                self._template.is_traceable = is_traced = False
                rendered = self._template.run(shape, texts, conversation.where, **options)
            pieces = find_pieces(
                rendered.atoms,
                shape.leaves,
                texts,
                [message["role"] for message in conversation.messages],
                self._rules(thinks),
                conversation.where,
            )
            plan = make_plan(pieces, self.control, self.placeholders.kinds)
            if is_traced:
                self._plans[(key, thinks)] = plan
                if len(self._plans) > _MAX_PLANS:
                    self._plans.popitem(last=False)
        return plan, texts, learned

    def _agrees(
        self, rendered: Any, shape: Any, texts: Sequence[str], where: str, options: dict[str, Any]
    ) -> bool:
        """Whether the template, run on this row, gives what was found for its shape."""
        if any(map(self.control.found_in, texts)):
            return True  # the template must not see those: nothing to compare
        return filled(rendered.atoms, texts) == self._template.render(
            shape.filled(texts), where, **options
        )

    def _rules(self, thinks: bool) -> Rules:
        if thinks not in self._prefixes:
            self._prefixes[thinks] = self._find_answer_prefix(thinks)
        return Rules(
            self._prefixes[thinks], self.rendering.empty_thought, self.rendering.dropped_reasoning
        )

    def _find_answer_prefix(self, thinks: bool) -> str:
        """What the generation prompt puts after `<|turn>model` (an empty thought, or nothing)."""
        probe = [{"role": "user", "content": "a"}]
        rendered = self._template.render(
            {"messages": probe},
            "a first try",
            add_generation_prompt=True,
            enable_thinking=thinks,
        )
        _, found, suffix = rendered.rpartition(MODEL_TURN)
        if not found:
            raise DataError(
                f"The chat template's generation prompt does not contain {MODEL_TURN!r}; it is "
                "not a Gemma 4 template."
            )
        return suffix

    def _fit(self, text: EncodedText) -> EncodedText:
        """Refuse or cut a row that is too long; refuse one without a label."""
        fitted = self._fitter.fit(text)
        if not fitted.num_supervised_tokens:
            raise DataError(
                f"{text.where}: no token is left to learn"
                + (" after cutting it to data.max_length." if fitted is not text else ".")
            )
        return fitted

    def _decode(self, example: Example, media: dict[str, list[Any]]) -> Example:
        """The example with its media as patches and features."""
        for kind, column in MEDIA_COLUMNS.items():
            given = media.get(kind, [])
            encoded = [getattr(self.media, kind).encode(m, example.where) for m in given]
            # The count was made from the header; the file may have changed since.
            token = self.placeholders.soft_ids.get(kind)
            num_expected = 0 if token is None else int((example.input_ids == token).sum())
            num_found = sum(medium.num_soft_tokens for medium in encoded)
            if num_found != num_expected:
                raise DataError(
                    f"{example.where}: its {column} take {num_found} tokens where {num_expected} "
                    "were counted when the row was checked. Was a file changed? Then prepare the "
                    "data again with data.prepared=refresh."
                )
            setattr(example, column, encoded)
        return example
