"""The Jinja environment that chat templates run in: no way out, and bounded time and memory.

A template is part of a checkpoint, so it is somebody else's program. jinja2's sandbox keeps it from
Python's internals; it does not keep it from `'a' * 300000000`, from nested loops, or from a format
string as wide as the memory. Here every loop, macro and call counts, what an operation would make
is measured before it is made, and only filters and methods that templates need are there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import islice
from typing import Any

from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from gemtune.data.rendering import probes
from gemtune.data.rendering.sandbox_filters import to_json, without_strings

MAX_CHARACTERS = 8_000_000
"""Of any text that a template makes, its output included; ten times the longest context."""
MAX_ITEMS = 1_000_000
"""Of any list or mapping, counted with all that is inside."""
MAX_SECONDS = 0.5
"""Of processor time for one conversation, and `SECONDS_PER_MESSAGE` more for each message."""
SECONDS_PER_MESSAGE = 0.002
_TICKS_PER_LOOK = 64
_MAX_BITS = 1024

_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items",
    "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum", "title",
    "trim", "unique", "upper",
)  # fmt: skip
# They hand on what is inside of their argument and never look at how large it is.
_STRUCTURAL = frozenset(
    ("count", "d", "default", "dictsort", "first", "items", "last", "length", "list", "map")
    + ("reject", "rejectattr", "reverse", "select", "selectattr")
)
_OF_TEXTS = frozenset(
    ("capitalize", "lower", "replace", "safe", "string", "title", "trim", "upper")
)
_TEXT_METHODS = frozenset(
    ("capitalize", "count", "endswith", "find", "isdigit", "isspace", "join", "lower", "lstrip")
    + ("removeprefix", "removesuffix", "replace", "rfind", "rsplit", "rstrip", "split")
    + ("splitlines", "startswith", "strip", "title", "upper")
)
_MAPPING_METHODS = frozenset(("get", "items", "keys", "values"))
_LIST_METHODS = frozenset(("count", "index"))


class LimitError(TemplateError):
    """A template that would take too long or too much memory."""


class _Generation(Extension):
    """`{% generation %}` of training templates: what is inside is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Guards(NodeTransformer):
    """Puts a tick into every loop and macro, and a measure around what makes texts and lists."""

    def _ticking(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_guard("tick")))
        return node

    visit_For = visit_Macro = visit_CallBlock = _ticking

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _guard("joined", *node.nodes)

    def _measured(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # what a loop or `set` unpacks into
            return node
        if all(isinstance(item, nodes.Const) for item in node.items):
            return node
        return _guard("measured", node)

    visit_List = visit_Tuple = visit_Dict = _measured


def _guard(name: str, *arguments: nodes.Node) -> nodes.Call:
    # Of the environment, not of the context: a template cannot put its own in the place.
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of transformers' chat templates, with limits. One thread at a time.

    Raises from whatever runs in it: LimitError, SecurityError, or what the template itself does.
    There is no `strftime_now`: a row rendered today must be the row rendered tomorrow.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _Generation],
            finalize=self._printable,
            optimized=False,
        )
        self.tracing = False
        """Whether texts are probes, whose every use must be one that `probes` follows."""
        self.control_tokens: Callable[[str], bool] = lambda _: False
        self.start(0)
        self.concat = self._concatenated
        self.filters = {name: self._guarded(name, FILTERS[name]) for name in _FILTERS}
        self.filters["tojson"] = self._guarded("tojson", to_json)
        self.filters["sum"] = self._guarded("sum", without_strings(FILTERS["sum"]))
        self.globals = {
            "range": safe_range,
            "dict": dict,
            "namespace": Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": raise_exception,
        }

    def start(self, num_messages: int) -> None:
        """Begin to count for one conversation."""
        self._ticks = 0
        seconds = MAX_SECONDS + SECONDS_PER_MESSAGE * num_messages
        self._end = time.thread_time() + seconds

    def tick(self, looks: bool = False) -> str:
        """One round of a loop, one call. What it returns is printed: nothing."""
        self._ticks += 1
        looks = looks or not self._ticks % _TICKS_PER_LOOK
        if looks and time.thread_time() > self._end:
            raise LimitError(f"it ran for more than {MAX_SECONDS} s of processor time")
        return ""

    def joined(self, *pieces: Any) -> str:
        """The operator ~."""
        return self._concatenated([str(self._printable(piece)) for piece in pieces])

    def measured(self, value: Any) -> Any:
        """A list, tuple or mapping that a template wrote, if it is not too large."""
        weigh(value)
        return value

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        guarded = _Guards().visit(source)
        return super()._generate(guarded, *arguments, **options)

    def _concatenated(self, pieces: Iterable[str]) -> str:
        kept, length = [], 0
        for piece in pieces:
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise LimitError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
            kept.append(piece)
        if self.tracing:
            return probes.joined(kept)
        return "".join(kept)

    def _printable(self, value: Any) -> Any:
        if isinstance(value, list | tuple | dict):
            raise SecurityError(
                f"prints a {type(value).__name__} as Python would; it may know contents that are "
                "texts alone"
            )
        if not isinstance(value, str | Undefined):
            weigh(value, printed=True)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formats with the operator %, which is not allowed")
        if operator == "**" or (operator == "*" and not _plain_product(left, right)):
            raise LimitError(f"it uses the operator {operator} on values that may grow large")
        if operator == "+" and not isinstance(left, str):
            weigh([left, right])
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str) and len(result) > MAX_CHARACTERS:
            raise LimitError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.tick()
        owner = getattr(__obj, "__self__", None)
        if owner is not __self:
            __self._check_callable(__obj, owner, args)
            if __self.tracing and not isinstance(__obj, Macro) and __obj is not Namespace:
                # jinja2 hands the variables of the loop along, for functions that ask for them.
                given = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
                probes.check_untouched(args, given)
        result = super().call(__context, __obj, *args, **kwargs)
        if __obj is dict:
            weigh(result)
        return result

    def _check_callable(self, called: Any, owner: Any, arguments: tuple[Any, ...]) -> None:
        """Refuse what templates have no need to call."""
        name = getattr(called, "__name__", "")
        if isinstance(owner, probes.Probe):
            allowed = True  # its methods refuse for themselves
        elif isinstance(owner, str):
            allowed = name in _TEXT_METHODS
            if name == "replace":
                _check_replace(owner, *arguments[:2])
            elif name == "join":
                raise SecurityError("calls join of a text; the filter join is there")
        elif isinstance(owner, dict):
            allowed = name in _MAPPING_METHODS
        elif isinstance(owner, list | tuple):
            allowed = name in _LIST_METHODS
        elif isinstance(
            called, Macro | LoopContext | BlockReference | Undefined | Joiner
        ) or isinstance(owner, LoopContext | Cycler | Joiner):
            allowed = True
        else:
            allowed = any(called is known for known in self.globals.values())
        if not allowed:
            raise SecurityError(f"calls {name or type(called).__name__}, which is not allowed")

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that measures what it is given, and follows probes or refuses them."""
        takes_context = hasattr(function, "jinja_pass_arg")

        @wraps(function)
        def guarded(*arguments: Any, **options: Any) -> Any:
            self.tick(looks=True)  # a filter may go through a long list
            given = arguments[1:] if takes_context else arguments
            if self.tracing:
                followed, result = probes.filtered(name, given, options)
                if followed:
                    return result
            if name in _OF_TEXTS and given:
                self._printable(given[0])
            if name not in _STRUCTURAL:
                for value in (*given, *options.values()):
                    weigh(value)
            if name == "join":
                items = list(islice(given[0], MAX_ITEMS + 1))
                separator = given[1] if len(given) > 1 else options.get("d", "")
                _check_product(len(items) + 1, len(str(separator)) + 1)
                weigh(items)
                place = 1 if takes_context else 0
                arguments = (*arguments[:place], items, *arguments[place + 1 :])
            elif name == "replace":
                _check_replace(*(str(value) for value in given[:1]), *given[1:3])
            return function(*arguments, **options)

        return guarded


def raise_exception(message: Any) -> None:
    """What templates call to refuse a conversation."""
    raise TemplateError(str(message))


def weigh(value: Any, *, printed: bool = False) -> int:
    """How large a value is, each list counted as often as it stands in another one.

    Raises:
        LimitError: more than `MAX_ITEMS`, or, if it is to be printed, of a kind that has no text.
    """
    known: dict[int, int] = {}

    def of(item: Any) -> int:
        if isinstance(item, str):
            if len(item) > MAX_CHARACTERS:
                raise LimitError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
            return 1
        if isinstance(item, list | tuple | dict):
            if id(item) in known:
                return known[id(item)]
            inner = item.values() if isinstance(item, dict) else item
            total = 1 + len(item)
            for each in inner:
                total += of(each)
                if total > MAX_ITEMS:
                    raise LimitError(f"it makes a list of more than {MAX_ITEMS:,} items")
            known[id(item)] = total
            return total
        if isinstance(item, int) and item.bit_length() > _MAX_BITS:
            raise LimitError("it makes a number of hundreds of digits")
        if printed and not isinstance(item, int | float | Undefined | type(None)):
            raise SecurityError(f"prints a {type(item).__name__}")
        return 1

    return of(value)


def _plain_product(left: Any, right: Any) -> bool:
    """Whether a product is of small numbers, or repeats a text or list within the limits."""
    if isinstance(left, float) or isinstance(right, float):
        return True
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length() <= _MAX_BITS
    times, repeated = (left, right) if isinstance(left, int) else (right, left)
    if not isinstance(times, int) or not isinstance(repeated, str | list | tuple):
        return False
    if isinstance(repeated, str):
        return times * len(repeated) <= MAX_CHARACTERS
    return times * weigh(repeated) <= MAX_ITEMS


def _check_replace(text: str, old: Any, new: Any) -> None:
    places = len(text) + 1 if old == "" else text.count(str(old))
    _check_product(places, len(str(new)))


def _check_product(count: int, length: int) -> None:
    if count * length > MAX_CHARACTERS:
        raise LimitError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
