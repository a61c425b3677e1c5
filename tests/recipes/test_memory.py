"""Memory in a whole run: records, the plan beside it, a trace, the report after an error."""

from __future__ import annotations

import gzip
import json
import signal
from pathlib import Path

import pytest
from launches import launched
from wandb_files import written_starts
from whole_runs import RunFolder, TrainRun

from gemtune.errors import ConfigError

FAULT = Path(__file__).parents[1] / "faults" / "train_with_fault.py"


def test_every_record_says_what_is_held(finished_run: RunFolder) -> None:
    for record in finished_run.metrics()[1:]:
        assert record["data/longest_row_tokens"] > 20
        held, peak = record["memory/host_resident_gib"], record["memory/peak_gib"]
        assert 0.1 < held <= peak * 1.001
        assert record["memory/device_free_gib"] > 0
        # There is no allocator to ask, and nothing is made up.
        assert not {"memory/allocated_gib", "memory/reserved_gib"} & record.keys()


def test_the_plan_joins_the_records_of_a_launch(tmp_path: Path) -> None:
    options = ("memory.plan=true", "loop.max_steps=5000", "tracker=wandb", "tracker.mode=offline")
    folders = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
    environment = dict.fromkeys(folders, str(tmp_path / "wandb"))
    with launched(tmp_path, *options, processes=1, environment=environment) as launch:
        metrics = launch.run.path / "metrics.jsonl"
        launch.wait_until(
            lambda: metrics.exists() and b'"memory/plan_error"' in metrics.read_bytes()
        )
        launch.signal_group(signal.SIGTERM)
        _, output = launch.finish()
        plan = json.loads((launch.run.path / "plan.json").read_text())
        newest = launch.run.metrics()[-1]
    assert "GiB planned for the largest batch (4 rows, " in output
    planned = plan["peak_bytes"] / 2**30
    assert newest["memory/planned_peak_gib"] == pytest.approx(planned)
    # Of a tiny model kernels and caches are a good part; tensors alone are the plan's.
    measured = planned * (1 + newest["memory/plan_error"])
    assert -0.01 < measured - planned < 0.2

    (start,) = written_starts(launch.run.path)
    table = dict(start.tables)["plan"]
    rows = {row[0]: row[1:] for row in table["data"]}
    assert rows.keys() == plan["phases"].keys()
    assert max(peak for peak, *_ in rows.values()) == pytest.approx(planned)
    for peak, *kinds in rows.values():
        assert sum(kinds) == pytest.approx(peak)
    assert start.summary["memory/planned_peak_gib"] == pytest.approx(planned)


def test_a_trace_of_the_step_that_was_asked_for(train_run: TrainRun) -> None:
    run = train_run("debug=profiler", "loop.profile_at_step=2", "loop.max_steps=2")
    (trace,) = run.path.glob("trace_*")
    assert trace.name == "trace_step_2_rank_0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {"aten::mm", "aten::_foreach_add_"} & {event.get("name") for event in events}


def test_a_snapshot_without_a_gpu_is_refused(train_run: TrainRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory\.snapshot_at_step=1"):
        train_run("memory.snapshot_at_step=1")
    assert not (tmp_path / "runs").exists()


def test_the_report_of_a_launch_that_ran_out_of_memory(tmp_path: Path) -> None:
    fault = {"FAULT": "oom_cpu:0:3"}
    options = ("checkpoint.every_steps=2", "loop.micro_batch_size=8")
    with launched(tmp_path, *options, processes=1, script=FAULT, environment=fault) as launch:
        status, output = launch.finish()
        report = (launch.run.path / "oom.md").read_text()
    assert status != 0 and "oom.md" in output and "can't allocate memory" in output
    assert report.startswith("# Out of memory on rank 0 in step 3, forward of micro-batch 1 of 1")
    assert "step_00000002`. The same command" in report
    assert "| weights of model.language_model.layers.*.mlp.down_proj |" in report or (
        "| weights of model.language_model.embed_tokens" in report
    )
    assert report.count("digits/train.parquet row ") == 8
    assert "1. loop.micro_batch_size=4 (now 8)" in report
