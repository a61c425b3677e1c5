"""The names of the patches: in the code, in the configuration, in the documents."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from gemtune import patches
from gemtune.patches.catalogue import patch_class

REPOSITORY = Path(__file__).parents[3]


def test_every_patch_has_a_file_of_choices_under_its_name() -> None:
    files = {path.stem for path in (REPOSITORY / "configs" / "patches").glob("*.yaml")}
    assert files == set(patches.available())


def test_train_yaml_chooses_the_default_ones() -> None:
    if importlib.util.find_spec("yaml") is None:
        pytest.skip("needs PyYAML, which comes with Hydra")
    import yaml

    defaults = yaml.safe_load((REPOSITORY / "configs" / "train.yaml").read_text())["defaults"]
    chosen = next(entry["patches"] for entry in defaults if "patches" in entry)
    assert sorted(chosen) == sorted(patches.default())


def test_readme_says_what_each_is_for() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for name in patches.available():
        on_request = "" if name in patches.default() else " (on request)"
        assert f"| `{name}`{on_request} |" in readme


def test_names_are_those_of_the_classes() -> None:
    assert [patch_class(name).name for name in patches.available()] == list(patches.available())
