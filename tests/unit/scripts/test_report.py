"""report.py writes one page of a run or a comparison of several, and refuses in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import Page, judged, trained, write_run

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "report.py"


def report(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs below runs/."""
    for number, name in enumerate(("a", "b"), start=1):
        records = [trained(n) for n in range(1, 4)] + [judged(4, number / 4)]
        write_run(tmp_path / "runs" / name, records, status={"status": "finished"})
    return tmp_path


@pytest.mark.parametrize("name", ["a", "runs/a", "runs/a/"])
def test_one_run_has_its_page_in_its_folder(name: str, runs: Path) -> None:
    done = report(name, cwd=runs)
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs/a/report.html\n", "")
    page = Page((runs / "runs/a/report.html").read_text())
    assert page.curves("Loss")["eval"] == {4: 0.25}
    assert {p.name for p in (runs / "runs/a").iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "status.json",
    }


def test_several_are_compared_beside_the_first(runs: Path) -> None:
    done = report("a", "runs/b", cwd=runs)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.samefile(runs / "runs/comparison.html")
    page = Page(path.read_text())
    assert page.row("evaluation loss, last")[1:] == ["0.2500 ★", "0.5000"]


def test_output(runs: Path) -> None:
    assert report("a", "--output", "one.html", cwd=runs).stdout == "one.html\n"
    assert report("a", "b", "-o", "two.html", cwd=runs).stdout == "two.html\n"
    assert "2 runs compared" in (runs / "two.html").read_text()
    assert not (runs / "runs/a/report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "there is neither a folder nothing nor runs/nothing"),
        (["runs/nothing"], "there is no folder runs/nothing"),
        (["a", "no"], "there is neither a folder no nor runs/no"),
        (["runs"], "runs has no metrics.jsonl"),
        (["a", "-o", "missing/page.html"], "missing/page.html cannot be written: No such file"),
        (["a", "-o", "runs"], "runs cannot be written"),
        ([], "required: runs"),
        (["a", "--outptu", "x"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_told(arguments: list[str], says: str, runs: Path) -> None:
    done = report(*arguments, cwd=runs)
    assert done.returncode == 2 and done.stdout == ""
    assert "error: " in done.stderr and says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(runs.rglob("*.html"))


def test_help_is_what_the_script_says_of_itself(runs: Path) -> None:
    done = report("--help", cwd=runs)
    assert done.returncode == 0
    assert "python scripts/report.py a b c" in done.stdout
    assert done.stdout.strip() in SCRIPT.read_text()


def test_nothing_slow_is_imported(runs: Path) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['report.py', 'a']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'hydra', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=runs, capture_output=True, text=True)
    assert done.stdout == "runs/a/report.html\n[]\n", done.stderr
