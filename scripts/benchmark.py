"""Run a benchmark: `python scripts/benchmark.py suite=NAME`, and what the suite takes.

    python scripts/benchmark.py                        # the suites, and the keys of suite=patches
    python scripts/benchmark.py suite=patches size=tiny
    python scripts/benchmark.py suite=default_run --seeds 0

A suite is a script in benchmarks/. suite=patches has keys of the form key=value; the others take
the options that `suite=NAME --help` lists. gemtune is taken from this checkout, installed or not.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BENCHMARKS = REPOSITORY / "benchmarks"
SUITES = (
    "patches",
    "real_sizes",
    "linear_cross_entropy",
    "supervised_positions",
    "layer_compilation",
    "vision_position_lookup",
    "relative_position_lookup",
    "checkpoint_saves",
    "data_preparation",
    "default_run",
    "memory_plan",
    "plan_times",
    "step_records",
)


def summary(suite: str) -> str:
    """The first line of what the script says about itself."""
    text = (BENCHMARKS / f"{suite}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


def show_help() -> None:
    """The suites, and the keys of the one that has keys."""
    from settings import help_text

    print("python scripts/benchmark.py suite=NAME ...\n\nSuites:")
    for suite in SUITES:
        print(f"  {suite:<24} {summary(suite)}")
    print(f"\nKeys of suite=patches:\n{help_text()}")
    print("\nOptions of the other suites: python scripts/benchmark.py suite=NAME --help")


def main() -> int:
    """Hand over to the suite's script; its exit status."""
    sys.path[:0] = [str(BENCHMARKS), str(REPOSITORY / "src")]
    words = sys.argv[1:]
    named = [word.removeprefix("suite=") for word in words if word.startswith("suite=")]
    rest = [word for word in words if not word.startswith("suite=")]
    asks = {"-h", "--help", "help"} & set(rest)
    if not words or (asks and named in ([], ["patches"])):
        show_help()
        return 0
    from gemtune.options import did_you_mean

    if len(named) != 1 or named[0] not in SUITES:
        if len(named) == 1:
            wrong = f"suite={named[0]} is not one.{did_you_mean(named[0], SUITES)}"
        else:
            key = rest[0].partition("=")[0] if rest else ""
            wrong = f"Name one suite: suite=NAME.{did_you_mean(key, ['suite'])}"
        print(f"error: {wrong} Suites: {', '.join(SUITES)}.", file=sys.stderr)
        return 2
    script = str(BENCHMARKS / f"{named[0]}.py")
    sys.argv = [script, *rest]
    runpy.run_path(script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
