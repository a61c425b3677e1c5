"""Which messages of a row are learned, and what of a message nothing would be made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemtune.data.rendering.conversation import Conversation
from gemtune.errors import DataError

LEARN = ("assistant", "last_assistant", "completion", "all")
_PLAIN = frozenset(("role", "content"))
_READ = frozenset(
    ("role", "content", "reasoning_content", "reasoning", "thinking", "tool_calls")
    + ("tool_responses", "tool_call_id", "weight", "train")
)


class LearnedMessages:
    """The choice of `data.learn`, narrowed by what the messages say of themselves."""

    @staticmethod
    def of(conversation: Conversation, learn: str) -> frozenset[int] | None:
        """Numbers (from 0) of the assistant messages that are learned; None: all of the row is.

        A message with `train: false` or a weight of 0 never is.

        Raises:
            DataError: a weight between, for the loss has none; `completion` of a row that is no
                prompt and completion.
        """
        where, messages = conversation.where, conversation.messages
        chosen = []
        for number, message in enumerate(messages):
            weight = message.get("weight", 1.0)
            if weight not in (0.0, 1.0):
                raise DataError(
                    f"{where}: message {number + 1} has a weight of {weight:g}. The loss has no "
                    "weights for single tokens, so that only 0 and 1 can be learned with. To have "
                    "it count more, repeat the row: data.mix with a weight for each source."
                )
            if message["role"] == "assistant" and weight:
                chosen.append(number)
        if learn == "all":
            if any(not message.get("weight", 1.0) for message in messages):
                raise DataError(
                    f"{where}: a message is not to be learned (train or weight), and "
                    "data.learn=all learns everything. Use data.learn=assistant."
                )
            return None
        if learn == "last_assistant":
            last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
            chosen = [number for number in chosen if number == last]
        elif learn == "completion":
            if not conversation.num_prompt_messages:
                raise DataError(
                    f"{where}: data.learn=completion is for rows of 'prompt' and 'completion'; "
                    "this one has messages. Use data.learn=assistant or last_assistant."
                )
            chosen = [n for n in chosen if n >= conversation.num_prompt_messages]
        return frozenset(chosen)


def refuse_unread_keys(messages: Sequence[Any], ignored: Sequence[str], where: str) -> None:
    """Raise DataError for a message with a key that nothing would be made of."""
    for number, message in enumerate(messages, start=1):
        if message.keys() <= _PLAIN:
            continue
        for key, value in message.items():
            is_read = key in _READ or (key == "name" and message["role"] == "tool")
            if not is_read and key not in ignored and value not in (None, "", [], {}):
                raise DataError(
                    f"{where}: message {number} ({message['role']}) has '{key}', which is not "
                    "rendered and would be lost. Remove it, or say that it need not be: "
                    f"data.ignored_keys=[{','.join([*ignored, key])}]."
                )
