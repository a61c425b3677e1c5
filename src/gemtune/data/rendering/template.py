"""The checkpoint's own chat template, run in a sandbox, once for each shape of a conversation."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError

from gemtune.data.rendering.leaves import Shape
from gemtune.data.rendering.probes import Atom, Hole, Probe, UntraceableError, atoms_of
from gemtune.data.rendering.sandbox import GuardedEnvironment, LimitError
from gemtune.errors import DataError

MAX_TEMPLATE_CHARACTERS = 1_000_000
# Private-use characters of plane 16. Around a text they show where it went; one in the place of a
# control token of the data hides it from the template.
_BEGIN, _END, _HIDDEN = "\U0010f000", "\U0010f001", 0x10F100
_OWN = re.compile("[\U0010f000-\U0010ffff]")


@dataclass(frozen=True)
class Rendered:
    """What a template makes of a conversation: its own text, and holes where the data's go."""

    atoms: tuple[Atom, ...]
    texts: tuple[str, ...] | None = None
    """What goes into the holes, where that is not the conversation's own texts."""


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> tuple[GuardedEnvironment, Template]:
    """Compiling one of a real checkpoint takes a fifth of a second."""
    environment = GuardedEnvironment()
    return environment, environment.from_string(source)


class ChatTemplate:
    """Renders conversations by a template that is not trusted.

    Args:
        source: the template.
        control: finds the control tokens that the tokenizer knows.
        variables: what the template gets beside messages: bos_token and the like.

    Raises:
        DataError: it is no template, or one that the sandbox refuses.
    """

    def __init__(self, source: str, control: re.Pattern[str], variables: dict[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise DataError(
                f"The chat template has {len(source):,} characters; at most "
                f"{MAX_TEMPLATE_CHARACTERS:,} are read."
            )
        self.source = source
        self._control = control
        self._variables = variables
        try:
            self._environment, self._compiled = _compiled(source)
        except (TemplateError, RecursionError, MemoryError, ValueError) as error:
            raise DataError(f"The chat template cannot be used: {_reason(error)}") from error
        self.is_traceable = True
        """False once its output depended on a text in ways that cannot be followed."""

    def trace(self, shape: Shape, **options: Any) -> Rendered | None:
        """What it makes of every conversation of this shape, whatever the texts are.

        None where that cannot be known: `run` it for each.
        """
        if not self.is_traceable or shape.hides_control_tokens(self._control):
            return None

        def is_control(text: str) -> bool:
            return self._control.search(text) is not None

        probes = [Probe([Hole(i)], is_control) for i in range(len(shape.leaves))]
        self._environment.tracing = True
        try:
            text = self._generate(shape.filled(probes), options)
        except UntraceableError:
            self.is_traceable = False
            return None
        except Exception:  # it refuses the conversation, or fails: `run` says so with the place
            return None
        finally:
            self._environment.tracing = False
        atoms = atoms_of(text)
        if any(isinstance(atom, str) and "\ufdd0" in atom for atom in atoms):
            self.is_traceable = False  # a probe went through something that saw its characters
            return None
        return Rendered(atoms)

    def run(self, shape: Shape, texts: Sequence[str], where: str, **options: Any) -> Rendered:
        """What it makes of this conversation.

        Control tokens in the texts are hidden from it. The texts are found by marks around them;
        where the marks change what it does, no hole is known, and all of the text is its own.

        Raises:
            DataError: beginning with `where`.
        """
        if any(map(_OWN.search, texts)) or shape.has_characters(_OWN):
            raise DataError(
                f"{where}: the text has private-use characters of plane 16, which stand for other "
                "things while a chat template runs. Remove them."
            )
        hidden: list[str] = []

        def hide(found: re.Match[str]) -> str:
            if found.group() not in hidden:
                hidden.append(found.group())
            return chr(_HIDDEN + hidden.index(found.group()))

        safe = [self._control.sub(hide, text) for text in texts]
        plain = shape.mapped(lambda text: self._control.sub(hide, text))
        bare = self.render(plain.filled(safe), where, **options)
        marked = self.render(plain.filled([_marked(text) for text in safe]), where, **options)
        shown = {chr(_HIDDEN + i): token for i, token in enumerate(hidden)}
        if marked.replace(_BEGIN, "").replace(_END, "") == bare:
            found = _between_marks(marked, safe, shown)
            if found is not None:
                return found
        # It changes the texts. What it makes of others has as many control tokens, or they are the
        # data's.
        neutral = self.render(plain.filled(["x"] * len(texts)), where, **options)
        if hidden or self._control.findall(bare) != self._control.findall(neutral):
            raise DataError(
                f"{where}: the text contains {hidden[0] if hidden else 'a control token'!r} where "
                "it cannot be kept as text: in a declaration or a key, or in a text that the chat "
                "template changes. Remove it."
            )
        return Rendered((bare,))

    def render(self, messages: dict[str, Any], where: str, **options: Any) -> str:
        """The text as the template gives it.

        Raises:
            DataError: beginning with `where`: refused, failed, or stopped at a limit.
        """
        try:
            return self._generate(messages, options)
        except LimitError as error:
            raise DataError(
                f"{where}: the chat template was stopped: {error}. It is the checkpoint's own; "
                "look at it before you use it."
            ) from error
        except TemplateError as error:
            raise DataError(f"{where}: the chat template refuses it: {_reason(error)}") from error
        except Exception as error:  # whatever a program may raise
            raise DataError(f"{where}: the chat template fails on it: {_reason(error)}") from error

    def _generate(self, conversation: dict[str, Any], options: dict[str, Any]) -> str:
        environment = self._environment
        environment.start(len(conversation["messages"]))
        template = self._compiled
        context = template.new_context(self._variables | conversation | options)
        # Not Template.render, which rewrites tracebacks and catches too much.
        return environment._concatenated(template.root_render_func(context))


def _reason(error: BaseException) -> str:
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:500]


def _marked(text: str) -> str:
    """With marks inside of the white space around it, which a template may trim."""
    core = text.strip()
    if not core:
        return text
    begin = len(text) - len(text.lstrip())
    return f"{text[:begin]}{_BEGIN}{core}{_END}{text[begin + len(core) :]}"


def _between_marks(marked: str, texts: Sequence[str], shown: dict[str, str]) -> Rendered | None:
    """Holes for the texts that stand between marks unchanged; None if one is changed or unknown."""
    waiting: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        waiting.setdefault(text.strip(), []).append(number)
    marks = re.findall(f"[{_BEGIN}{_END}]", marked)
    if marks != [_BEGIN, _END] * (len(marks) // 2):
        return None
    atoms: list[Atom] = []
    for number, piece in enumerate(re.split(f"[{_BEGIN}{_END}]", marked)):
        if number % 2 == 0:
            if any(sign in piece for sign in shown):
                return None  # a token of the data that a template took out of its text
            atoms.append(piece)
        elif numbers := waiting.get(piece):
            # The same text several times: they are taken in order, and the last one again.
            atoms.append(Hole(numbers.pop(0) if len(numbers) > 1 else numbers[0], True, True))
        else:
            return None
    return Rendered(tuple(atom for atom in atoms if atom != ""))


def is_own_character(text: str) -> bool:
    """Whether the text has one of the characters that rendering keeps for itself."""
    return _OWN.search(text) is not None
