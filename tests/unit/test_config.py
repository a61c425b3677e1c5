"""The boundary at which a composed configuration becomes typed values, or is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from gemtune.adapters import Adapter, Dora, Lora, RsLora
from gemtune.composition import explain, with_unchecked_keys
from gemtune.config import (
    RunConfig,
    describe_fields,
    find_recipe,
    from_dict,
    save_yaml,
    typed,
)
from gemtune.errors import ConfigError
from gemtune.patches.linear_cross_entropy import LinearCrossEntropy


def config_with(**sections: Any) -> DictConfig:
    return OmegaConf.create({"data": {"path": "rows.jsonl"}} | sections)


def test_defaults_come_from_the_dataclasses_and_nothing_of_omegaconf_is_left() -> None:
    config = typed(config_with(optim={"lr": 1e-3}, patches={"linear_cross_entropy": {}}))
    assert config.optim.lr == 1e-3
    assert config.optim.beta2 == 0.95
    assert type(config.adapter) is Adapter
    assert config.patches == {"linear_cross_entropy": LinearCrossEntropy()}

    def walk(value: Any) -> None:
        assert not OmegaConf.is_config(value)
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                walk(getattr(value, field.name))
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)

    walk(config)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"lrr": 1}}, r"optim\.lrr is not a field of AdamW\. Did you mean 'lr'\?"),
        ({"optimm": {"lr": 1}}, r"optimm is not a section.*Did you mean 'optim'"),
        ({"loop": {"max_steps": "abc"}}, r"loop\.max_steps='abc' has the wrong type"),
        ({"loop": {"max_grad_norm": [1]}}, r"loop\.max_grad_norm=\[1\] has the wrong type"),
        ({"model": {"freeze": "vision"}}, r"model\.freeze='vision' has the wrong type"),
        ({"loop": 3}, r"loop=3 is a section"),
        ({"patches": {"linear_cross": {}}}, r"patches\.linear_cross: there is no such patch"),
        (
            {"patches": {"linear_cross_entropy": {"chunk_mb": 3}}},
            r"patches\.linear_cross_entropy\.chunk_mb is not a field.*Did you mean 'chunk_mib'",
        ),
        ({"model": {"dtype": "float16"}}, "float16 overflows"),
        ({"model": {"dtype": "bf16"}}, r"model\.dtype=bf16 is not one of float32, bfloat16, auto"),
        ({"model": {"freeze": ["visoin"]}}, r"model\.freeze=visoin.*Did you mean 'vision'"),
        ({"loop": {"max_steps": 0}}, r"loop\.max_steps=0 is too small"),
        ({"optim": {"lr": -1.0}}, r"optim\.lr=-1\.0 is too small"),
        ({"optim": {"beta1": 1.0}}, r"optim\.beta1=1\.0 must be in"),
        ({"run": {"name": "a/b"}}, r"run\.name='a/b' must be a plain folder name"),
        ({"tracker": {"name": "tensorboard"}}, r"tracker\.name=tensorboard is not one of"),
        ({"schedule": {"name": "cosin"}}, "Did you mean 'cosine'"),
        (
            {"schedule": {"warmup_steps": 9}, "loop": {"max_steps": 9}},
            r"warmup_steps=9 leaves no step",
        ),
        ({"recipe": {"run": "os.system"}}, r"recipe\.run=os\.system must name a function below"),
        ({"data": {"path": None}}, r"data\.path is not set"),
        ({"data": {"path": "x", "on_bad_row": "ignore"}}, r"data\.on_bad_row=ignore"),
        ({"data": {"path": "???"}}, r"data\.path"),
        ({"run": {"name": "${nowhere.x}"}}, r"run\.name: Interpolation key 'nowhere\.x'"),
    ],
)
def test_what_cannot_run_is_refused_with_its_key(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed(config_with(**sections))


def test_a_target_chooses_the_variant() -> None:
    lora = {"_target_": "gemtune.adapters.Lora", "rank": 4}
    config = typed(config_with(adapter=lora))
    assert config.adapter == Lora(rank=4)


def test_trained_weights_are_float32_and_a_frozen_base_bfloat16_unless_asked_otherwise() -> None:
    lora = {"_target_": "gemtune.adapters.Lora"}
    assert typed(config_with()).model.dtype == "float32"
    assert typed(config_with(adapter=lora)).model.dtype == "bfloat16"
    assert typed(config_with(adapter=lora, model={"dtype": "float32"})).model.dtype == "float32"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.load",
        "pandas.read_pickle",
        "builtins.eval",
        "gemtune.config.importlib.import_module",
        "gemtune.adapters.attach",  # not a class
        "gemtune.optim.AdamW",  # a class of another section
        "gemtune.nowhere.Lora",
        "gemtune.adapters.Dataclass",
        42,
    ],
)
def test_a_target_outside_the_package_is_never_imported(target: Any) -> None:
    with pytest.raises(ConfigError, match=r"adapter\._target_=.* is not allowed"):
        typed(config_with(adapter={"_target_": target}))


def test_as_dict_round_trips_through_yaml(tmp_path: Path) -> None:
    config = typed(config_with(adapter={"_target_": "gemtune.adapters.Lora"}))
    path = tmp_path / "config.yaml"
    save_yaml(config.as_dict(), path)
    assert yaml.safe_load(path.read_text()) == config.as_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_every_field_is_described() -> None:
    text = describe_fields()
    for section in dataclasses.fields(RunConfig):
        assert f"  {section.name}." in text
    for key in ("adapter.rank", "patches.linear_cross_entropy.chunk_mib", "loop.max_steps"):
        assert f"  {key} = " in text
    lines = text.splitlines()
    assert len(lines) % 2 == 0
    assert all(line.startswith("      ") and line.strip() for line in lines[1::2])


def test_a_recipe_is_found_by_its_dotted_path() -> None:
    config = typed(config_with())
    assert find_recipe(config).__module__ == "recipes.gemma4_sft"
    config.recipe.run = "recipes.nowhere.run"
    with pytest.raises(ConfigError, match=r"recipes\.nowhere\.run cannot be imported"):
        find_recipe(config)


def test_explain_lists_the_choices(tmp_path: Path) -> None:
    for name in ("tiny", "e2b"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / f"{name}.yaml").touch()
    choice = explain("In 'train': Could not find 'model/tinyy'\n\nAvailable ...", tmp_path)
    assert choice == (
        "model=tinyy: there is no such model. Did you mean 'tiny'? Choices: e2b, tiny."
    )
    group = explain("Could not override 'modle'.\nTo append ...", tmp_path)
    assert "Did you mean 'model'?" in group
    assert explain("other\nConfig search path:\n\tprovider=x", tmp_path) == "other"


def test_keys_pass_hydra_unchecked_and_groups_do_not() -> None:
    arguments = ["optim.lr=1", "model=e2b", "patches=[a.b=c]", "+optim.x=1", "--cfg", "hydra/x=y"]
    expected = ["++optim.lr=1", *arguments[1:]]
    assert with_unchecked_keys(arguments) == expected


def test_a_rate_of_a_frozen_part_is_refused_before_anything_is_read() -> None:
    sections = {"optim": {"part_lrs": {"vision": 1e-5}}, "model": {"freeze": ["vision", "ple"]}}
    with pytest.raises(ConfigError, match=r"part_lrs\.vision .*model\.freeze=\[vision,ple\]"):
        typed(config_with(**sections))
    assert typed(config_with(optim={"part_lrs": {"vision": 1e-5}})).optim.part_lrs["vision"] == 1e-5


@pytest.mark.parametrize("kind", [Adapter, Lora, RsLora, Dora])
def test_plain_values_make_the_same_configuration_again(
    kind: type[Adapter], tmp_path: Path
) -> None:
    """Also as YAML: LoRA and rsLoRA have the same keys, and another scale."""
    config = typed(config_with(adapter={"_target_": f"gemtune.adapters.{kind.__name__}"}))
    assert type(config.adapter) is kind
    save_yaml(config.as_dict(), tmp_path / "config.yaml")
    again = from_dict(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert again == config and type(again.adapter) is kind
