"""Runs beside each other: the best of each figure, and the keys that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import Page, judged, trained, write_run

from gemtune.report import comparison_page, read_run
from gemtune.report.comparison import run_names

CONFIG = "run:\n  name: {name}\noptim:\n  lr: {lr}\nmodel:\n  freeze: [{freeze}]\nsame: 1\n"
FINISHED = {"status": "finished"}


@pytest.fixture
def page(tmp_path: Path) -> Page:
    folders = [
        write_run(
            tmp_path / "a",
            [trained(1), trained(2) | judged(2, 1.0), trained(3) | judged(3, 1.75)],
            config=CONFIG.format(name="a", lr=0.001, freeze=""),
            status=FINISHED,
        ),
        write_run(
            tmp_path / "b<i>",
            [trained(1), trained(2, **{"memory/peak_gib": 1.25}) | judged(2, 1.5)],
            config=CONFIG.format(name="b", lr=0.003, freeze=""),
            status=FINISHED,
        ),
        write_run(
            tmp_path / "c",
            [trained(1, **{"train/tokens": 4000})],
            config=CONFIG.format(name="c", lr=0.003, freeze="vision") + "more: {x: 2}\n",
        ),
    ]
    return Page(comparison_page([read_run(folder) for folder in folders]))


def test_the_best_of_each_figure_is_marked(page: Page) -> None:
    assert page.row("evaluation loss, last")[1:] == ["1.750", "1.500 ★", "–"]
    assert page.row("evaluation loss, lowest")[1:] == ["1.000 ★", "1.500", "–"]
    assert page.row("training loss, last")[1:] == ["2.000 ★", "3.000", "6.000"]
    assert page.row("tokens per second, mean")[1:] == ["4,000", "4,000", "16,000 ★"]
    # The highest peak of each; where all are alike none is best.
    assert page.row("peak memory, GiB")[1:] == ["1.500", "1.500", "1.500"]
    assert page.row("steps")[1:] == ["3", "2", "1"]


def test_every_run_has_its_curve(page: Page) -> None:
    assert page.curves("Training loss") == {
        "a": {1: 6, 2: 3, 3: 2},
        "b<i>": {1: 6, 2: 3},
        "c": {1: 6},
    }
    assert page.curves("Evaluation loss") == {"a": {2: 1, 3: 1.75}, "b<i>": {2: 1.5}}


def test_keys_that_differ_and_no_others(page: Page) -> None:
    keys = page.rows[next(n for n, row in enumerate(page.rows) if row[0] == "key") :]
    assert keys == [
        ["key", "a", "b<i>", "c"],
        ["model.freeze", "[]", "[]", '["vision"]'],
        ["more.x", "–", "–", "2"],
        ["optim.lr", "0.001", "0.003", "0.003"],
    ]
    assert "c: Nothing says how this run ended" in page.text


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, [trained(1)]) for name in ("x/run", "y/run", "z")]
    assert run_names([read_run(f) for f in folders]) == ["x/run", "y/run", f"{tmp_path.name}/z"]
    assert run_names([read_run(folders[2]), read_run(folders[2])]) == ["z", "z"]


def test_nine_runs_and_runs_without_records(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"r{n}", [trained(1)] if n else []) for n in range(10)]
    page = Page(comparison_page([read_run(folder) for folder in folders]))
    assert list(page.curves("Training loss")) == [f"r{n}" for n in range(1, 10)]
    lines = [i["class"] for i in page.of("i")]
    assert len(set(lines)) == 10
    empty = Page(comparison_page([read_run(folders[0])] * 2))
    assert "Nothing to draw yet" in empty.text
