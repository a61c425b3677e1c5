"""Every rank reads its part of a checkpoint: values, bytes, and one error for all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gemma4_zoo import build, model_folder
from ranks import findings, run_ranks
from safetensors.torch import load_file, save_file
from sharded_reading import GONE, bring_up_both_ways, bring_up_from_hub, fail
from whole_runs import SMALL, compose

from gemtune.models import load_model, load_processing

pytestmark = pytest.mark.xdist_group("reading")

FULL = ("model.dtype=float32",)
LORA = (
    "recipe=gemma4_lora",
    "adapter.parts=[language,embeddings]",
    "adapter.ranks.embeddings=3",
    "adapter.also_train=[norms,projector]",
)
EXPERTS = ("recipe=gemma4_lora", "adapter.parts=[language,experts]", "adapter.also_train=[router]")
HOSTED = (
    "model.dtype=bfloat16",
    "model.freeze=[ple,vision]",
    "model.gradient_checkpointing=true",
    "patches=[ple_offload,vision_streaming,linear_cross_entropy,supervised_positions]",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of two families, in one file of float32 and in many of bfloat16."""
    parent, found = tmp_path_factory.mktemp("checkpoints"), {}
    for family, hears in (("e2b", True), ("26b_a4b", False)):
        found[family] = Path(model_folder(family, parent, hears))
        model = build(family, torch.float32, seed=3, hears=hears)
        model.save_pretrained(found[family])
        found[f"{family} in shards"] = Path(shutil.copytree(found[family], parent / f"{family}s"))
        (found[f"{family} in shards"] / "model.safetensors").unlink()
        model.to(torch.bfloat16).save_pretrained(
            found[f"{family} in shards"], max_shard_size="300KB"
        )
    assert len(list(found["e2b in shards"].glob("*.safetensors"))) > 3
    assert (found["e2b in shards"] / "model.safetensors.index.json").exists()
    return found


def of(folder: Path) -> tuple[str, ...]:
    return (f"model.path={folder}", "model.weights=pretrained")


@pytest.fixture(scope="module")
def cases(folders: dict[str, Path]) -> dict[str, tuple[str, ...]]:
    return {
        "full": (*of(folders["e2b in shards"]), *FULL),
        "lora": (*of(folders["e2b"]), *LORA),
        "experts": (*of(folders["26b_a4b in shards"]), *EXPERTS),
        "mixture": (*of(folders["26b_a4b"]), *FULL),
        "hosted": (*of(folders["e2b"]), *HOSTED),
    }


CASES = ("full", "lora", "experts", "mixture", "hosted")


@pytest.fixture(scope="module", params=[2, 3])
def found(
    request: pytest.FixtureRequest,
    cases: dict[str, tuple[str, ...]],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    """By rank and case: what it holds, read in parts and sent."""
    folder = tmp_path_factory.mktemp("found")
    run_ranks(bring_up_both_ways, request.param, cases, str(folder), limit_seconds=300)
    return findings(folder, request.param)


@pytest.mark.parametrize("name", CASES)
def test_each_rank_holds_what_it_would_be_sent(found: list[dict[str, Any]], name: str) -> None:
    for of_rank in found:
        parts, sent = of_rank[name]["parts"], of_rank[name]["sent"]
        assert parts["reading"] == "each process reads its part of them"
        assert sent["reading"] == "the first process reads and sends them: so it is tested"
        for kind in ("kinds", "sharded", "same object", "patches", "identity"):
            assert parts[kind] == sent[kind], kind
        for kind in ("parameters", "buffers"):
            assert parts[kind].keys() == sent[kind].keys()
            for key, value in parts[kind].items():
                other = sent[kind][key]
                assert value.dtype == other.dtype, key
                assert torch.equal(value, other), key
    first = found[0][name]
    for kind in ("config", "generation"):
        ours, theirs = (_without_place(first[way][kind]) for way in ("parts", "sent"))
        assert ours == theirs


def _without_place(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "_name_or_path"}


@pytest.mark.parametrize("name", CASES)
def test_the_shares_make_what_transformers_reads(
    found: list[dict[str, Any]], name: str, cases: dict[str, tuple[str, ...]]
) -> None:
    config = compose(*SMALL, *cases[name])
    whole = load_model(config.model, load_processing(config.model), seed=0)
    shares = [of_rank[name]["parts"] for of_rank in found]
    compared = 0
    for key in shares[0]["parameters"]:
        plain = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" in key:
            continue
        values = [share["parameters"][key] for share in shares]
        value = torch.cat(values) if key in shares[0]["sharded"] else values[0]
        assert torch.equal(value, whole.get_parameter(plain)), key
        compared += 1
    assert compared == len(list(whole.parameters())) > 60
    buffers = dict(whole.named_buffers())
    assert buffers
    for share in shares:
        for key, buffer in share["buffers"].items():
            plain = key.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(buffer, buffers[plain]), key


def test_a_rank_reads_its_part_and_no_more(
    found: list[dict[str, Any]], folders: dict[str, Path]
) -> None:
    width = 2  # bytes of a value in the file
    for of_rank in found:
        parts = of_rank["full"]["parts"]
        assert parts["sharded"] == list(parts["parameters"])
        mine = {name: value.numel() * width for name, value in parts["parameters"].items()}
        assert parts["bytes"] == sum(mine.values())
        assert parts["largest"] == max(mine.values())
        assert of_rank["full"]["sent"]["bytes"] == 0  # transformers opens files by itself
    files = folders["e2b in shards"].glob("*.safetensors")
    whole = sum(tensor.numel() * width for file in files for tensor in load_file(file).values())
    share = whole / len(found)
    for of_rank in found:
        assert of_rank["full"]["parts"]["bytes"] == pytest.approx(share, rel=0.05)


def test_the_frozen_weights_are_told_by_few_of_their_values(found: list[dict[str, Any]]) -> None:
    for name in ("lora", "hosted"):
        num_parameters = len(found[0][name]["parts"]["parameters"])
        assert found[0][name]["parts"]["identity bytes"] <= 64 * 4 * num_parameters
        assert all(of_rank[name]["parts"]["identity bytes"] == 0 for of_rank in found[1:])
    assert found[0]["lora"]["parts"]["identity bytes"] > 0
    differs = {found[0][name]["parts"]["identity"]["frozen_weights"] for name in CASES}
    assert len(differs) >= 4


@pytest.fixture(scope="module")
def said(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """What ranks say of checkpoints that are not as they should be, by case."""
    parent = tmp_path_factory.mktemp("damaged")

    def copy(name: str, source: str = "e2b") -> Path:
        return Path(shutil.copytree(folders[source], parent / name))

    def change(folder: Path, change: Any) -> Path:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    norm, table = "model.language_model.norm.weight", "model.language_model.embed_tokens.weight"
    lacking = change(copy("lacking"), lambda tensors: tensors.pop(norm))
    misshaped = change(copy("misshaped"), lambda t: t.update({norm: torch.ones(3)}))
    tied = change(copy("tied"), lambda t: t.update({"lm_head.weight": t[table].clone()}))
    tuned = change(copy("tuned"), lambda t: t.update({k: v + 0.1 for k, v in t.items()}))
    shorter = copy("shorter", "e2b in shards")
    file = sorted(shorter.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1000])
    absent = copy("absent", "e2b in shards")
    sorted(absent.glob("*.safetensors"))[1].unlink()
    pickled = copy("pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    this = of(folders["e2b"])
    cases = {
        "lacking": (of(lacking),) * 2,
        "misshaped": (of(misshaped),) * 2,
        "shorter": (of(shorter),) * 2,
        "absent": (of(absent),) * 2,
        "another": (this, of(tuned)),
        "absent for one": (of(folders["e2b in shards"]), of(absent)),
        GONE: (this,) * 2,
        "tied": (of(tied),) * 2,
        "pickled": (of(pickled),) * 2,
        "dora": ((*this, "recipe=gemma4_lora", "adapter=dora"),) * 2,
        "random": (("model.weights=random",),) * 2,
    }
    folder = tmp_path_factory.mktemp("said")
    run_ranks(fail, 2, cases, str(folder), limit_seconds=200)
    return findings(folder, 2)


@pytest.mark.parametrize(
    "name, words",
    [
        ("lacking", "lacks 1 of the model's weights, such as model.language_model.norm.weight"),
        ("misshaped", "has model.language_model.norm.weight as [3] where config.json says ["),
        ("shorter", "cannot be read"),
        ("absent", "cannot be read"),
        ("absent for one", "cannot be read"),
        ("another", "rank 1 has another checkpoint in"),
        (GONE, "rank 1 cannot read its part of the checkpoint: the disk has gone"),
    ],
)
def test_what_one_rank_cannot_read_is_one_error_on_all(
    said: list[dict[str, str]], name: str, words: str
) -> None:
    assert said[0][name].startswith("error: ") and words in said[0][name]
    assert len({of_rank[name] for of_rank in said}) == 1


@pytest.mark.parametrize(
    "name, words",
    [
        ("tied", "the first process reads and sends them: the tied head is in the checkpoint"),
        ("pickled", "the first process reads and sends them: the checkpoint has no safetensors"),
        ("dora", "the first process reads and sends them: adapter=dora"),
    ],
)
def test_what_is_not_stored_as_it_is_used_is_sent(
    said: list[dict[str, str]], name: str, words: str
) -> None:
    for of_rank in said:
        assert of_rank[name].startswith(f"no error: {words}")


def test_random_weights_are_nothing_to_read(said: list[dict[str, str]]) -> None:
    assert [of_rank["random"] for of_rank in said] == ["no error: "] * 2


def test_one_rank_of_a_machine_downloads(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    source = folders["e2b in shards"]
    run_ranks(bring_up_from_hub, 2, str(source), str(tmp_path), limit_seconds=100)
    first, second = findings(tmp_path, 2)
    files = {file.name for file in source.glob("*.safetensors")}
    assert {Path(path).name for path in first["downloaded"]} == files
    assert second["downloaded"] == []
    for found in (first, second):
        assert found["reading"] == "each process reads its part of them"
