"""HTML from plain texts: whatever is no `Html` is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """A text that is HTML already."""

    __slots__ = ()


def escaped(text: object) -> Html:
    """The text as HTML, quotes and all; control characters, which HTML has no way to hold, are
    written out."""
    if isinstance(text, Html):
        return text
    visible = "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
        for c in str(text)
    )
    return Html(html.escape(visible))


def element(name: str, content: object = "", **attributes: object) -> Html:
    """`<name ...>content</name>`; of attribute names a final `_` is dropped, others become `-`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{escaped(content)}</{name}>")


def joined(parts: Iterable[str], between: str = "") -> Html:
    """The parts, each escaped where it is no HTML."""
    return Html(between.join(escaped(part) for part in parts))


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: Sequence[int] = (0,)
) -> Html:
    """A table that scrolls by itself where the page is too narrow.

    Args:
        head: may be empty.
        texts: columns that hold words; the others are numbers.
    """

    def line(name: str, cells: Sequence[str]) -> Html:
        return element(
            "tr",
            joined(
                element(name, cell, class_="text") if number in texts else element(name, cell)
                for number, cell in enumerate(cells)
            ),
        )

    body = element("tbody", joined(line("td", row) for row in rows))
    top = element("thead", line("th", head)) if head else Html()
    name = "numbers" if tuple(texts) == (0,) else "words"
    return element("div", element("table", Html(top + body), class_=name), class_="wide")


def list_of(texts: Iterable[str], **attributes: object) -> Html:
    """An unordered list."""
    return element("ul", joined(element("li", text) for text in texts), **attributes)
