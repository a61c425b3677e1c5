"""A preview of the data as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator

from PIL import Image

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
:root { color-scheme: light dark;
  --page: #fbfbfa; --ink: #1c1d1f; --quiet: #62666d; --line: #dcdee2; --panel: #ffffff;
  --learned: #cdeccf; --learned-ink: #0c3d14; --learned-line: #2f8f3f; --medium: #e9ddf7;
  --medium-ink: #46237a; --bar: #5b7fb9; --bad: #a3322a; --control: #0b6a7a; }
@media (prefers-color-scheme: dark) { :root {
  --page: #17181a; --ink: #e6e7e9; --quiet: #9ba0a8; --line: #34373c; --panel: #1f2124;
  --learned: #1d4526; --learned-ink: #d6f5da; --learned-line: #57b868; --medium: #3a2a55;
  --medium-ink: #e2d3fa; --bar: #7f9fd2; --bad: #f08b82; --control: #6cc5d6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p, ul { margin: .2rem 0; } ul { padding-left: 1.2rem; } .quiet { color: var(--quiet); }
section { border: 1px solid var(--line); border-radius: .5rem; background: var(--panel);
  padding: .75rem 1rem; margin: .75rem 0; }
section h3 { font-size: .95rem; margin: 0; overflow-wrap: anywhere; }
.tokens { font: .9rem/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin-top: .5rem; }
.learned { background: var(--learned); color: var(--learned-ink);
  border-bottom: 2px solid var(--learned-line); }
.control { font-weight: 700; } .control:not(.learned):not(.medium) { color: var(--control); }
.medium { background: var(--medium); color: var(--medium-ink); border-radius: .2rem; }
.tokens sub { display: none; font-size: .65rem; color: var(--quiet); }
#ids:checked ~ main .tokens sub { display: inline; }
#ids:checked ~ main .tokens span { outline: 1px dotted var(--line); }
.pictures { display: flex; flex-wrap: wrap; gap: .75rem; margin-top: .5rem; }
figure { margin: 0; } figure img { max-width: 10rem; max-height: 10rem; display: block;
  border: 1px solid var(--line); } figcaption { font-size: .8rem; color: var(--quiet); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
td, th { text-align: right; padding: .1rem .6rem .1rem 0; white-space: nowrap; }
th { font-weight: 600; color: var(--quiet); }
td:last-child, th:last-child { width: 100%; text-align: left; padding-right: 0; }
.bar { display: inline-block; height: .8rem; background: var(--bar); border-radius: .15rem; }
.bad { color: var(--bad); overflow-wrap: anywhere; }
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
            '<p class="quiet"><span class="learned">Learned tokens look like this</span>; '
            '<span class="medium">these stand for a medium</span>; control tokens are '
            '<span class="control">bold</span>, a text that reads like one is not.</p>',
            "<h2>Rows</h2>",
            *(_row(row) for row in preview.rows),
            "<h2>Tokens of a row</h2>",
            _histogram(preview),
            *_rejected(preview),
        ]
    )
    checked = " checked" if ids else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f'<input type="checkbox" id="ids"{checked}> <label for="ids">show token ids</label>\n'
        f"<main>\n{body}\n</main>\n</body></html>\n"
    )


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
