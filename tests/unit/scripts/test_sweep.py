"""scripts/sweep.py: which trials there are, what is refused before one starts, and real ones."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from whole_runs import REPOSITORY, SMALL, compose, train_in_process

from gemtune.composition import with_unchecked_keys
from gemtune.errors import ConfigError

SCRIPTS = REPOSITORY / "scripts"


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("sweep")
    for name in ("sweep", "trials"):
        sys.modules.pop(name, None)


def names(trials: list[Any]) -> list[str]:
    return [trial.name for trial in trials]


def test_every_combination_is_a_trial_of_its_own(sweep: Any, tmp_path: Path) -> None:
    arguments = [f"run.dir={tmp_path}", "tracker=none", "run.name=lr", "data.max_rows=9"]
    trials = sweep.plan([*arguments, "optim.lr=1e-4,3e-4", "loop.max_steps=range(60,100,20)"])
    assert names(trials) == [
        "lr-lr_0.0001-max_steps_60",
        "lr-lr_0.0001-max_steps_80",
        "lr-lr_0.0003-max_steps_60",
        "lr-lr_0.0003-max_steps_80",
    ]
    config = compose(*trials[3].overrides)
    assert (config.optim.lr, config.loop.max_steps, config.data.max_rows) == (3e-4, 80, 9)
    assert config.run.folder == trials[3].folder == tmp_path / trials[3].name
    assert {trial.status for trial in trials} == {"new"}
    again = sweep.plan([*arguments, "optim.lr=1e-4,3e-4", "loop.max_steps=range(60,100,20)"])
    assert names(again) == names(trials)


def test_groups_and_lists(sweep: Any, tmp_path: Path) -> None:
    arguments = [f"run.dir={tmp_path}", "tracker=none"]
    trials = sweep.plan([*arguments, "schedule=glob(*)", "adapter=choice(none,lora)"])
    assert len(trials) == 6 and len(set(names(trials))) == 6
    configs = [compose(*trial.overrides) for trial in trials]
    kinds = {(config.schedule.name, type(config.adapter).__name__) for config in configs}
    assert kinds == {(s, a) for s in ("constant", "cosine", "linear") for a in ("Adapter", "Lora")}
    lists = sweep.plan([*arguments, "patches=[],[rms_norm]"])
    assert [list(compose(*trial.overrides).patches) for trial in lists] == [[], ["rms_norm"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optim.lr=1e-4"], "nothing to sweep"),
        (["optim.lr=interval(0,1)"], "an interval has no list of values"),
        (["optim.lrr=1e-4,3e-4"], "optim.lrr is not a field of AdamW. Did you mean 'lr'?"),
        (["optim.lr=1e-4,-1"], "optim.lr=-1"),
        (["optim.lr=1e-4,1e-4"], "a value is given twice"),
        (["optim.lr=1e-4,3e-4", "optim.lr=1"], "given twice, and one of the two is swept"),
        (["run.name=a,b"], "each trial gets a run.name of its own"),
        (["model=tinyy", "optim.lr=1e-4,3e-4"], "model=tinyy"),
    ],
)
def test_mistakes_are_found_before_a_trial_starts(
    sweep: Any,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep.py", f"run.dir={tmp_path}", *arguments])
    assert sweep.main() == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("sweep.metrc=a", r"Did you mean 'metric'"),
        ("sweep.jobs=two", r"sweep\.jobs wants a whole number"),
        ("sweep.jobs=0", r"sweep\.jobs=0"),
        ("sweep.dry_run=maybe", r"wants true or false"),
        ("sweep.best=most", r"sweep\.best"),
    ],
)
def test_keys_of_the_sweep(sweep: Any, argument: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep.own_keys([argument])


def test_long_and_odd_values_still_have_names_of_their_own(sweep: Any) -> None:
    from trials import MAX_NAME_CHARACTERS, trial_name

    odd = [trial_name("run", [f"data.path=/a/{letter}.jsonl"]) for letter in "xy"]
    long = [trial_name("run", [f"model.name={'m' * 300}{letter}"]) for letter in "xy"]
    assert len({*odd, *long}) == 4
    for name in (*odd, *long):
        assert "/" not in name and len(name) <= MAX_NAME_CHARACTERS


def test_gpus_are_shared_out(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import trials

    monkeypatch.setattr(trials, "visible_gpus", lambda: ["0", "1", "2", "5", "7"])
    assert trials.gpu_slices(2, 2) == ["0,1", "2,5"]
    assert trials.gpu_slices(1, 4) == [None]
    with pytest.raises(
        trials.SweepError, match=r"need 6 GPUs, and there are 5.* At most sweep\.jobs=2"
    ):
        trials.gpu_slices(3, 2)


def test_a_dry_run_starts_nothing(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = [f"run.dir={tmp_path}", "optim.lr=1e-4,3e-4", "sweep.dry_run=true"]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
    assert sweep.main() == 0
    shown = capsys.readouterr().out
    assert shown.count("new       accelerate launch --config_file") == 2
    assert "optim.lr=0.0001" in shown and "2 trials, nothing was started" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argument", ["-m", "--multirun", "hydra.mode=MULTIRUN"])
def test_in_process_multirun_names_the_script(argument: str) -> None:
    with pytest.raises(ConfigError, match=r"scripts/sweep\.py optim\.lr=1,2"):
        with_unchecked_keys([argument, "optim.lr=1,2"])


def test_a_sweep_goes_on_and_reports(tmp_path: Path) -> None:
    """One trial is done before, one is new and runs."""
    small = [word for word in SMALL if not word.startswith(("optim.lr=", "loop.max_steps="))]
    common = (*small, "loop.max_steps=2", f"run.dir={tmp_path}")
    arguments = [*common, "run.name=run", "optim.lr=0.001,0.002"]
    output, first = tmp_path / "out" / "sweep.json", "run-lr_0.001"
    finished = train_in_process(*common, "optim.lr=0.001", run_dir=tmp_path)
    finished.path.rename(tmp_path / first)
    done = start(*arguments, f"sweep.output={output}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"finished before: {first}" in done.stdout
    assert "new -> running: run-lr_0.002" in done.stdout
    result = json.loads(output.read_text())
    values = [trial["value"] for trial in result["trials"]]
    assert values == sorted(values) and len(values) == 2
    assert {trial["name"]: trial["status"] for trial in result["trials"]} == {
        first: "finished",
        "run-lr_0.002": "finished",
    }
    table = done.stdout[done.stdout.rindex("eval/loss") :].splitlines()
    assert [line.split()[-1] for line in table[1:3]] == [t["name"] for t in result["trials"]]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, SCRIPTS / "sweep.py", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
