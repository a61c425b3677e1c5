"""Write the tables of the documents, and figures in their sentences, from benchmarks/results.

    python benchmarks/render.py            # rewrite the marked parts
    python benchmarks/render.py --check    # exit 1 if they say anything else; changes nothing

A marked part is `<!-- results: NAME -->...<!-- /results -->` (a table) or
`<!-- figure: NAME -->...<!-- /figure -->` (a word in a sentence). Needs no package.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import compilation_tables
import step_tables
import tables
from tables import NOT_MEASURED, RESULTS, Result

DOCUMENTS = ("BENCHMARKS.md", "README.md", "RELIABILITY.md")
MARK = re.compile(
    r"<!-- (?P<kind>results|figure): (?P<name>\w+) -->(?P<body>.*?)<!-- /(?P=kind) -->", re.DOTALL
)


def load(name: str, folder: Path = RESULTS) -> Result | None:
    """A result file; None where it was not measured."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def exact_match(folder: Path) -> str:
    """Of the default command, whose seed is 0."""
    result = load("default_run", folder)
    rows = [] if result is None else [row for row in result["seeds"] if row["seed"] == 0]
    return f"{rows[0]['exact_match']:.1%}" if rows else NOT_MEASURED


TABLES = {
    "checkpoint_saves": tables.checkpoint_saves,
    "data_preparation": tables.data_preparation,
    "default_run": tables.default_run,
    "layer_compilation": compilation_tables.layer_compilation,
    "linear_cross_entropy": tables.linear_cross_entropy,
    "linear_cross_entropy_cuda": tables.linear_cross_entropy,
    "supervised_positions": tables.supervised_positions,
    "supervised_positions_cuda": tables.supervised_positions,
    "vision_position_lookup": tables.vision_position_lookup,
    "relative_position_lookup": tables.relative_position_lookup,
    "memory_plan": tables.memory_plan,
    "memory_plan_cuda": step_tables.memory_plan_cuda,
    "plan_times": tables.plan_times,
    "real_sizes_cpu": step_tables.real_sizes,
    "real_sizes_cuda": step_tables.real_sizes,
    "step_records": tables.step_records,
    "patches_e2b_small_cpu": tables.price_tags,
    "patches_tiny_cpu": tables.price_tags,
    "patches_e2b_cuda": tables.price_tags,
    "soak": tables.soak,
}
FIGURES = {"exact_match": exact_match}


def render(text: str, folder: Path = RESULTS) -> str:
    """The document with its marked parts made anew."""

    def replace(mark: re.Match[str]) -> str:
        kind, name = mark["kind"], mark["name"]
        known = TABLES if kind == "results" else FIGURES
        if name not in known:
            raise SystemExit(f"'{kind}: {name}' is not known. Known: {', '.join(known)}.")
        if kind == "figure":
            body = FIGURES[name](folder)
        else:
            result = load(name, folder)
            body = f"\n{TABLES[name](result) if result else NOT_MEASURED}\n"
        return f"<!-- {kind}: {name} -->{body}<!-- /{kind} -->"

    return MARK.sub(replace, text)


def main() -> int:
    """Rewrite, or compare; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    stale = []
    for path in (RESULTS.parents[1] / name for name in DOCUMENTS):
        text = path.read_text(encoding="utf-8")
        rendered = render(text)
        if rendered == text:
            continue
        stale.append(path.name)
        if not options.check:
            path.write_text(rendered, encoding="utf-8")
    if not stale:
        print("the documents say what benchmarks/results says")
    elif options.check:
        print(
            f"{' and '.join(stale)}: not what benchmarks/results says. Run: "
            "python benchmarks/render.py",
            file=sys.stderr,
        )
    else:
        print(f"wrote {' and '.join(stale)}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
