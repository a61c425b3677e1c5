"""Every transformers release of the matrix builds the exported model from its config.json.

The fixtures are what the newest release writes: `tests/unit/export/test_folder.py` sees to that.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

READERS = Path(__file__).parent.parent / "fixtures" / "readers"


@pytest.mark.parametrize("family", ["e2b", "26b_a4b"])
def test_the_weights_fit_the_model_that_this_release_builds(family: str) -> None:
    exported = json.loads((READERS / f"{family}_exported.json").read_text())
    config = Gemma4Config.from_dict(exported["config"])
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(config)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    del shapes["lm_head.weight"]  # tied: saved once
    assert shapes == exported["shapes"]
