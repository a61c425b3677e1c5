"""Draw what each patch saves and costs, from a result of suite=patches.

    python benchmarks/chart.py benchmarks/results/patches_e2b_small_cpu.json

Writes the picture beside the file. Needs matplotlib, and nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinct in hue and in lightness (Okabe and Ito 2008): saved or faster, and added or slower.
BETTER, WORSE, GREY, DARK = "#0072b2", "#d55e00", "#5a606a", "#1b1e23"
LEVEL = 0.002  # of the whole: below it a bar says neither
STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#30343b",
    "axes.titlecolor": DARK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "xtick.color": GREY,
    "ytick.color": DARK,
    "font.size": 9.5,
}

Row = dict[str, Any]


def chosen_rows(result: dict[str, Any]) -> list[Row]:
    """Each patch alone, smallest saver first (bars grow upwards), then the sets on top."""
    measured = [row for row in result["rows"] if row["status"] == "measured"]
    sets = [row for name in ("default", "all") for row in measured if row["name"] == name]
    alone = [
        row for row in measured if len(row["patches"]) == 1 and not row["name"].startswith("all")
    ]
    alone.sort(
        key=lambda row: (row["peak_vs_none"] or 0.0, row["saved_vs_none"] or 0.0), reverse=True
    )
    return alone + sets


def draw_differences(axes: Axes, rows: list[Row], whole: float | None, key: str) -> None:
    """Bars of MiB against no patch, each with its value and its share of the whole."""
    values = [row[key] for row in rows]
    if whole is None or not any(value is not None for value in values):
        return write_instead(axes)
    for at, value in enumerate(values):
        if value is None:
            write_beside(axes, at, 0.0, "not measured", left=False)
            continue
        axes.barh(at, value, height=0.62, color=colour(value, whole * LEVEL))
        share = f" ({value / whole:+.0%})" if whole and abs(value / whole) >= 0.005 else ""
        # A bar to the left has its text on the right of the line, where there is room.
        write_beside(
            axes, at, max(0.0, value), f"{value:+,.0f}{share}" if round(value) else "0", left=False
        )
    shown = [value for value in values if value is not None]
    low, high = min(0.0, *shown), max(0.0, *shown)
    span = (high - low) or 1.0
    axes.set_xlim(low - 0.03 * span, high + 0.5 * span)  # the rest is for the texts
    axes.axvline(0.0, color=DARK, linewidth=1.0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return axes.set_xlabel(f"MiB against {whole:,.0f} MiB without patches")


def draw_times(axes: Axes, rows: list[Row]) -> None:
    """Step time over that of no patch: the median as a bar from 1, all rounds as a whisker."""
    ratios = [row["ratio"] for row in rows]
    if not any(ratios):
        return write_instead(axes)
    for at, ratio in enumerate(ratios):
        if ratio is None:
            write_beside(axes, at, 1.0, "not measured", left=False)
            continue
        middle = ratio["median"]
        axes.barh(at, middle - 1, left=1.0, height=0.62, color=colour(middle - 1, 0.0))
        axes.plot([ratio["min"], ratio["max"]], [at, at], color=DARK, linewidth=1.1)
        write_beside(axes, at, max(1.0, ratio["max"]), f"{middle:.2f}", left=False)
    ends = [value for ratio in ratios if ratio for value in ratio.values()]
    low, high = min(1.0, *ends), max(1.0, *ends)
    span = (high - low) or 0.1
    axes.set_xlim(low - 0.05 * span, high + 0.25 * span)
    axes.axvline(1.0, color=DARK, linewidth=1.0)
    return axes.set_xlabel("median (line: smallest to largest round)")


def colour(value: float, level: float) -> str:
    return BETTER if value < -level else WORSE if value > level else GREY


def write_beside(axes: Axes, at: float, x: float, text: str, *, left: bool) -> None:
    axes.annotate(
        text,
        (x, at),
        xytext=(-5 if left else 5, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        color=GREY,
        fontsize=9,
    )


def write_instead(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_xticks([])


def heading(result: dict[str, Any]) -> tuple[str, str]:
    """What was run, and on what."""
    settings, machine = result["settings"], result["machine"]
    recomputed = ", gradient checkpointing" if settings["checkpointing"] else ""
    what = (
        f"Price tags of the patches: {settings['size']}, {settings['dtype']}, "
        f"training {settings['training']}{recomputed}"
    )
    on_gpu = settings["device"] == "cuda" and "gpu" in machine
    threads = f"{settings['threads']} thread{'' if settings['threads'] == 1 else 's'}"
    place = machine["gpu"]["name"] if on_gpu else f"{machine['cpu']}, {threads}"
    where = (
        f"{settings['tokens']:,} tokens and {settings['images']} images a step; {place}; "
        f"torch {result['torch']}, transformers {result['transformers']}; {result['date']}"
    )
    return what, where


def draw(result: dict[str, Any]) -> Figure:
    """Three panels over one column of names."""
    import matplotlib.pyplot as plt

    rows = chosen_rows(result)
    none = next((row for row in result["rows"] if row["name"] == "none"), {})
    plt.rcParams.update(STYLE)
    height = 1.9 + 0.36 * max(3, len(rows))
    figure, panels = plt.subplots(1, 3, figsize=(13, height), sharey=True)
    panels[0].set_title("Peak memory")
    draw_differences(panels[0], rows, none.get("peak_mib"), "peak_vs_none")
    panels[1].set_title("Kept for the backward pass")
    draw_differences(panels[1], rows, none.get("saved_mib"), "saved_vs_none")
    panels[2].set_title("Step time / time without patches")
    draw_times(panels[2], rows)
    panels[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    panels[0].set_ylim(-0.6, max(3, len(rows)) - 0.4)
    for axes in panels:
        axes.tick_params(axis="y", length=0)
    what, where = heading(result)
    top = 1 - 0.85 / height
    figure.subplots_adjust(left=0.15, right=0.985, bottom=0.62 / height, top=top, wspace=0.09)
    figure.text(0.012, 1 - 0.24 / height, what, fontsize=13, fontweight="bold", color=DARK)
    figure.text(0.012, 1 - 0.48 / height, where, color=GREY, fontsize=9)
    return figure


def draw_file(path: Path, has: Callable[[str], Any] = importlib.util.find_spec) -> str:
    """Write PATH with the ending .png; what was done, in words."""
    if has("matplotlib") is None:
        return f"no chart: matplotlib is not installed. Later: python benchmarks/chart.py {path}"
    import matplotlib

    matplotlib.use("Agg")  # a file is written; no window, no display
    picture = path.with_suffix(".png")
    draw(json.loads(path.read_text(encoding="utf-8"))).savefig(picture, dpi=110)
    return f"wrote {picture}"


def main() -> int:
    """Draw the files that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("python benchmarks/chart.py RESULT.json ...")
        return 2
    for name in sys.argv[1:]:
        print(draw_file(Path(name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
