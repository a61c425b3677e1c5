"""The terminal: panels, progress, tables. Silent on every process but the main one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gemtune.evaluation import Answer

Row = tuple[str, str, str]
"""Label, text, and the status in the text that gets a colour (or "")."""

_STYLES = {"applied": "green", "upstream": "cyan", "not applicable": "yellow"}
_PLAIN_WIDTH = 120


class Screen:
    """A progress bar on a terminal; plain lines elsewhere."""

    def __init__(self, enabled: bool) -> None:
        # In a file or a pipe lines stay whole, whatever width the environment claims.
        width = None if sys.stdout.isatty() else _PLAIN_WIDTH
        self.console = Console(quiet=not enabled, highlight=False, width=width)
        self.num_steps = 0
        self._first_step = 0
        self._started = 0.0
        self._progress: Progress | None = None
        self._checks: Progress | None = None
        self._task: Any = None

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(Text(text), soft_wrap=True)

    def lines(self, lines: Iterable[str]) -> None:
        """Several lines."""
        for line in lines:
            self.say(line)

    def panel(self, title: str, rows: list[Row]) -> None:
        """A titled box of labelled lines."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text, status in rows:
            line = Text(text)
            if status:
                line.highlight_words([f" {status}"], _STYLES.get(status, ""))
            table.add_row(label, line)
        self.console.print(Panel(table, title=title, title_align="left", expand=False))

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Inside, `checking` moves a bar on a terminal."""
        if not self.console.is_terminal:
            yield
            return
        self._checks = Progress(
            TextColumn("checking rows"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        with self._checks:
            yield
        self._checks = None

    def checking(self, done: int, total: int) -> None:
        """Progress of the check of the rows, for data sets that take a while."""
        if self._checks is not None:
            task = next(iter(self._checks.task_ids), None)
            if task is None:
                task = self._checks.add_task("", total=total)
            self._checks.update(task, completed=done, total=total)
        elif not done % 20_000:
            self.say(f"checked {done:,} of {total:,} rows")

    @contextmanager
    def training(self, first_step: int, num_steps: int) -> Iterator[None]:
        """Show the progress of the steps while inside."""
        self.num_steps, self._first_step = num_steps, first_step
        self._started = time.monotonic()
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task(
                "", total=num_steps, completed=first_step, figures=""
            )
            self._progress.start()
        try:
            yield
        finally:
            if self._progress is not None:
                self._progress.stop()
                self._progress = None

    def step(self, step: int, record: dict[str, Any], *, due: bool) -> None:
        """Move the bar; without a terminal, print a line where one is due."""
        figures = (
            f"loss {record['train/loss']:.4f}  {record['train/tokens_per_second']:,.0f} tokens/s  "
            f"peak {record['memory/peak_gib']:.2f} GiB"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures)
        elif due:
            self.say(f"step {step:>6}/{self.num_steps}  {figures}  {self._time_left(step)} left")
        if "eval/loss" in record:
            figures = [
                f"{name} {value:.4f}"
                for name, value in record.items()
                if name.startswith("eval/") and not name.startswith("eval/exact_match_")
            ]
            self.say(f"step {step:>6}/{self.num_steps}  {'  '.join(figures)}")

    def answers(self, answers: list[Answer], num_shown: int = 8) -> None:
        """A handful of generated answers: one of each kind, then wrong ones."""
        table = Table(title="example answers to held-out rows", title_justify="left")
        for column in ("question", "expected", "generated", ""):
            table.add_column(column, overflow="fold")
        for answer in _selection(answers, num_shown):
            mark = Text("right", style="green") if answer.correct else Text("wrong", style="red")
            texts = (answer.question, answer.expected, answer.generated)
            table.add_row(*(Text(_printable(text)) for text in texts), mark)
        self.console.print(table)

    def _time_left(self, step: int) -> str:
        per_step = (time.monotonic() - self._started) / max(1, step - self._first_step)
        minutes, seconds = divmod(int(per_step * (self.num_steps - step)), 60)
        return f"{minutes}:{seconds:02d}"


def _selection(answers: list[Answer], number: int) -> list[Answer]:
    first_of_kind = {answer.kind: answer for answer in reversed(answers)}
    chosen = [answer for answer in answers if first_of_kind[answer.kind] is answer]
    rest = [answer for answer in answers if first_of_kind[answer.kind] is not answer]
    return (chosen + sorted(rest, key=lambda answer: answer.correct))[:number]


def _printable(text: str) -> str:
    """Control characters, which an untrained model writes, shown as \\x00."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def relative(path: Path) -> str:
    """As a person would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
