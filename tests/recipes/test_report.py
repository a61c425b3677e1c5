"""Every run leaves a report, however it ends, and none fails because of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import Page
from whole_runs import RunFolder, TrainRun, press_ctrl_c_after

import gemtune.reporting
import gemtune.start_record


def test_the_report_of_a_run_has_what_was_recorded(finished_run: RunFolder) -> None:
    page = Page((finished_run.path / "report.html").read_text())
    last = finished_run.metrics()[-1]
    for key, value in last.items():
        assert [key, json.dumps(value)] in page.rows
    losses = {step: pytest.approx(loss, rel=1e-5) for step, loss in finished_run.losses().items()}
    assert page.curves("Loss")["train"] == losses
    assert "4 of 4 steps" in page.text and "finished" in page.text
    assert page.row("linear_cross_entropy")[1] == "applied"
    assert "4 generated answers" in page.text
    # Rows of the data with their images, and what is learned marked.
    assert page.text.count("train.parquet row") == 4
    assert len(page.of("img")) >= 4
    assert len([span for span in page.of("span") if "learned" in (span.get("class") or "")]) > 4
    assert not [ul for ul in page.of("ul") if ul.get("class") == "notices"]


def test_what_a_start_knows_is_written_down(finished_run: RunFolder) -> None:
    path = finished_run.path / "run.json"
    written = json.loads(path.read_text())
    assert path.stat().st_size < 100_000
    assert written["num_steps"] == 4 and written["versions"]["torch"]
    (start,) = written["starts"]
    assert (start["after_step"], start["num_processes"]) == (0, 1)
    assert not any(str(row["where"]).startswith("/") for row in written["preview"])


def test_a_run_that_is_stopped_and_goes_on(
    train_run: TrainRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        press_ctrl_c_after(patched, 1)
        run = train_run()
    assert run.status == 130
    page = Page((run.path / "report.html").read_text())
    assert "This run is interrupted: it ended after step 2 of 4" in page.text
    with monkeypatch.context() as patched:
        patched.setattr(gemtune.reporting, "MOST_BYTES_IN_A_HURRY", 10)
        press_ctrl_c_after(patched, 3)
        before = (run.path / "report.html").stat().st_mtime_ns
        assert train_run().status == 130
        assert (run.path / "report.html").stat().st_mtime_ns == before
    train_run()
    page = Page((run.path / "report.html").read_text())
    assert "4 of 4 steps" in page.text and "interrupted" not in page.text
    starts = json.loads((run.path / "run.json").read_text())["starts"]
    assert [start["after_step"] for start in starts] == [0, 2, 4]


def test_no_run_fails_for_its_report(
    train_run: TrainRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def page(record: object) -> str:
        raise ZeroDivisionError("a fault of the report")

    def earlier(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(gemtune.reporting, "report_page", page)
    monkeypatch.setattr(gemtune.start_record, "_summary", earlier)
    run = train_run("loop.max_steps=1", "data.eval_generate_rows=1")
    assert run.status == 0
    assert json.loads((run.path / "status.json").read_text())["status"] == "finished"
    output = capsys.readouterr().out
    assert "no report: ZeroDivisionError('a fault of the report')" in output
    assert "run.json was not written" in output
