"""Which parts of a rendered conversation the model writes, found from its turn tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gemtune.data.rendering.leaves import REASONING, RESPONSE, TOOL, Leaf
from gemtune.data.rendering.probes import Atom, Hole
from gemtune.data.rendering.template import is_own_character
from gemtune.errors import DataError

MODEL_TURN = "<|turn>model\n"
TURN_END = "<turn|>"
THOUGHT_BEGIN, THOUGHT_END = "<|channel>thought\n", "\n<channel|>"
_CHANNEL = "<|channel>"
_RESPONSE_BEGIN = "<|tool_response>"
_MEDIA = r"<\|image\|>|<\|audio\|>|<\|video\|>"
# A turn ends with its token. A call that nobody answered ends with the token that begins the
# answer, and an answer after which the model said nothing ends itself.
_TURN = re.compile(
    r"<\|turn>(?P<role>[^\n<]*)\n(?P<body>(?:(?!<\|turn>).)*?"
    r"(?:<turn\|>|(?:<\|tool_response>|<tool_response\|>(?:" + _MEDIA + r")*)\n?\Z))",
    re.DOTALL,
)
# Within a turn of the model, what it did not write.
_GIVEN = re.compile(
    r"(?:<\|tool_response>.*?<tool_response\|>|<\|tool_response>\n?\Z|" + _MEDIA + r")+", re.DOTALL
)
_FIRST_HOLE = 0x100000  # private use, plane 16 up to what rendering keeps for itself
_MAX_HOLES = 0xF000
_HOLES = re.compile(f"[{chr(_FIRST_HOLE)}-{chr(_FIRST_HOLE + _MAX_HOLES - 1)}]")


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation, and the message (from 0) that the model writes it as.

    `message` is None for what the model is given.
    """

    atoms: tuple[Atom, ...]
    message: int | None


@dataclass(frozen=True)
class Rules:
    """How the turns of one conversation are read.

    Args:
        prefix: what the generation prompt puts behind the header of the model's turn. It is given,
            not learned.
        prefix_on: "last": it is put in before the last answer, where the template left it out;
            "all": before every answer.
        dropped_reasoning: what becomes of reasoning that the template leaves out: "refuse" it,
            "keep" it where the format has it, or "drop" it.
    """

    prefix: str = ""
    prefix_on: str = "last"
    dropped_reasoning: str = "refuse"


def find_pieces(
    atoms: Sequence[Atom],
    leaves: Sequence[Leaf],
    texts: Sequence[str],
    roles: Sequence[str],
    rules: Rules,
    where: str,
) -> list[Piece]:
    """The rendered conversation, cut where what is given and what the model writes meet.

    Written by the model, within its turns: everything but tool responses, media placeholders and
    the prefix; with the token that ends the turn.

    Args:
        atoms: as the template rendered them.
        leaves, texts: what each hole is, and a text for it. Without any hole, the texts are looked
            for in what was rendered.
        roles: of the messages.

    Raises:
        DataError: beginning with `where`: turns that are not those of the messages, or a text that
            the template left out.
    """
    text, holes = _with_holes_as_characters(atoms, where)
    turns = [(m["role"], m.start("body"), m.end("body")) for m in _TURN.finditer(text)]
    groups = _answers(roles)
    _check_turns(turns, groups, roles, where)
    there = {hole.number for hole in holes.values()}
    if not holes:
        there = {number for number, leaf in enumerate(texts) if leaf.strip() in text}
    dropped = _dropped(there, leaves, where, rules.dropped_reasoning)

    regions: list[tuple[int, int, int]] = []
    inserts: dict[int, list[Atom]] = {}
    answered = [(begin, end) for role, begin, end in turns if role == "model"]
    for number, ((begin, end), group) in enumerate(zip(answered, groups, strict=True)):
        found = _regions_of_turn(text, begin, end, group, holes, leaves)
        if rules.prefix and text.startswith(rules.prefix, begin):
            found[0] = (begin + len(rules.prefix), *found[0][1:])
        thinks = text.startswith(_CHANNEL, begin) or group[0] in dropped
        is_due = rules.prefix_on == "all" or number == len(groups) - 1
        if rules.prefix and is_due and not thinks:
            inserts[begin] = [rules.prefix]
        regions += found
    kept: dict[int, list[Atom]] = {}
    for message, hole in dropped.items():
        begin = next((b for b, _, m in regions if m == message), None)
        if begin is None:
            raise DataError(
                f"{where}: message {message + 1}: where its reasoning belongs cannot be told from "
                "what the chat template rendered. Leave it out: data.dropped_reasoning=drop."
            )
        kept[begin] = [THOUGHT_BEGIN, Hole(hole), THOUGHT_END]
    return _cut(text, regions, inserts, kept, holes)


def _with_holes_as_characters(atoms: Sequence[Atom], where: str) -> tuple[str, dict[str, Hole]]:
    """One text with a character of its own for every hole, and the holes by their character."""
    holes: dict[str, Hole] = {}
    pieces = []
    for atom in atoms:
        if isinstance(atom, str):
            if _HOLES.search(atom) or is_own_character(atom):
                raise DataError(
                    f"{where}: the text has private-use characters of plane 16, which stand for "
                    "other things while it is rendered. Remove them."
                )
            pieces.append(atom)
            continue
        if len(holes) == _MAX_HOLES:
            raise DataError(f"{where}: more than {_MAX_HOLES:,} texts are too many for one row.")
        sign = chr(_FIRST_HOLE + len(holes))
        holes[sign] = atom
        pieces.append(sign)
    return "".join(pieces), holes


def _answers(roles: Sequence[str]) -> list[list[int]]:
    """The assistant messages of each turn of the model: those with tools alone between them."""
    groups: list[list[int]] = []
    is_open = False
    for number, role in enumerate(roles):
        if role == "assistant":
            if not is_open:
                groups.append([])
            groups[-1].append(number)
            is_open = True
        elif role != "tool":
            is_open = False
    return groups


def _check_turns(
    turns: list[tuple[str, int, int]], groups: list[list[int]], roles: Sequence[str], where: str
) -> None:
    found = [role for role, _, _ in turns]
    num_answers, expected = found.count("model"), len(groups)
    if num_answers != expected:
        several = "" if expected == roles.count("assistant") else " in a row"
        raise DataError(
            f"{where}: the chat template rendered {num_answers} model turns for {expected} "
            f"assistant messages{several}, so what is to be learned is unknown. Its model turns "
            f"must read {MODEL_TURN!r} ... {TURN_END!r}."
        )
    if found.count("user") != roles.count("user"):
        raise DataError(
            f"{where}: the chat template rendered {found.count('user')} user turns for "
            f"{roles.count('user')} user messages. Its turns must read '<|turn>user\\n' ... "
            f"{TURN_END!r}."
        )
    if others := sorted({*found} - {"model", "user", "system", "developer"}):
        raise DataError(
            f"{where}: the chat template rendered a turn of {others[0]!r}. Gemma 4 has tool "
            "responses inside of the model's turn: this template is older than tools, or not its "
            "own. Take the chat template of the newest checkpoint."
        )


def _dropped(there: set[int], leaves: Sequence[Leaf], where: str, policy: str) -> dict[int, int]:
    """Message -> leaf of reasoning that is to be put back.

    Raises:
        DataError: a text that is not there and is no reasoning; or reasoning, unless asked for.
    """
    kept = {}
    for number, leaf in enumerate(leaves):
        if number in there:
            continue
        if leaf.kind != REASONING:
            what = f"the {leaf.kind} of message {leaf.message + 1}"
            raise DataError(
                f"{where}: the chat template leaves out "
                f"{'the declared tools' if leaf.kind == TOOL else what}. It would be lost. Remove "
                "it from the row, or take the chat template of a checkpoint that renders it."
            )
        if policy == "refuse":
            raise DataError(
                f"{where}: the chat template leaves out the reasoning of message "
                f"{leaf.message + 1}, so that it would not be learned. Keep it with "
                "data.dropped_reasoning=keep, or leave it out with data.dropped_reasoning=drop."
            )
        if policy == "keep":
            kept[leaf.message] = number
    return kept


def _regions_of_turn(
    text: str,
    begin: int,
    end: int,
    group: list[int],
    holes: dict[str, Hole],
    leaves: Sequence[Leaf],
) -> list[tuple[int, int, int]]:
    """(begin, end, message) of what the model writes in one turn.

    Where it goes on after a tool response, the texts in a region say which message it is; one
    without texts belongs to the message before it, whose turn it ends.
    """
    edges = [begin]
    for match in _GIVEN.finditer(text, begin, end):
        edges += match.span()
    edges.append(end)
    regions = []
    message = group[0]
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        if first == last:
            continue
        if not holes:  # a message for each, as there is a tool response between
            regions.append((first, last, group[min(len(regions), len(group) - 1)]))
            continue
        written = [
            leaves[holes[sign].number]
            for sign in _HOLES.findall(text, first, last)
            if leaves[holes[sign].number].kind != RESPONSE
        ]
        if written:
            message = written[0].message
        regions.append((first, last, message))
    return regions


def _cut(
    text: str,
    regions: list[tuple[int, int, int]],
    inserts: dict[int, list[Atom]],
    kept: dict[int, list[Atom]],
    holes: dict[str, Hole],
) -> list[Piece]:
    pieces: list[Piece] = []
    at = 0
    for begin, end, message in regions:
        given = [*_atoms(text[at:begin], holes), *inserts.get(begin, [])]
        if given:
            pieces.append(Piece(tuple(given), None))
        pieces.append(Piece((*kept.get(begin, []), *_atoms(text[begin:end], holes)), message))
        at = end
    if at < len(text):
        pieces.append(Piece(_atoms(text[at:], holes), None))
    return pieces


def _atoms(text: str, holes: dict[str, Hole]) -> tuple[Atom, ...]:
    """The characters of holes as holes again."""
    atoms: list[Atom] = []
    at = 0
    for match in _HOLES.finditer(text):
        if match.start() > at:
            atoms.append(text[at : match.start()])
        atoms.append(holes[match.group()])
        at = match.end()
    if at < len(text):
        atoms.append(text[at:])
    return tuple(atoms)
