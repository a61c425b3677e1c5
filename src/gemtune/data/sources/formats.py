"""The shapes that rows of conversations come in, and how each becomes `messages`."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemtune.errors import ConfigError, DataError
from gemtune.options import did_you_mean

Row = dict[str, Any]
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
# One medium in a column of its own -> the list that messages refer to.
_SINGLE = {"image": "images", "video": "videos", "audio": "audios"}
_ROW_COLUMNS = (*_SINGLE, *_SINGLE.values(), "tools", "system", "id")


@dataclass(frozen=True)
class Format:
    """One shape: the columns that tell it, those it may have besides, and the way to `messages`."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Row], list[Any]]
    """A row with its columns renamed -> messages; DataError without the place."""

    @functools.cached_property
    def _used(self) -> frozenset[str]:
        return frozenset({*self.required, *self.optional, *_SINGLE, "system", "messages"})

    def read(self, row: Row, drops_nulls: bool) -> Row:
        """The row with `messages` and lists of media; other columns stay as they are."""
        for column in self.required:
            if column not in row:
                raise DataError(f"no '{column}'; the columns here are: {', '.join(row) or 'none'}.")
        messages = self.convert(row)
        used = self._used
        kept = {name: value for name, value in row.items() if name not in used}
        kept["messages"] = _with_system(messages, row.get("system"))
        if self.name == "prompt/completion":
            prompt = row["prompt"]
            kept["num_prompt_messages"] = len(prompt) if isinstance(prompt, list) else 1
            kept["num_prompt_messages"] += len(kept["messages"]) - len(messages)
        for single, several in _SINGLE.items():
            if row.get(single) is not None:
                if row.get(several):
                    raise DataError(f"'{single}' and '{several}' are both given. Keep one of them.")
                kept[several] = [row[single]]
        if drops_nulls:
            _drop_nulls_of_tools(kept)
        return kept


def _with_system(messages: list[Any], system: Any) -> list[Any]:
    if not system:
        return messages
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        raise DataError("both the 'system' column and the first message give a system message.")
    return [{"role": "system", "content": _text(system, "system")}, *messages]


def _messages(row: Row) -> list[Any]:
    messages = _parsed(row["messages"], "messages")
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' must be a list with at least one message.")
    return messages


def _sharegpt(row: Row) -> list[Any]:
    turns = _parsed(row["conversations"], "conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError("'conversations' must be a list with at least one turn.")
    if isinstance(turns[0], dict) and turns[0].get("role") is not None:
        return turns  # messages under another name
    kinds = _media_kinds(row)
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise DataError(
                f"turn {number} must be an object with 'from' and 'value', not "
                f"{type(turn).__name__}."
            )
        speaker = turn.get("from")
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise DataError(
                f"turn {number} is from {speaker!r}; allowed are {', '.join(_SPEAKERS)}."
            )
        value = _text(turn.get("value"), "value", f"turn {number}: ")
        more = {name: turn[name] for name in ("train", "weight") if turn.get(name) is not None}
        if speaker == "function_call":
            call = _parsed(value, "value", f"turn {number}: ", always=True)
            calls = call if isinstance(call, list) else [call]
            messages.append({"role": role, "content": None, "tool_calls": calls} | more)
        else:
            content = _with_marks(value, kinds) if role == "user" else value
            messages.append({"role": role, "content": content} | more)
    return messages


def _alpaca(row: Row) -> list[Any]:
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n\n" + _text(row["input"], "input")
    messages = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError("'history' must be a list of [question, answer].")
        messages += _turn(_text(pair[0], "history"), _text(pair[1], "history"))
    content = _with_marks(question, _media_kinds(row))
    return [*messages, *_turn(content, _text(row["output"], "output"))]


def _prompt_completion(row: Row) -> list[Any]:
    sides = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[name]
        if isinstance(value, list):
            sides.append(value)
        else:
            text = _text(value, name)
            content = _with_marks(text, _media_kinds(row)) if role == "user" else text
            sides.append([{"role": role, "content": content}])
    return sides[0] + sides[1]


def _question_answer(row: Row) -> list[Any]:
    question = _text(row["question"], "question")
    kinds = _media_kinds(row)
    content = _with_marks(question, kinds)
    if kinds and all(part["type"] == "text" for part in content):  # media stand before the text
        content = [{"type": kind} for kind, n in kinds.items() for _ in range(n)] + content
    return _turn(content, _text(row["answer"], "answer"))


FORMATS = (
    Format("messages", ("messages",), (), _messages),
    Format("ShareGPT", ("conversations",), (), _sharegpt),
    Format("Alpaca", ("instruction", "output"), ("input", "history"), _alpaca),
    Format("prompt/completion", ("prompt", "completion"), (), _prompt_completion),
    Format("question/answer", ("question", "answer"), (), _question_answer),
)
COLUMNS = tuple(
    dict.fromkeys([c for f in FORMATS for c in (*f.required, *f.optional)] + list(_ROW_COLUMNS))
)


def check_mapping(mapping: Mapping[str, Any], key: str) -> dict[str, str]:
    """`columns` of a configuration: ours -> the data's.

    Raises:
        ConfigError: a name that is none of ours, or a value that is no name.
    """
    for ours, theirs in mapping.items():
        if ours not in COLUMNS:
            raise ConfigError(
                f"{key}.{ours} is no column that is read.{did_you_mean(str(ours), COLUMNS)} "
                f"Columns: {', '.join(COLUMNS)}."
            )
        if not isinstance(theirs, str) or not theirs:
            raise ConfigError(f"{key}.{ours}={theirs!r} must be the name of a column of the data.")
    return dict(mapping)


def find_format(columns: Iterable[str], mapping: Mapping[str, str], given: str, key: str) -> Format:
    """The shape of rows with these columns, after `mapping`.

    Where the columns of several are there, those that the mapping names count, then the order of
    `FORMATS`.

    Args:
        given: the source as it was given, `data.path=...`, for messages.
        key: the configuration key of the mapping.

    Raises:
        DataError: none fits; with the columns seen and the mapping to give.
    """
    columns = list(columns)
    for ours, theirs in mapping.items():
        if theirs not in columns:
            raise DataError(
                f"{given} has no column '{theirs}', which {key} names for '{ours}'."
                f"{did_you_mean(theirs, columns)} Its columns are: {', '.join(columns)}."
            )
    renamed = set(renamed_columns(columns, mapping))
    fitting = [found for found in FORMATS if renamed.issuperset(found.required)]
    named = [found for found in fitting if set(found.required) & set(mapping)]
    if named or fitting:
        return (named or fitting)[0]
    shapes = "; ".join(f"{found.name} ({', '.join(found.required)})" for found in FORMATS)
    raise DataError(
        f"{given} has no columns of a format that is read; its columns are: "
        f"{', '.join(columns) or 'none'}. The formats are {shapes}. Say which column is which: "
        + _mapping_to_give(columns, key)
    )


def renamed_columns(columns: Iterable[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Name after the mapping -> name in the data. A mapped name hides one of the same name."""
    theirs = set(mapping.values())
    plain = {name: name for name in columns if name not in theirs and name not in mapping}
    return plain | dict(mapping)


def _mapping_to_give(columns: list[str], key: str) -> str:
    for ours, names in (
        ("messages", ("chat", "dialog", "dialogue", "conversation", "message", "turns", "chosen")),
        ("conversations", ("conv",)),
    ):
        if found := next((c for c in columns if c.lower() in names), None):
            return f"{key}='{{{ours}: {found}}}'"
    if len(columns) >= 2:
        return f"{key}='{{prompt: {columns[0]}, completion: {columns[1]}}}'"
    return f"{key}='{{messages: {columns[0] if columns else 'COLUMN'}}}'"


def _turn(question: Any, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(value: Any, name: str, place: str = "") -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}'{name}' must be a text, not {type(value).__name__}.")
    return value


def _parsed(value: Any, name: str, place: str = "", always: bool = False) -> Any:
    """A list that a CSV or Parquet column holds as JSON."""
    if not isinstance(value, str) or not (always or value.lstrip()[:1] == "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}'{name}' holds a text that is not valid JSON ({error})."
        ) from error


def _media_kinds(row: Row) -> dict[str, int]:
    """Kind -> how many of it the row gives, those that it has."""
    counts = {}
    for single, several in _SINGLE.items():
        given = row.get(several)
        count = (row.get(single) is not None) + (len(given) if isinstance(given, list) else 0)
        if count:
            counts[single] = count
    return counts


def _with_marks(text: str, kinds: Iterable[str]) -> Any:
    """A text with `<image>`, `<video>` or `<audio>` in it as parts, where the row has such media;
    else as it is."""
    marks = "|".join(kinds)
    if not marks:
        return text
    parts: list[Row] = []
    for number, piece in enumerate(re.split(f"<({marks})>", text)):
        if number % 2:
            parts.append({"type": piece})
        elif piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": text}]


def _drop_nulls_of_tools(row: Row) -> None:
    """In a table, every call has the arguments of all others, None where it was not given them."""
    if isinstance(row.get("tools"), list):
        row["tools"] = _without_nulls(row["tools"])
    row["messages"] = [
        message | {name: _without_nulls(message[name]) for name in _CALLS if message.get(name)}
        if isinstance(message, dict)
        else message
        for message in row["messages"]
    ]


_CALLS = ("tool_calls", "tool_responses")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
