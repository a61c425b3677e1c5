"""The page says what the folder says: every figure, and plainly what is not there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_folders import PHASES, Page, judged, trained, write_run

from gemtune.errors import ReportError
from gemtune.report import read_run, report_page, write_page

GIB = 2**30
EVIL = "<script>alert(1)</script>\"'&amp; <img src=x onerror=alert(1)> \ud800\x00"
START: dict[str, Any] = {
    "title": "gemtune: gemma4_sft",
    "num_steps": 4,
    "starts": [
        {"time": "2026-01-02T03:00:00+00:00", "after_step": 0, "num_processes": 1},
        {"time": "2026-01-02T03:03:00+00:00", "after_step": 2, "num_processes": 2},
    ],
    "summary": [["model", "tiny, built from seed 0"], ["", "1,408,304 parameters"]],
    "patches": [{"name": "rms_norm", "status": "applied", "reason": "keeps inputs"}],
    "preview": [
        {
            "where": "a.jsonl line 1",
            "num_tokens": 1200,
            "num_learned": 2,
            "spans": [["<|turn>", "control"], ["what is ", ""], ["green", "learned"]],
            "media": [{"line": "image 8 x 8", "picture": "data:image/png;base64,AAAA"}],
        }
    ],
    "memory_source": "cuda allocator",
    "versions": {"torch": "2.99.1", "cuda": None},
    "git": {"commit": "0123abcd", "changed": True},
    "device": "Some GPU, 80 GiB",
}
RECORDS = [
    judged(0, 6.5),
    trained(1),
    trained(2) | judged(2, 1.5),
    trained(3),
    trained(4) | judged(4, 2.25, **{"eval/exact_match": 0.75, "eval/exact_match_pair": 0.25}),
]
FINISHED = {"status": "finished", "exit_code": 0, "step": 4}


def page_of(folder: Path) -> Page:
    return Page(report_page(read_run(folder)))


def notices(page: Page) -> str:
    assert sum(ul.get("class") == "notices" for ul in page.of("ul")) <= 1
    return page.text.split("evaluation loss")[0].split("Curves")[0]


@pytest.fixture
def finished(tmp_path: Path) -> Page:
    plan = {
        "peak_bytes": int(1.25 * GIB),
        "batch": "4 rows of 256 tokens",
        "phases": {
            phase: {"peak_bytes": int((1 + n / 8) * GIB), "by_kind": {"parameters": GIB // 2}}
            for n, phase in enumerate(PHASES)
        },
    }
    answers = [
        {"kind": "digit", "question": "Which?", "expected": "3", "generated": "3", "correct": True},
        {
            "kind": "digit",
            "question": "Again?",
            "expected": "5",
            "generated": "6",
            "correct": False,
        },
    ]
    return page_of(
        write_run(
            tmp_path / "my run", RECORDS, status=FINISHED, run=START, plan=plan, answers=answers
        )
    )


def test_every_figure_of_the_last_record_is_there(finished: Page) -> None:
    for key, value in RECORDS[-1].items():
        assert [key, json.dumps(value)] in finished.rows


def test_curves_are_those_of_the_records(finished: Page) -> None:
    loss = finished.curves("Loss")
    assert loss["train"] == {step: pytest.approx(6 / step) for step in (1, 2, 3, 4)}
    assert loss["eval"] == {0: 6.5, 2: 1.5, 4: 2.25}
    assert finished.curves("Token accuracy")["train"][2] == pytest.approx(0.55)
    assert finished.curves("Learning rate")["learning rate"][4] == pytest.approx(2.5e-4)
    assert finished.curves("Gradient norm")["norm"][3] == pytest.approx(1.253)
    assert finished.curves("Throughput")["all devices"][1] == 2501.5
    assert finished.curves("Waiting for data")["waiting"][1] == 0.125
    assert list(finished.curves("Peak memory by phase")) == list(PHASES)


def test_metrics_of_answers_and_a_run_that_stopped_early(tmp_path: Path) -> None:
    records = [
        judged(0, 6.5),
        trained(1) | judged(1, 2.5, **{"eval/chrf": 20.5, "eval/mine": 0.125}),
        trained(2) | judged(2, 2.0, **{"eval/chrf": 31.25, "eval/mine": 0.25}),
    ]
    reason = "eval/mine was no better in 2 evaluations in a row"
    folder = write_run(
        tmp_path / "run",
        records,
        status=FINISHED | {"step": 2, "reason": reason},
        run=START,
    )
    checkpoint = folder / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    state = {"best_metric": "eval/chrf", "best_step": 2, "best_value": 31.25}
    (checkpoint / "state.json").write_text(json.dumps({"state": state}))
    page = page_of(folder)
    assert page.curves("chrF")["eval"] == {1: 20.5, 2: 31.25}
    (head,) = [row for row in page.rows if row[:2] == ["step", "loss"]]
    assert head[-2:] == ["chrf", "mine"]
    assert ["2", "2.000", *page.row("2")[2:-2], "31.25", "0.2500"] == page.row("2")
    assert "by eval/chrf: 31.25 at step 2." in page.text
    assert f"This run ended after step 2 of 4: {reason}." in notices(page)


def test_figures_of_the_whole(finished: Page) -> None:
    text = finished.text
    assert "finished" in text and "4 of 4 steps" in text and "2026-01-02 03:04:05 UTC" in text
    assert "4,000" in text and "4,000 tokens" in text  # 4 steps of 1,000 tokens in a second
    assert "12.5% of the time waiting for data" in text
    assert "6.500 at step 0" in text
    assert not notices(finished).count("step 4 of")


def test_memory_by_phase_against_the_plan(finished: Page) -> None:
    rows = [row for row in finished.rows if row[:1] == ["backward"]]
    assert rows[0] == ["backward", "1.375", "4", "1.250", "+10.0%"]
    assert finished.row("parameters") == ["parameters", "0.500", "0.500", "0.500", "0.500"]
    assert "4 rows of 256 tokens" in finished.text and "cuda allocator" in finished.text


def test_a_plan_of_tensors_is_not_compared_with_a_process(tmp_path: Path) -> None:
    phases = {"backward": {"peak_bytes": GIB // 8, "by_kind": {}}}
    folder = write_run(
        tmp_path / "run",
        [*RECORDS[:-1], RECORDS[-1] | {"memory/planned_peak_gib": 0.125, "memory/plan_error": 0.5}],
        run=START | {"memory_source": "resident set (VmHWM)"},
        plan={"peak_bytes": GIB // 8, "phases": phases},
    )
    (folder / "oom.md").write_text("")
    page = page_of(folder)
    assert page.row("backward") == ["backward", "1.375", "4", "0.125"]
    assert "the plan tensors only" in page.text
    assert "0.1250 planned for tensors (+50.0%)" in page.text
    assert not [i for i in page.of("i") if i["class"] == "level"]
    assert "oom.md says where" in page.text


def test_the_other_sections(finished: Page) -> None:
    assert finished.row("rms_norm") == ["rms_norm", "applied", "keeps inputs"]
    assert finished.row("model")[1] == "tiny, built from seed 01,408,304 parameters"
    assert finished.row("torch")[1] == "2.99.1" and "cuda" not in [r[0] for r in finished.rows if r]
    assert finished.row("git")[1] == "0123abcd (with uncommitted changes)"
    assert finished.row("device")[1] == "Some GPU, 80 GiB"
    assert "2026-01-02 03:03:00 UTC, after step 2" in finished.row("starts")[1]
    assert finished.row("Again?") == ["Again?", "5", "6", "wrong"]
    assert "1 of 2 generated answers" in finished.text
    assert finished.row("pair")[2] == "25.0%"
    assert "1,200 tokens, 2 learned" in finished.text
    assert [img["src"] for img in finished.of("img")] == ["data:image/png;base64,AAAA"]
    assert "optim" in finished.text and "0.001" in finished.text
    # The best evaluation is marked, and no other.
    assert [a for a in finished.of("span") if a.get("class") == "best"] == [{"class": "best"}]


def test_nothing_is_fetched(finished: Page) -> None:
    fetching = {"src", "href", "srcset", "action", "poster", "data", "xlink:href"}
    for name, attributes in finished.elements:
        assert name not in ("link", "iframe", "object", "embed", "base", "form", "video", "audio")
        for key in fetching & attributes.keys():
            assert (attributes[key] or "").startswith("data:image/")
        assert not any(key.startswith("on") for key in attributes)
        assert "url(" not in (attributes.get("style") or "")
    (policy,) = [m for m in finished.of("meta") if m.get("http-equiv")]
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_texts_of_the_run_are_texts(tmp_path: Path) -> None:
    answer = dict.fromkeys(("kind", "question", "expected", "generated"), EVIL)
    evil_start = START | {
        "title": EVIL,
        "summary": [[EVIL, EVIL]],
        "patches": [{"name": EVIL, "status": EVIL, "reason": EVIL}],
        "versions": {EVIL: EVIL},
        "device": EVIL,
        "preview": [
            {
                "where": EVIL,
                "spans": [[EVIL, 'x" onclick="alert(1)'], [EVIL, ""]],
                "media": [
                    {"line": EVIL, "picture": "https://example.com/x.png"},
                    {"line": EVIL, "picture": 'data:image/png;base64,A" onerror="alert(1)'},
                ],
            }
        ],
    }
    folder = write_run(
        tmp_path / "<b>run</b>",
        [*RECORDS, judged(5, 1.0, **{f"eval/exact_match_{EVIL}": 0.5, EVIL: EVIL})],
        config=json.dumps({EVIL: {EVIL: EVIL}}),
        status={"status": EVIL, "reason": EVIL},
        run=evil_start,
        answers=[answer | {"correct": False}],
    )
    (folder / "rejected.jsonl").write_text(json.dumps({"source": EVIL, "reason": EVIL}) + "\n")
    text = report_page(read_run(folder))
    page = Page(text)
    assert len(page.of("script")) == 1 and not page.of("img")
    assert text.count("<script") == 1
    assert page.text.count("<script>alert(1)</script>") > 15
    assert "\\ud800\\x00" in page.text
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    text.encode("utf-8")


UNFINISHED = {
    "killed_in_its_first_step": (
        [judged(0, 6.5)],
        {"status": "running"},
        ["killed after step 0 of 4", "No training step"],
    ),
    "killed_before_any_record": ([], {"status": "running"}, ["before its first record"]),
    "torn": ([trained(1)], {"status": "running"}, ["Lines of metrics.jsonl", "No evaluation"]),
    "stopped": (
        [judged(0, 6.5), trained(1)],
        {"status": "preempted", "reason": "SIGTERM"},
        ["This run is preempted: it ended after step 1 of 4: SIGTERM"],
    ),
    "failed": ([trained(1)], {"status": "failed", "reason": "loss is nan"}, ["loss is nan"]),
    "no_status": ([trained(1)], None, ["no status.json"]),
    "not_finite": (
        [trained(1), trained(2, **{"train/loss": None, "train/nonfinite_steps": 1})],
        FINISHED,
        ["1 steps were not finite"],
    ),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_what_is_unfinished_is_said(name: str, tmp_path: Path) -> None:
    records, status, words = UNFINISHED[name]
    end = '{"step": 2, "train/lo' if name == "torn" else ""
    page = page_of(write_run(tmp_path / name, records, status=status, end=end))
    for text in words:
        assert text in notices(page)
    assert bool(page.of("svg")) == bool(records)


def test_a_run_of_another_gemtune_has_its_patches_from_the_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "old", [trained(1)], status=FINISHED)
    for step, name in ((1, "older"), (2, "newest")):
        (folder / f"checkpoints/step_0000000{step}").mkdir(parents=True)
        state = {"patches": [{"name": name, "status": "applied", "reason": ""}]}
        (folder / f"checkpoints/step_0000000{step}/state.json").write_text(json.dumps(state))
    (folder / "checkpoints/step_00000003").mkdir()
    page = page_of(folder)
    assert page.row("newest") and "older" not in page.text


@pytest.mark.parametrize("content", ["{", "[1]", '"x"', "null", "\udcff"])
def test_files_that_cannot_be_read_are_named(content: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", RECORDS, status=FINISHED)
    broken = content.encode("utf-8", "surrogateescape")
    for name in ("run.json", "plan.json", "config.yaml", "status.json"):
        (folder / name).write_bytes(broken)
    for name in ("answers.jsonl", "rejected.jsonl"):
        (folder / name).write_bytes(broken + b"\n")
    said = page_of(folder).text
    for name in ("run.json", "plan.json", "config.yaml", "status.json"):
        assert f"{name} cannot be read" in said


def test_values_of_other_types_do_not_stop_it(tmp_path: Path) -> None:
    odd = {key: [{"a": ["b"]}, 3] for key in START}
    odd["preview"] = [{"num_tokens": "x", "spans": ["x", ["x"]], "media": 3}, 4]
    odd["starts"] = [{"after_step": "x"}, {"time": 3, "after_step": None}]
    records = [
        dict.fromkeys(trained(1), value) | judged(1, value) | {"step": number}
        for number, value in enumerate(("x", None, True, [1], {"a": 1}, -1e308, 10**400))
    ]
    folder = write_run(tmp_path / "run", records, status={"status": 3}, run=odd, plan=odd)
    page_of(folder)


def test_a_long_run_is_a_small_page(tmp_path: Path) -> None:
    records = [trained(step) for step in range(1, 6001)]
    records[4321]["train/grad_norm"] = 777.0
    folder = write_run(tmp_path / "run", records, status=FINISHED)
    text = report_page(read_run(folder))
    assert len(text) < 400_000
    page = Page(text)
    # The spike is in the drawing: its y is the smallest of the pale curve.
    norm = text[text.index("<b>Gradient norm") :]
    pale = re.search(r'<path d="M([^"]*)" class="pale', norm)
    assert pale is not None
    places = [tuple(map(float, place.split())) for place in pale[1].split("L")]
    assert len(places) <= 602
    highest = min(places, key=lambda place: place[1])
    assert highest[0] == pytest.approx(1000 * 4321 / 5999, abs=0.1)
    assert len(page.curves("Loss")["train"]) <= 600


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="there is no folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ReportError, match=r"has no metrics\.jsonl"):
        read_run(tmp_path)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be written"):
        write_page("new", tmp_path / "missing" / "report.html")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ReportError, match="cannot be written"):
        write_page("new", tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
