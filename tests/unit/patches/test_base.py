"""What the journal refuses to write over."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from torch import nn

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches import Edit, Plan


class _Doubles:
    name = "doubles"

    def plan(self, model: nn.Module) -> Plan:
        forward = MethodType(lambda self, x: 2 * x, model)
        edits = (Edit(model, "mark", 1, "model"), Edit(model, "forward", forward, "model"))
        return Plan("applied", "for the test", edits)


def test_a_method_that_someone_else_has_replaced_is_not_written_over() -> None:
    # As trl's fused LM head and the hooks of accelerate are.
    model = nn.Identity()
    model.forward = lambda x: x + 1
    traces = dict(vars(model))
    with pytest.raises(PatchError, match=r"model\.forward was replaced .* before a trainer"):
        patches.apply(model, [_Doubles()])
    assert vars(model) == traces
    assert model(torch.tensor(3)) == 4


def test_a_method_of_the_class_is_replaced_and_put_back() -> None:
    model = nn.Identity()
    report = patches.apply(model, [_Doubles()])
    assert model(torch.tensor(3)) == 6
    report.undo()
    assert model(torch.tensor(3)) == 3
    assert "forward" not in vars(model)
