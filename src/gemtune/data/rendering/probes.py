"""Texts that stand for any text, to find out once what a template does with them.

A template is run on probes in the place of a conversation's texts. Where it only trims them, joins
them, looks whether they are texts, or looks for control tokens (which a text of the data never
shows it), its output for any other texts is this one with those put in. Every other use raises
`UntraceableError`: then the template has to be run for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2.runtime import Undefined


class UntraceableError(Exception):
    """What a template does depends on the text itself."""


@dataclass(frozen=True)
class Hole:
    """The place of text `number`, with its white space at an end taken off or not."""

    number: int
    trims_left: bool = False
    trims_right: bool = False

    def fill(self, text: str) -> str:
        """The text as it stands here."""
        if self.trims_left and self.trims_right:
            return text.strip()
        if self.trims_left:
            return text.lstrip()
        return text.rstrip() if self.trims_right else text


Atom = str | Hole


class Probe(str):
    """A text with holes in it. The characters that it has as a `str` mean nothing."""

    __slots__ = ("atoms", "is_control")
    atoms: tuple[Atom, ...]
    is_control: Callable[[str], bool]
    """Whether a string has a control token in it, so that no text of the data has it."""

    def __new__(cls, atoms: Iterable[Atom], is_control: Callable[[str], bool]) -> Probe:
        self = super().__new__(cls, "\ufdd0")  # a noncharacter: seen in the output, it gives away
        self.atoms = tuple(atom for atom in atoms if atom != "")
        self.is_control = is_control
        return self

    def __str__(self) -> str:
        return self

    def _add(self, left: Any, right: Any) -> Probe:
        if not (isinstance(left, str) and isinstance(right, str)):
            raise UntraceableError("added to what is no text")
        return Probe((*atoms_of(left), *atoms_of(right)), self.is_control)

    def __add__(self, other: Any) -> Probe:
        return self._add(self, other)

    def __radd__(self, other: Any) -> Probe:
        return self._add(other, self)

    def strip(self, characters: Any = None) -> Probe:
        return self._trimmed(characters, True, True)

    def lstrip(self, characters: Any = None) -> Probe:
        return self._trimmed(characters, True, False)

    def rstrip(self, characters: Any = None) -> Probe:
        return self._trimmed(characters, False, True)

    def _trimmed(self, characters: Any, left: bool, right: bool) -> Probe:
        if characters is not None:
            raise UntraceableError("trimmed of other characters than white space")
        atoms = list(self.atoms)
        if left:
            _trim_end(atoms, 0, str.lstrip, "trims_left")
        if right:
            _trim_end(atoms, -1, str.rstrip, "trims_right")
        return Probe(atoms, self.is_control)

    def _has(self, sought: Any) -> bool:
        """Whether `sought`, which has a control token in it, is among what the template wrote."""
        if not isinstance(sought, str) or isinstance(sought, Probe) or not self.is_control(sought):
            raise UntraceableError("looked into")
        return any(isinstance(atom, str) and sought in atom for atom in self.atoms)

    def __contains__(self, sought: Any) -> bool:
        return self._has(sought)

    def split(self, separator: Any = None, maxsplit: int = -1) -> list[Probe]:
        if self._has(separator):
            raise UntraceableError("split at a token of the template's own")
        return [self]

    def replace(self, old: Any, new: Any, count: int = -1) -> Probe:
        if self._has(old):
            raise UntraceableError("a token of the template's own is replaced")
        return self

    def startswith(self, sought: Any, *_: Any) -> bool:
        if self._has(sought):
            raise UntraceableError("begins with a token of the template's own")
        return False

    endswith = startswith

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str) and not isinstance(other, Probe) and other.strip() == "":
            return False  # a text that stands for a probe has more than white space in it
        if not isinstance(other, str):
            return False
        raise UntraceableError("compared with a text")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        return True

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise UntraceableError("used otherwise")

    __hash__ = __iter__ = __getitem__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __format__ = _refuse
    capitalize = casefold = center = count = encode = expandtabs = find = format = _refuse
    format_map = index = isalnum = isalpha = isascii = isdecimal = isdigit = _refuse
    isidentifier = islower = isnumeric = isprintable = isspace = istitle = isupper = _refuse
    join = ljust = lower = partition = removeprefix = removesuffix = rfind = rindex = _refuse
    rjust = rpartition = rsplit = splitlines = swapcase = title = translate = upper = _refuse
    zfill = _refuse


def _trim_end(atoms: list[Atom], end: int, strip: Callable[[str], str], flag: str) -> None:
    """Take white space off one end, up to a text, which is more than white space."""
    while atoms:
        atom = atoms[end]
        if isinstance(atom, Hole):
            atoms[end] = replace(atom, **{flag: True})
            return
        atoms[end] = strip(atom)
        if atoms[end]:
            return
        del atoms[end]


class _AtLeastOne(int):
    """The length of a probe: nothing is known of it but that it is not 0."""

    def _compared(self, with_zero: bool, with_one: bool | None = None) -> Callable[[Any], bool]:
        def compare(other: Any) -> bool:
            if other == 0 and type(other) is int:
                return with_zero
            if other == 1 and type(other) is int and with_one is not None:
                return with_one
            raise UntraceableError("its length counts")

        return compare

    def __gt__(self, other: Any) -> bool:
        return self._compared(True)(other)

    def __ge__(self, other: Any) -> bool:
        return self._compared(True, True)(other)

    def __lt__(self, other: Any) -> bool:
        return self._compared(False, False)(other)

    def __le__(self, other: Any) -> bool:
        return self._compared(False)(other)

    def __eq__(self, other: object) -> bool:
        return self._compared(False)(other)

    def __ne__(self, other: object) -> bool:
        return self._compared(True)(other)

    def _refuse(self, *_: Any) -> Any:
        raise UntraceableError("its length counts")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __hash__ = _refuse
    __floordiv__ = __truediv__ = __index__ = __str__ = __repr__ = __neg__ = _refuse


# Filters that hand a probe on, or look at the list around it alone.
_CONTAINERS = frozenset(
    ("dictsort", "first", "items", "last", "list", "map", "reject", "rejectattr", "reverse")
    + ("select", "selectattr", "count", "length", "default", "d")
)


def filtered(name: str, given: Sequence[Any], options: dict[str, Any]) -> tuple[bool, Any]:
    """(whether this is the result, the result) of a filter on probes.

    Raises:
        UntraceableError: the filter looks into one.
    """
    value = given[0] if given else None
    if isinstance(value, Probe):
        check_untouched(given[1:], options)
        if name == "trim":
            return True, value.strip(*given[1:])
        if name in ("length", "count"):
            return True, _AtLeastOne(1)
        if name in ("default", "d", "string", "safe"):
            return True, value
        raise UntraceableError(f"given to the filter {name}")
    if name not in _CONTAINERS:
        check_untouched(given, options)
    return False, None


def check_untouched(arguments: Iterable[Any], options: dict[str, Any]) -> None:
    """Raise UntraceableError if there is a probe in one of them."""
    for value in (*arguments, *options.values()):
        if _has_probe(value):
            raise UntraceableError("handed to a function")


def _has_probe(value: Any) -> bool:
    if isinstance(value, Probe):
        return True
    if isinstance(value, dict):
        return any(map(_has_probe, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_probe, value))
    return not isinstance(value, str | int | float | bool | Undefined | type(None))


def joined(pieces: Sequence[str]) -> str:
    """`"".join(pieces)`, a probe if there is one among them."""
    found = next((piece for piece in pieces if isinstance(piece, Probe)), None)
    if found is None:
        return "".join(pieces)
    return Probe((atom for piece in pieces for atom in atoms_of(piece)), found.is_control)


def atoms_of(text: str) -> tuple[Atom, ...]:
    """What a text is made of: itself, or the parts of a probe."""
    return text.atoms if isinstance(text, Probe) else (text,)
