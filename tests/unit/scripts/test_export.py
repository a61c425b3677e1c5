"""The script refuses what cannot be exported before it writes anything; and uploads at the end."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
from whole_runs import RunFolder

from gemtune.checkpoint import folder as folder_module
from gemtune.errors import ConfigError
from gemtune.export import request as request_module
from gemtune.export import trained_model
from gemtune.export.adapter import require_adapter_alone
from gemtune.export.model_card import model_card, public_name

SCRIPT = Path(__file__).parents[3] / "scripts" / "export.py"
Export = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("export_script", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture
def export(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> Export:
    """export(*arguments) -> (exit status, output, errors), in an empty folder."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
        status = script.main()
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def run_copy(finished_run: RunFolder, tmp_path: Path) -> Path:
    """Below runs/, so that its name is enough."""
    shutil.copytree(finished_run.path / "checkpoints", tmp_path / "runs" / "done" / "checkpoints")
    return tmp_path / "runs" / "done"


def damage(run: Path) -> None:
    file = sorted(run.glob("checkpoints/step_*/*.distcp"))[-1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def leave_unfinished(run: Path) -> None:
    for marker in run.glob("checkpoints/*/COMPLETE"):
        marker.unlink()


def nothing(run: Path) -> None:
    pass


UNFINISHED = "checkpoint=runs/done/checkpoints/step_00000004"


@pytest.mark.parametrize(
    ("arguments", "prepare", "says"),
    [
        (("to=out",), nothing, "run= is missing"),
        (("run=done",), nothing, "to= is missing"),
        (("run=gone", "to=out"), nothing, "run=gone: no run with checkpoints is there"),
        (("run=done", "to=runs"), nothing, "to=runs exists already"),
        (("run=done", "to=out", "knd=x"), nothing, "Did you mean 'kind'?"),
        (("run=done", "to=out", "kind=lora"), nothing, "kind=lora is not one of merged, adapter"),
        (("run=done", "to=out", "dtype=float16"), nothing, "overflows"),
        (("run=done", "to=out", "verify=maybe"), nothing, "wants true or false"),
        (("run=done", "to=out", "max_shard_gb=0"), nothing, "above 0"),
        (("run=done", "to=out", "kind=adapter"), nothing, "without an adapter"),
        (("run=done", "to=out"), leave_unfinished, "no finished checkpoint"),
        (("to=out", UNFINISHED), leave_unfinished, "was never finished"),
        (("run=done", "to=out", "checkpoint=nowhere"), nothing, "there is no such folder"),
        (("run=done", "to=out"), damage, r"is damaged: .*SHA-256 differs"),
        (("run=done", "to=out", "base=elsewhere/at/all"), nothing, "there is no such folder"),
        (("run=done", "to=out", "push=a b"), nothing, "no name of a repository"),
    ],
)
def test_bad_input_is_one_error_before_anything_is_written(
    export: Export,
    run_copy: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    prepare: Callable[[Path], None],
    says: str,
) -> None:
    prepare(run_copy)
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    status, output, errors = export(*arguments)
    assert status == 2 and output == ""
    *_, message = errors.partition("error: ")
    assert message and "Traceback" not in errors
    assert re.search(says, message), message
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_a_checkpoint_on_another_base_is_refused(
    export: Export, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = trained_model.load_model

    def another(*arguments: Any, **options: Any) -> Any:
        model = loaded(*arguments, **options)
        model.config.text_config.final_logit_softcapping = 7.0
        return model

    monkeypatch.setattr(trained_model, "load_model", another)
    status, _, errors = export("run=done", "to=out")
    assert status == 2 and "was trained on another base: the configuration" in errors
    assert not (tmp_path / "out").exists()


def test_best_is_the_one_with_the_lowest_evaluation_loss(
    export: Export, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The small run evaluates at none of its checkpoints."""
    arguments = ("run=done", "to=out", "checkpoint=best", "verify=false")
    status, _, errors = export(*arguments)
    assert status == 2 and "checkpoint=best: none of the 2 checkpoints" in errors
    losses = {"step_00000002": {"eval/loss": 1.5}, "step_00000004": {"eval/loss": 2.5}}
    monkeypatch.setattr(folder_module, "evaluation_of", lambda path: losses[path.name])
    status, output, errors = export(*arguments)
    assert (status, output) == (0, "written: out\n") and "step_00000002" in errors
    assert "after 2 steps" in (tmp_path / "out" / "README.md").read_text()


class Hub:
    """The part of huggingface_hub.HfApi that is used, without a hub."""

    calls: list[tuple[str, Any]]
    fails = False

    def whoami(self) -> dict[str, str]:
        return {"name": "somebody"}

    def create_repo(self, repo_id: str, **options: Any) -> None:
        Hub.calls.append(("create", (repo_id, options)))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        if Hub.fails:
            raise OSError("connection lost")
        Hub.calls.append(("upload", (repo_id, sorted(p.name for p in folder_path.iterdir()))))
        return f"https://hub/{repo_id}"


@pytest.mark.parametrize("fails", [False, True])
def test_a_push_comes_after_everything_else(
    export: Export, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    Hub.calls, Hub.fails = [], fails
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    checked: list[Path] = []
    monkeypatch.setattr(request_module, "verify_export", lambda path, _: checked.append(path) or [])
    status, _, errors = export("run=done", "to=out", "push=me/mine")
    assert len(checked) == 1 and (tmp_path / "out" / "model.safetensors").exists()
    assert Hub.calls[0] == ("create", ("me/mine", {"private": True, "exist_ok": True}))
    if fails:
        assert status == 2 and "hf upload me/mine out" in errors and len(Hub.calls) == 1
    else:
        assert status == 0 and "uploaded: https://hub/me/mine" in errors
        assert {"README.md", "config.json", "chat_template.jinja"} <= set(Hub.calls[1][1][1])


def test_what_peft_could_not_load_is_refused(finished_run: RunFolder) -> None:
    from gemtune.config import from_dict

    state = json.loads((finished_run.checkpoints()[-1] / "state.json").read_text())
    lora = {"_target_": "gemtune.adapters.Lora", "also_train": ["norms"]}
    with pytest.raises(ConfigError, match=r"also_train=\[norms\] trained weights .*kind=merged"):
        require_adapter_alone(from_dict(state["config"] | {"adapter": lora}))
    seeded = {"_target_": "gemtune.adapters.Lora"}
    with pytest.raises(ConfigError, match=r"built from run\.seed"):
        require_adapter_alone(from_dict(state["config"] | {"adapter": seeded}))
    with pytest.raises(ConfigError, match="does not say of which kind"):
        from_dict(state["config"] | {"adapter": {"rank": 4}})


def test_a_card_names_no_place_of_the_machine(finished_run: RunFolder, tmp_path: Path) -> None:
    from gemtune.config import from_dict

    state = json.loads((finished_run.checkpoints()[-1] / "state.json").read_text())
    config = from_dict(state["config"])
    config.model.path, config.model.weights = "google/gemma-4-E2B-it", "pretrained"
    config.data.path = str(tmp_path / "secret" / "chat.jsonl")
    card = model_card(config, finished_run.path, step=2)
    assert "base_model: google/gemma-4-E2B-it" in card and "chat.jsonl" in card
    assert str(tmp_path) not in card and "secret" not in card
    assert "ai.google.dev/gemma/terms" in card and "(step 2)" in card and "(step 4)" not in card
    assert model_card(config, tmp_path, step=2, kind="adapter").startswith(
        "---\nlibrary_name: peft"
    )
    assert public_name("/a/b/model") == "model" and public_name("own/er") == "own/er"
