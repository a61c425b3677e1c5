"""One record of a step to every place that wants it: file, dashboard, screen."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from gemtune.checkpoint import TrainState
from gemtune.config import RunConfig
from gemtune.console import Row, Screen
from gemtune.data import ChatDataset, StreamedDataset
from gemtune.data.preparation.rejected import write_rejected
from gemtune.errors import ReportError
from gemtune.evaluation import Answer
from gemtune.patches import PatchReport
from gemtune.preview import first_rows, row_text
from gemtune.report import read_run, report_page, write_page
from gemtune.run_files import ANSWERS_FILE, METRICS_FILE, REJECTED_FILE, REPORT_FILE
from gemtune.runtime import Runtime
from gemtune.start_record import write_start
from gemtune.tracking import Dashboard, MetricsFile, NoDashboard, open_dashboard, read_records

REJECTED_ROWS_SHOWN = 20
GIB = 2**30
# A report reads 50 MB a second.
MOST_BYTES_IN_A_HURRY = 100_000_000


class Reporter:
    """Writes on the main process; on the others every call does nothing."""

    def __init__(
        self, runtime: Runtime, config: RunConfig, state: TrainState, screen: Screen
    ) -> None:
        self._runtime = runtime
        self._state = state
        self._screen = screen
        self._num_preview_rows = config.tracker.preview_rows
        self._num_samples = config.eval.samples
        self._every_steps = config.loop.log_every_steps
        self._file: MetricsFile | None = None
        self._dashboard: Dashboard | None = None
        self._is_new_run = False
        if runtime.is_main:
            path = runtime.run_dir / METRICS_FILE
            self._file = MetricsFile(path, state.step)
            # What a resumed run would only repeat is shown by its first start.
            self._is_new_run = not self._file.newest
            self._dashboard = open_dashboard(
                config.tracker,
                runtime.run_dir,
                config.run.name,
                state.run_id,
                config.as_dict(),
                read_records(path),
            )

    @property
    def notice(self) -> str:
        """Where the dashboard is."""
        return self._dashboard.notice if self._dashboard else ""

    @property
    def newest(self) -> dict[str, Any]:
        """The record of the newest step so far."""
        return self._file.newest if self._file else {}

    def begin(
        self,
        page: tuple[str, list[Row]],
        report: PatchReport,
        dataset: ChatDataset | StreamedDataset,
        *,
        num_steps: int,
        memory_source: str,
    ) -> None:
        """The start-up page to the screen, and what only this start knows to `run.json`."""
        self._screen.panel(*page)
        if not self._runtime.is_main:
            return
        try:
            write_start(
                self._runtime,
                page,
                report,
                first_rows(dataset, self._num_preview_rows),
                num_steps=num_steps,
                after_step=self._state.step,
                memory_source=memory_source,
            )
        except OSError as error:
            self._screen.say(f"run.json was not written, the report will lack it: {error}")

    def training(self, record: dict[str, Any]) -> None:
        """The record of a step: always to the file, elsewhere when one is due."""
        if self._file is None or self._dashboard is None:
            return
        step = self._state.step
        self._file.write(step, record)
        due = step % self._every_steps == 0 or step == 1 or step == self._screen.num_steps
        if due or "eval/loss" in record:
            self._dashboard.log(record, step)
        self._screen.step(step, record, due=due)

    def figures(self, metrics: dict[str, float]) -> None:
        """Figures that belong to the newest step."""
        if self._file is not None and self._dashboard is not None and metrics:
            self._file.write(self._state.step, metrics)
            self._dashboard.log(metrics, self._state.step)

    def rejected(
        self, training: ChatDataset | StreamedDataset, judging: ChatDataset, *, is_new: bool
    ) -> None:
        """Every row that was left out to `rejected.jsonl`, the first of them to the screen.

        A stream adds those that it meets later, on every rank.
        """
        path = self._runtime.run_dir / REJECTED_FILE
        rows = training.rejected + judging.rejected
        is_stream = isinstance(training, StreamedDataset)
        if self._runtime.is_main and (is_new or not is_stream):
            write_rejected(rows, path)
        if isinstance(training, StreamedDataset):
            training.journal = path
        self._screen.lines(f"left out: {row}" for row in rows[:REJECTED_ROWS_SHOWN])
        if len(rows) > REJECTED_ROWS_SHOWN:
            more = len(rows) - REJECTED_ROWS_SHOWN
            self._screen.say(f"left out: {more:,} more, see {path}")

    def patches(self, report: PatchReport) -> None:
        """What each patch did and why, to the dashboard of a run that is new there."""
        if self._is_new_run and self._dashboard is not None:
            table = [[row.name, row.status, row.reason] for row in report.rows]
            self._dashboard.log_table("patches", ["patch", "status", "reason"], table)

    def log_plan(self, document: dict[str, Any]) -> None:
        """A plan of the memory to the dashboard: phases with what they hold, and the highest.

        Of each start that made one, whether the run is new or not: the batches may be others.

        Args:
            document: of `planning.page.plan_document`.
        """
        if self._dashboard is None:
            return
        phases = document["phases"]
        kinds = list(dict.fromkeys(kind for held in phases.values() for kind in held["by_kind"]))
        table = [
            [phase, held["peak_bytes"] / GIB, *(held["by_kind"].get(k, 0) / GIB for k in kinds)]
            for phase, held in phases.items()
        ]
        self._dashboard.log_table("plan", ["phase", "GiB", *kinds], table)
        self._dashboard.log_summary({"memory/planned_peak_gib": document["peak_bytes"] / GIB})

    def preview(self, dataset: ChatDataset | StreamedDataset) -> None:
        """A few rows as the model gets them, what is learned between « », to the dashboard of a
        run that is new there."""
        if not self._is_new_run or isinstance(self._dashboard, NoDashboard | None):
            return
        rows = first_rows(dataset, self._num_preview_rows)
        if not rows:
            return
        columns = ["row", "tokens", "learned", "media", "text"]
        table = [
            [
                row.where,
                row.num_tokens,
                row.num_learned,
                "; ".join(medium.line for medium in row.media),
                row_text(row, colours=False).plain,
            ]
            for row in rows
        ]
        self._dashboard.log_table("data/preview", columns, table)

    def answers(self, answers: list[Answer], *, on_screen: bool) -> None:
        """All generated answers to a file, `eval.samples` of them to the dashboard, and a handful
        to the screen."""
        if self._file is None or not answers:
            return
        lines = [json.dumps(asdict(a) | {"correct": a.correct}) + "\n" for a in answers]
        path = self._runtime.run_dir / ANSWERS_FILE
        staging = path.with_suffix(".staging")
        staging.write_text("".join(lines), encoding="utf-8")
        staging.replace(path)
        if on_screen:
            self._screen.answers(answers)
        if self._dashboard is not None and self._num_samples:
            columns = ["step", "row", "question", "expected", "generated", "correct"]
            table = [
                [self._state.step, a.where, a.question, a.expected, a.generated, a.correct]
                for a in answers[: self._num_samples]
            ]
            self._dashboard.log_table("eval/samples", columns, table, self._state.step)

    def page(self, *, hurry: bool = False) -> None:
        """`report.html`, once the run has said how it ended. It may fail, the run does not.

        `hurry`: the time is somebody else's, so that a report that takes seconds is left out.
        """
        if not self._runtime.is_main:
            return
        folder = self._runtime.run_dir
        try:
            if hurry and (folder / METRICS_FILE).stat().st_size > MOST_BYTES_IN_A_HURRY:
                raise ReportError(f"it would take a while: python scripts/report.py {folder}")
            write_page(report_page(read_run(folder)), folder / REPORT_FILE)
        except ReportError as error:
            self._screen.say(f"no report: {error}")
        except Exception as error:  # a file that is not as a run writes it
            self._screen.say(f"no report: {error!r}. Try: python scripts/report.py {folder}")

    def finish(self) -> None:
        """Close file and dashboard."""
        if self._file is not None and self._dashboard is not None:
            self._file.close()
            self._dashboard.finish()
