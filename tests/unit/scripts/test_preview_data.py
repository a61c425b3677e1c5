"""The script: the keys of train.py, and its own."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "preview_data.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("preview_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    # The dataclasses of the script look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path[:] = before


@pytest.fixture
def preview(script, tmp_path, monkeypatch, capsys):
    """preview(*arguments) -> (exit status, output, errors)."""

    def run(*arguments):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["preview_data.py", *arguments])
        status = script.main()
        return status, *capsys.readouterr()

    return run


def rows(path, *last):
    good = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}
        for n in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, *last]))
    return f"data.path={path.name}"


def test_rows_and_a_page(preview, tmp_path):
    path = rows(tmp_path / "r.jsonl")
    own = ("preview.rows=2", "preview.html=p.html")
    status, output, errors = preview("data=chat", path, "data.eval_fraction=0", *own)
    assert status == 0, errors
    assert output.count("«a<turn|>»") == 2
    assert "5 rows" in output and "written: p.html" in output
    page = (tmp_path / "p.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<section><h3>") == 2


def test_a_bad_row_is_listed_and_the_status_says_that_a_run_would_stop(preview, tmp_path):
    path = rows(tmp_path / "r.jsonl", {"messages": []})
    status, output, _ = preview("data=chat", path)
    assert status == 1
    assert "r.jsonl line 6: 'messages' must be a list" in output
    assert preview("data=chat", path, "data.on_bad_row=skip")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["preview.row=2"], "preview.row=2 is not a key of the preview. Did you mean 'rows'"),
        (["preview.rows=x"], "preview.rows wants a whole number"),
        (["preview.ids=maybe"], "preview.ids wants true or false"),
        (["preview.split=test"], "preview.split=test is not one of train, eval"),
        (["data=chat", "data.path=gone.jsonl"], "there is no such file"),
        (["data.max_lenght=3"], "Did you mean 'max_length'"),
        (["data=nothing"], "there is no such data"),
    ],
)
def test_mistakes_are_told(preview, arguments, says):
    status, _, errors = preview(*arguments)
    assert status == 2
    assert errors.startswith("error: ") and says in errors
    assert "Traceback" not in errors
