"""BENCHMARKS.md says what the result files say; these name their setting, and no path of it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
RENDER = REPOSITORY / "benchmarks" / "render.py"
RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*.json"))
HEADER = {"command", "date", "git_revision", "machine", "os", "python", "torch", "transformers"}


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)


def test_the_documents_are_up_to_date() -> None:
    done = run(RENDER, "--check")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Documents, results and renderer in a folder of their own."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for path in (RENDER, *RESULTS, REPOSITORY / "BENCHMARKS.md", REPOSITORY / "README.md"):
        (tmp_path / path.relative_to(REPOSITORY)).write_bytes(path.read_bytes())
    return tmp_path


def test_a_changed_result_is_noticed_and_written(copy: Path) -> None:
    path = copy / "benchmarks" / "results" / "default_run.json"
    result = json.loads(path.read_text())
    next(row for row in result["seeds"] if row["seed"] == 0)["exact_match"] = 0.123
    path.write_text(json.dumps(result))
    render = copy / "benchmarks" / "render.py"

    before = (copy / "BENCHMARKS.md").read_text()
    done = run(render, "--check")
    assert done.returncode == 1
    assert "BENCHMARKS.md and README.md" in done.stderr
    assert (copy / "BENCHMARKS.md").read_text() == before, "--check changes nothing"

    assert run(render).returncode == 0
    assert "| CPU, 0 | 12.3% |" in (copy / "BENCHMARKS.md").read_text()
    assert "-->12.3%<!--" in (copy / "README.md").read_text()
    assert run(render, "--check").returncode == 0


def test_without_a_result_the_table_says_not_measured(copy: Path) -> None:
    (copy / "benchmarks" / "results" / "linear_cross_entropy.json").unlink()
    render = copy / "benchmarks" / "render.py"
    assert run(render).returncode == 0
    text = (copy / "BENCHMARKS.md").read_text()
    assert "<!-- results: linear_cross_entropy -->\nnot measured\n<!-- /results -->" in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_names_its_setting_and_no_path(path: Path) -> None:
    text = path.read_text()
    result = json.loads(text)
    assert result.keys() >= HEADER
    assert {"cpu", "num_cores", "ram_gib"} <= result["machine"].keys()
    places = (Path.home(), Path(tempfile.gettempdir()), Path(__file__).parents[3])
    assert not [place for place in places if f"{place}/" in text]
