"""Draw a run: loss, learning rate, tokens per second and peak memory by phase, over the steps.

    python scripts/plot_run.py runs/NAME                # writes runs/NAME/metrics.png
    python scripts/plot_run.py runs/NAME -o run.png

Reads the run's metrics.jsonl and nothing else, so that it also draws a run that is still going on,
was stopped, or was resumed. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
NEEDS_MATPLOTLIB = (
    "error: drawing needs matplotlib, and it is not installed here. Install it with\n"
    "  pip install matplotlib\n"
    "(in a checkout also: pip install -e '.[dev]')"
)
# Distinct in hue and in lightness, for readers who do not tell all hues apart (Okabe and Ito 2008).
BLUE, ORANGE = "#0072b2", "#d55e00"
# Two phases often have one peak: the broken line lets the other one show.
PHASE_LINES = {
    "forward": ("#56b4e9", "-"),
    "loss": ("#d55e00", (0, (2, 2))),
    "backward": ("#0072b2", "-"),
    "optimizer": ("#e69f00", (0, (2, 2))),
}
# The figure has a ground and an edge of its own: a white card on a dark page.
STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#30343b",
    "axes.titlecolor": "#1b1e23",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 26,  # room for a legend
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "xtick.color": "#5a606a",
    "ytick.color": "#5a606a",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "font.size": 9.5,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
}
FEW_POINTS = 25  # up to here each step gets a dot; one step alone is nothing but a dot
NO_STEP = "no training step was recorded"
NO_PEAK = "no peak was recorded: this machine does not tell it"
LOG_SCALE_FROM = 20.0  # largest loss / smallest loss

Series = tuple[list[int], list[float]]


class RunError(Exception):
    """What is wrong with the folder, in words for the person who named it."""


def read_records(run_folder: Path) -> list[dict[str, Any]]:
    """The records of a run, one a step, oldest first."""
    if not run_folder.is_dir():
        raise RunError(f"{run_folder} is not a folder. Name a run's folder, as in runs/NAME.")
    path = run_folder / METRICS_FILE
    if not path.is_file():
        raise RunError(
            f"{run_folder} has no {METRICS_FILE}, so it is not a run's folder, or the run ended "
            "before its first record. Name the folder that train.py said it writes to."
        )
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the end of a run that was cut short
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            by_step[record["step"]] = record
    if not by_step:
        raise RunError(f"{path} holds no record yet. Wait for the first step.")
    return [by_step[step] for step in sorted(by_step)]


def series(records: list[dict[str, Any]], key: str) -> Series:
    """(steps, values) where `key` was recorded as a finite number."""
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in found], [value for _, value in found]


def draw_line(axes: Axes, data: Series, colour: str, **options: Any) -> None:
    """A line; dots where there are few steps."""
    marker = {"marker": "o", "markersize": 4} if len(data[0]) <= FEW_POINTS else {}
    axes.plot(*data, color=colour, **(marker | options))


def legend_above(axes: Axes) -> None:
    """Legend between title and data: it never covers a point."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=4,
        frameon=False,
        fontsize=9,
        handlelength=1.8,
        columnspacing=1.6,
        borderpad=0.0,
        borderaxespad=0.6,
        labelcolor="#30343b",
    )


def running_median(data: Series) -> Series:
    """Median of the steps around each step, a thirtieth of the run."""
    steps, values = data
    reach = len(values) // 60
    return steps, [
        statistics.median(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))
    ]


def draw_loss(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Training loss, and every evaluation as a labelled point."""
    train, held_out = series(records, "train/loss"), series(records, "eval/loss")
    axes.set_title("Loss")
    axes.set_ylabel("nats per supervised token")
    if train[0]:
        draw_line(axes, train, BLUE, label="training")
    if held_out[0]:
        axes.plot(
            *held_out, "o", color=ORANGE, markersize=6, markeredgecolor="white", label="held-out"
        )
    values = train[1] + held_out[1]
    if not values:
        return write_instead(axes, "no loss was recorded")
    if min(values) > 0 and max(values) / min(values) >= LOG_SCALE_FROM:
        axes.set_yscale("log")
        axes.set_ylabel("nats per supervised token (log scale)")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    # Labels of the first and the last evaluation; the rest can be read from the axis.
    points = list(zip(*held_out, strict=True))
    for step, value in dict([*points[:1], *points[-1:]]).items():
        at_end = step == records[-1]["step"] != records[0]["step"]
        axes.annotate(
            f"{value:.3g}",
            (step, value),
            xytext=(-9, 8) if at_end else (9, 0),
            textcoords="offset points",
            ha="right" if at_end else "left",
            va="center",
            color=ORANGE,
            fontweight="bold",
        )
    axes.margins(y=0.1)
    return legend_above(axes)


def draw_learning_rate(axes: Axes, records: list[dict[str, Any]]) -> None:
    """As the optimizer used it."""
    data = series(records, "train/learning_rate")
    axes.set_title("Learning rate")
    axes.set_ylabel("learning rate (no unit)")
    if not data[0]:
        return write_instead(axes, NO_STEP)
    draw_line(axes, data, BLUE)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return axes.set_ylim(bottom=0)


def draw_speed(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Every step, and the median of all."""
    data = series(records, "train/tokens_per_second")
    axes.set_title("Speed")
    axes.set_ylabel("tokens per second")
    if not data[0]:
        return write_instead(axes, NO_STEP)
    draw_line(axes, data, BLUE, linewidth=1.0, alpha=0.75, label="each step")
    if len(data[1]) > 1:
        median = statistics.median(data[1])
        axes.axhline(median, color=ORANGE, linewidth=1.6, label=f"median of the run: {median:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(bottom=0)
    return legend_above(axes)


def draw_memory(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Peak of the highest rank in each phase: each step pale, the running median on top."""
    axes.set_title("Peak memory by phase")
    axes.set_ylabel("GiB")
    lines = {p: series(records, f"memory/{p}_peak_gib") for p in PHASE_LINES}
    lines = {phase: data for phase, data in lines.items() if data[0]}
    if not lines:
        trained = series(records, "train/loss")[0]
        return write_instead(axes, NO_PEAK if trained else NO_STEP)
    smoothed = any(running_median(data) != data for data in lines.values())
    axes.set_ylabel("GiB (bold: running median)" if smoothed else "GiB")
    for phase, data in lines.items():
        axes.plot(*data, color=PHASE_LINES[phase][0], linewidth=0.6, alpha=0.18)
    for phase, data in lines.items():
        colour, style = PHASE_LINES[phase]
        draw_line(axes, running_median(data), colour, linestyle=style, linewidth=2.0, label=phase)
    return legend_above(axes)


def write_instead(axes: Axes, text: str) -> None:
    """Say why a panel is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color="#5a606a")
    axes.set_yticks([])


def heading(records: list[dict[str, Any]]) -> str:
    """What was reached, in a line."""
    last = records[-1]
    parts = [f"{last['step']:,} step{'' if last['step'] == 1 else 's'}"]
    steps, matches = series(records, "eval/exact_match")
    if steps:
        parts.append(f"exact match {matches[-1]:.1%} of generated answers")
    return ", ".join(parts)


def draw(records: list[dict[str, Any]], name: str) -> Figure:
    """The figure of a run."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    plt.rcParams.update(STYLE)
    figure, grid = plt.subplots(2, 2, figsize=(11, 7.4), sharex=True)
    for axes, panel in zip(
        grid.flat, (draw_loss, draw_learning_rate, draw_speed, draw_memory), strict=True
    ):
        panel(axes, records)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
        axes.tick_params(length=3, labelbottom=True)
        axes.set_xlabel("optimizer step")
    first, last = records[0]["step"], records[-1]["step"]
    margin = 0.02 * (last - first) or 0.5
    grid[0, 0].set_xlim(first - margin, last + margin)
    figure.subplots_adjust(left=0.075, right=0.975, bottom=0.08, top=0.845, wspace=0.2, hspace=0.5)
    figure.text(0.02, 0.962, name, fontsize=14, fontweight="bold", color="#1b1e23", va="center")
    figure.text(0.98, 0.962, heading(records), ha="right", va="center", color="#5a606a")
    edge = {"fill": False, "edgecolor": "#d0d4da", "linewidth": 1.5, "transform": None}
    figure.add_artist(Rectangle((0, 0), 1, 1, **edge | {"transform": figure.transFigure}))
    return figure


def main() -> int:
    """Draw the run that the command line names; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, metavar="runs/NAME", help="a run's folder")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="OUT.png", help="default: metrics.png in the folder"
    )
    options = parser.parse_args()
    output = options.output or options.run / "metrics.png"
    try:
        records = read_records(options.run)
        import matplotlib

        matplotlib.use("Agg")  # a file is written; no window, no display
        figure = draw(records, options.run.resolve().name)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=130)
    except ImportError:
        print(NEEDS_MATPLOTLIB, file=sys.stderr)
        return 2
    except (RunError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
