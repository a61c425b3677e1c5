"""A preview of the data as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator

from PIL import Image

from gemtune.html_page import LEARNED_KEY, html_page
from gemtune.preview import (
    MAX_TOKENS_SHOWN,
    Preview,
    PreviewRow,
    Token,
    printable,
    summary_lines,
)

_THUMBNAIL = 160
_MAX_REJECTED = 500

_STYLE = """
.tokens sub { display: none; font-size: .65rem; color: var(--quiet); }
#ids:checked ~ main .tokens sub { display: inline; }
#ids:checked ~ main .tokens span { outline: 1px dotted var(--line); }
td:last-child, th:last-child { width: 100%; text-align: left; padding-right: 0; }
"""


def preview_page(preview: Preview, title: str, *, ids: bool = False) -> str:
    """The page: figures, rows with what is learned marked, images, lengths, rows left out.

    Nothing in it is fetched and no script runs. Every token carries its id; `ids` says whether they
    are shown at first.
    """
    body = "\n".join(
        [
            f"<h1>{html.escape(title)}</h1>",
            *(f"<p>{html.escape(line)}</p>" for line in summary_lines(preview)),
            LEARNED_KEY,
            "<h2>Rows</h2>",
            *(_row(row) for row in preview.rows),
            "<h2>Tokens of a row</h2>",
            _histogram(preview),
            *_rejected(preview),
        ]
    )
    checked = " checked" if ids else ""
    box = f'<input type="checkbox" id="ids"{checked}> <label for="ids">show token ids</label>\n'
    return html_page(title, body, style=_STYLE, before=box)


def _row(row: PreviewRow) -> str:
    cut = ""
    if row.num_tokens > MAX_TOKENS_SHOWN:
        cut = f"; the first {MAX_TOKENS_SHOWN:,} are shown"
    pictures = "".join(
        "<figure>"
        + (f'<img alt="" src="{_data_url(medium.image)}">' if medium.image is not None else "")
        + f"<figcaption>{medium.line}</figcaption></figure>"
        for medium in row.media
    )
    return (
        f"<section><h3>{html.escape(row.where)}</h3>\n"
        f'<p class="quiet">{row.num_tokens:,} tokens, {row.num_learned:,} learned{cut}</p>\n'
        + (f'<div class="pictures">{pictures}</div>\n' if pictures else "")
        + f'<div class="tokens">{"".join(map(_token, row.tokens))}</div></section>'
    )


def _token(token: Token) -> str:
    names = ["learned"] if token.learned else ["medium"] if token.count > 1 else []
    names += ["control"] if token.is_control else []
    attribute = f' class="{" ".join(names)}"' if names else ""
    return (
        f'<span{attribute} title="{token.id}">{html.escape(printable(token))}'
        f"<sub>{token.id}</sub></span>"
    )


def _data_url(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_THUMBNAIL * 2, _THUMBNAIL * 2))
    buffer = io.BytesIO()
    small.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _histogram(preview: Preview) -> str:
    most = max((each.num_rows for each in preview.lengths), default=1)
    rows = "".join(
        f"<tr><td>{each.first:,}</td><td>{each.last:,}</td><td>{each.num_rows:,}</td><td>"
        f'<span class="bar" style="width: {100 * each.num_rows / most:.1f}%"></span></td></tr>'
        for each in preview.lengths
    )
    return (
        "<section><table><thead><tr><th>from</th><th>to</th><th>rows</th><th></th></tr></thead>"
        f"<tbody>{rows}</tbody></table></section>"
    )


def _rejected(preview: Preview) -> Iterator[str]:
    if not preview.rejected:
        return
    yield "<h2>Left out</h2><section><ul>"
    for said in preview.rejected[:_MAX_REJECTED]:
        yield f'<li class="bad">{html.escape(said)}</li>'
    yield "</ul>"
    if len(preview.rejected) > _MAX_REJECTED:
        yield f"<p>... and {len(preview.rejected) - _MAX_REJECTED:,} more</p>"
    yield "</section>"
