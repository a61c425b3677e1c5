"""The frame and the look of the pages that gemtune writes."""

from __future__ import annotations

import base64
import hashlib
import html

STYLE = """
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
.pictures { display: flex; flex-wrap: wrap; gap: .75rem; margin-top: .5rem; }
figure { margin: 0; } figure img { max-width: 10rem; max-height: 10rem; display: block;
  border: 1px solid var(--line); } figcaption { font-size: .8rem; color: var(--quiet); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
td, th { text-align: right; padding: .1rem .6rem .1rem 0; white-space: nowrap; }
th { font-weight: 600; color: var(--quiet); }
.bar { display: inline-block; height: .8rem; background: var(--bar); border-radius: .15rem; }
.bad { color: var(--bad); overflow-wrap: anywhere; }
"""

LEARNED_KEY = (
    '<p class="quiet"><span class="learned">Learned tokens look like this</span>; '
    '<span class="medium">these stand for a medium</span>; control tokens are '
    '<span class="control">bold</span>, a text that reads like one is not.</p>'
)


def html_page(title: str, body: str, *, style: str = "", before: str = "", script: str = "") -> str:
    """A whole page that fetches nothing, in the reader's choice of light and dark.

    Its policy lets no other script than `script` run and nothing be loaded, so that a text of the
    data that came through unescaped would still do nothing.

    Args:
        title: plain text.
        body: HTML, put into `<main>`.
        style: more CSS, behind the common one.
        before: HTML in front of `<main>`.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"script-src 'sha256-{digest}'; " if script else ""
    policy = f"default-src 'none'; style-src 'unsafe-inline'; {scripts}img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style></head>\n<body>\n"
        f"{before}<main>\n{body}\n</main>\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body></html>\n"
    )
