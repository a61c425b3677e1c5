"""benchmark.py measures what it says, stops at a wrong result, and says what it did not measure."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from gemtune.errors import ConfigError, PatchError
from gemtune.patches import Plan, Wrap, available, catalogue, default

REPOSITORY = Path(__file__).resolve().parents[3]
ENTRY = REPOSITORY / "scripts" / "benchmark.py"
BENCHMARKS = REPOSITORY / "benchmarks"
pytestmark = pytest.mark.xdist_group("benchmark")

ROW = {"name", "patches", "status", "reason", "seconds", "ratio"}
ROW |= {"peak_mib", "peak_vs_none", "saved_mib", "saved_vs_none", "loss_error", "gradient_error"}
ON_LINUX = sys.platform == "linux"

Load = Callable[[str], Any]


def benchmark(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ENTRY), *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


# Keys


def test_alone_it_lists_every_suite_and_every_key(load: Load) -> None:
    done = benchmark()
    assert done.returncode == 0
    assert benchmark("--help").stdout == done.stdout
    for key in load("settings").public_keys():
        assert f"  {key}=" in done.stdout
    scripts = {p.stem for p in BENCHMARKS.glob("*.py") if "\ndef main()" in p.read_text()}
    for suite in scripts - {"render", "chart"}:
        assert f"  {suite} " in done.stdout


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["suite=patchs"], "Did you mean 'patches'? Suites: patches, "),
        (["suit=patches"], "Did you mean 'suite'?"),
        (["suite=patches", "repititions=3"], "Did you mean 'repetitions'? Keys: size, device"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_word_and_the_list(
    words: list[str], answer: str
) -> None:
    done = benchmark(*words)
    assert done.returncode == 2
    assert answer in done.stderr
    assert "Traceback" not in done.stderr


def test_keys_become_values_of_their_type(load: Load) -> None:
    parse = load("settings").parse
    found = parse(["rows=3", "patches=[geglu, rms_norm]", "checkpointing=true", "frozen="])
    assert (found.rows, found.checkpointing, found.limit_seconds) == (3, True, 0.0)
    assert (found.patches, found.frozen) == (["geglu", "rms_norm"], [])


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("rows", "rows=VALUE"),
        ("rows=two", "rows=two is not an integer"),
        ("size=e2b_smal", "Did you mean 'e2b_small'?"),
        ("repetitions=0", "at least 1"),
        ("supervised_percent=101", "at most 100"),
        ("checkpointing=1", "true, false"),
        ("limit_seconds=soon", "not a number"),
    ],
)
def test_a_wrong_key_or_value_is_refused_in_words(load: Load, word: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(answer)):
        load("settings").parse([word])


def test_an_unknown_patch_is_refused_before_the_model_is_built(load: Load) -> None:
    settings = load("settings").parse(["patches=rms_nrm"])
    with pytest.raises(PatchError, match="Did you mean 'rms_norm'"):
        load("patches").resolve_settings(settings)


# Models and batches


def test_the_real_shapes_have_the_parameters_of_the_checkpoints(load: Load) -> None:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    shape = load("models").shape
    # Published: "2.3B effective, 5.1B with embeddings", "4.5B effective, 8B with embeddings". The
    # audio tower, about 0.3 B, is left out.
    for size, layers, billions in (("e2b", 35, 4.8), ("e4b", 42, 7.6)):
        config = Gemma4Config.from_dict(shape(size))
        assert len(config.text_config.layer_types) == layers
        assert config.text_config.layer_types[-1] == "full_attention"
        with torch.device("meta"):
            model = Gemma4ForConditionalGeneration(config)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.15)


def test_images_of_a_batch_differ_in_shape_and_keep_to_their_budget(load: Load) -> None:
    models = load("models")
    grids = [models.image_grid(280, ratio) for ratio in models.ASPECT_RATIOS]
    assert len(set(grids)) == len(grids)
    generator = torch.Generator().manual_seed(0)
    pixels, positions = models.images(grids, 280, generator)
    assert pixels.shape == (len(grids), 2520, 768)
    for (width, height), places in zip(grids, positions, strict=True):
        assert width * height <= 280
        real = places[(places >= 0).all(-1)]
        assert len(real.unique(dim=0)) == len(real) == 9 * width * height
        assert real.max(0).values.tolist() == [3 * width - 1, 3 * height - 1]
    assert (positions == -1).any()


# The suite


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """(result, folder, what was printed) of two patches on the tiny model."""
    folder = tmp_path_factory.mktemp("results")
    done = benchmark(
        *["suite=patches", "size=tiny", "device=cpu", "repetitions=1"],
        *["patches=geglu,rms_norm", "images_per_row=1", f"output={folder}"],
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "patches_tiny_cpu.json").read_text()), folder, done.stdout


def test_every_row_has_every_figure(tiny: tuple[dict[str, Any], Path, str]) -> None:
    result, _, printed = tiny
    assert {"command", "machine", "torch", "transformers", "settings"} <= result.keys()
    assert result["command"].startswith("python scripts/benchmark.py suite=patches size=tiny")
    assert "output=" not in result["command"]
    rows = {row["name"]: row for row in result["rows"]}
    # All but one of two is the other one alone, and the default set is all of them.
    assert list(rows) == ["none", "all", "geglu", "rms_norm"]
    for row in rows.values():
        assert row.keys() == ROW
        assert row["status"] == "measured"
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert row["loss_error"] <= result["settings"]["bounds"]["loss"] < 1e-4
        assert not ON_LINUX or row["peak_mib"] > 50
        assert f"`{row['name']}`" in printed
    assert rows["none"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert rows["none"]["saved_vs_none"] == 0.0
    assert rows["none"]["gradient_error"] < 1e-5, "checkpointed and not, both in float32"


def test_the_bytes_saved_are_those_of_the_formulas(
    tiny: tuple[dict[str, Any], Path, str], load: Load
) -> None:
    """In float32, trained: geglu drops gelu(gate) and the product, 2 of 4 numbers an element."""
    result, _, _ = tiny
    rows = {row["name"]: row for row in result["rows"]}
    text = load("models").shape("tiny")["text_config"]
    settings = result["settings"]
    wide = [
        text["intermediate_size"] * (2 if layer >= text["num_hidden_layers"] - shared else 1)
        for shared in [text["num_kv_shared_layers"]]
        for layer in range(text["num_hidden_layers"])
    ]
    expected = 2 * 4 * settings["rows"] * settings["length"] * sum(wide) / 2**20
    assert -rows["geglu"]["saved_vs_none"] == pytest.approx(expected, abs=0.006)
    both = rows["geglu"]["saved_vs_none"] + rows["rms_norm"]["saved_vs_none"]
    assert rows["all"]["saved_vs_none"] == pytest.approx(both, abs=0.02)


def test_the_chart_is_drawn(tiny: tuple[dict[str, Any], Path, str]) -> None:
    _, folder, printed = tiny
    assert f"wrote {folder / 'patches_tiny_cpu.png'}" in printed
    with Image.open(folder / "patches_tiny_cpu.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 20


def test_without_matplotlib_it_says_how_to_draw_later(load: Load, tmp_path: Path) -> None:
    said = load("chart").draw_file(tmp_path / "result.json", has=lambda name: None)
    assert "matplotlib is not installed" in said
    assert "python benchmarks/chart.py" in said
    assert not list(tmp_path.iterdir())


def run_here(load: Load, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The suite in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["patches.py", *words])
    return load("patches").main()


def test_what_the_limit_left_out_is_not_measured(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    words = ["size=tiny", "device=cpu", "limit_seconds=0.0001", f"output={tmp_path}"]
    assert run_here(load, monkeypatch, *words) == 0
    result = json.loads((tmp_path / "patches_tiny_cpu.json").read_text())
    assert result["settings"]["rounds"] == 0
    waiting = [row for row in result["rows"] if row["status"] == "not measured"]
    assert "none" in [row["name"] for row in waiting]
    for row in waiting:
        assert row["reason"] == "limit_seconds=0.0001 was reached"
        assert row["seconds"] is row["peak_mib"] is row["saved_mib"] is None
    assert "not measured" in capsys.readouterr().out
    assert (tmp_path / "patches_tiny_cpu.png").exists()


class Halved:
    """A patch whose loss is right, and half of one layer's gradient is missing."""

    name = "geglu"

    def plan(self, model: Any) -> Plan:
        def half(self: Any, forward: Callable, x: Tensor) -> Tensor:
            return forward(0.5 * x + 0.5 * x.detach())

        mlp = model.model.language_model.layers[0].mlp
        return Plan("applied", "", (Wrap(mlp, "forward", half, "mlp"),))


def test_a_patch_that_computes_something_else_stops_it(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(catalogue, "patch_class", lambda name: Halved)
    words = ["size=tiny", "device=cpu", "patches=geglu", f"output={tmp_path}"]
    assert run_here(load, monkeypatch, *words) == 2
    told = capsys.readouterr().err
    assert "contestant 'geglu' does not compute what the model computes" in told
    assert not list(tmp_path.iterdir())


def test_contestants_are_each_set_of_patches_once(load: Load) -> None:
    models, suite = load("models"), load("patches")
    settings = load("settings").parse(["size=tiny"])
    model = models.build(settings, torch.device("cpu"), torch.float32)
    found, left_out = suite.contestants(model, list(available()))
    sets = [frozenset(contestant.patches) for contestant in found]
    assert len(set(sets)) == len(sets)
    fitting = set(available()) - {row["name"] for row in left_out}
    assert sets[:2] == [frozenset(), fitting]
    assert {frozenset({name}) for name in fitting} <= set(sets)
    assert {frozenset(fitting - {name}) for name in fitting} <= set(sets)
    assert frozenset(default()) & fitting in sets
    for row in left_out:
        assert row["status"] in ("upstream", "not applicable")
        assert row["reason"]


def test_rounds_stop_at_the_limit_and_compare_whole_rounds(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that ends in the second round: the first stands, the begun one does not."""
    suite_module, bench = load("patches"), load("workbench")
    settings = load("settings").parse(
        ["size=tiny", "device=cpu", "patches=geglu", "repetitions=3", "limit_seconds=100"]
    )
    suite_module.resolve_settings(settings)
    suite = suite_module.Suite(bench.Workbench(settings), [])
    monkeypatch.setattr(suite, "say", lambda text: None)
    suite.look_at_each()
    suite.turn_seconds = dict.fromkeys(suite.rows, 1.0)
    turns = iter([0.5, 0.25, 1.0])
    monkeypatch.setattr(suite, "one_turn", lambda contestant: next(turns))
    clock = iter([90.0, 90.0, 90.0, 90.0, 90.0, 0.0])
    monkeypatch.setattr(suite, "seconds_left", lambda: next(clock))
    suite.time_each()
    assert suite.rounds == 1
    assert suite.rows["none"]["seconds"]["median"] == 0.5
    assert suite.rows["geglu"]["ratio"]["median"] == 0.5


# The tables


def test_the_table_names_the_biggest_saver_first(load: Load) -> None:
    def row(name: str, peak: float | None, saved: float, **more: Any) -> dict[str, Any]:
        times = {"median": 1.0, "min": 0.9, "max": 1.1}
        values = {"name": name, "status": "measured", "reason": "", "seconds": times}
        return values | {"ratio": times, "peak_mib": peak, "saved_mib": saved} | more

    rows = [
        row("none", 1000.0, 500.0),
        row("all", 600.0, 200.0),
        row("small", 900.0, 450.0),
        row("large", 700.0, 250.0),
        row("late", None, 500.0, seconds=None, ratio=None),
        row("other", None, 0.0, status="not applicable", reason="no such module"),
        row("all but large", 890.0, 450.0),
        row("all but small", 700.0, 250.0),
    ]
    against_none, against_all = load("tables").price_tables({"rows": rows})
    names = [cells[0] for cells in against_none[2]]
    assert names[:4] == ["`none`", "`all`", "`large`", "`small`"]
    assert names[-1] == "`other`: not applicable (no such module)"
    assert against_none[2][2][1:5] == ["700", "-300", "250", "-250"]
    assert against_none[2][4][1:] == ["not measured", "", "500", "0", *["not measured"] * 2]
    assert [cells[0] for cells in against_all[2]] == ["`all`", "`all but large`", "`all but small`"]
    assert against_all[2][1][1:3] == ["890", "+290"]
