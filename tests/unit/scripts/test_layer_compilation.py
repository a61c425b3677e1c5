"""Compiled decoder layers compute what layers compute, in as many graphs as there are kinds.

Graphs are run as they were traced (backend "eager"), which takes seconds. What inductor makes of
them is compared by the script, before it writes anything.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor
from torch._dynamo.utils import counters

from gemtune.errors import PatchError
from gemtune.models.recomputation import recompute
from gemtune.patches import apply

Load = Callable[[str], Any]
pytestmark = pytest.mark.xdist_group("benchmark")


@pytest.fixture(autouse=True)
def no_graphs_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graph and no count of another test; the process as it was."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    dynamo.reset()
    counters.clear()
    with dynamo.config.patch(recompile_limit=dynamo.config.recompile_limit):
        yield
    dynamo.reset()


@pytest.fixture
def three_layers(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny shape with a sliding layer, a full one, and one that shares the former's keys."""
    whole = load("models").shape

    def shape(size: str) -> dict[str, Any]:
        values = whole(size)
        values["text_config"] |= {
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        }
        return values

    monkeypatch.setattr(load("models"), "shape", shape)


def small(load: Load) -> Any:
    """A workbench on the three layers, in float64, with the patches of a run."""
    Settings, Workbench = load("settings").Settings, load("workbench").Workbench
    sizes = {"rows": 2, "text_tokens": 40, "images_per_row": 0, "soft_tokens": 12}
    bench = Workbench(
        Settings(size="tiny", device="cpu", dtype="float32", supervised_percent=50, **sizes)
    )
    bench.model.double()
    apply(bench.model)
    return bench


def gradients(load: Load, bench: Any, text_tokens: int, percent: int) -> dict[str, Tensor]:
    bench.settings.text_tokens, bench.settings.supervised_percent = text_tokens, percent
    bench.inputs = load("models").batch(bench.model, bench.settings, bench.device)
    bench.tidy()
    bench.step()
    return {n: p.grad.clone() for n, p in bench.model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("three_layers")
def test_gradients_are_those_of_the_layers_and_graphs_those_of_the_kinds(load: Load) -> None:
    plain, compiled = small(load), small(load)
    names = list(compiled.model.state_dict())
    load("compiled_layers").compile_layers(compiled.model, backend="eager")
    assert list(compiled.model.state_dict()) == names
    # Recomputation is chosen late, so that one model is both.
    for number, (tokens, percent) in enumerate([(40, 50), (31, 30), (52, 40)]):
        if number == 2:
            recompute(plain.model)
            recompute(compiled.model)
        expected = gradients(load, plain, tokens, percent)
        found = gradients(load, compiled, tokens, percent)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)
        assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


@pytest.mark.usefixtures("three_layers")
def test_what_has_no_gradients_makes_no_graph(load: Load) -> None:
    bench = small(load)
    ids = bench.inputs["input_ids"][:, :5]

    def outcomes() -> dict[str, Tensor]:
        with torch.no_grad():
            loss = bench.forward()
        bench.model.eval()
        loss_in_evaluation = bench.forward().detach()
        answer = bench.model.generate(ids, max_new_tokens=3, do_sample=False)
        bench.model.train()
        return {"no_grad": loss, "evaluation": loss_in_evaluation, "answer": answer}

    plain = outcomes()
    load("compiled_layers").compile_layers(bench.model, backend="eager")
    for name, value in outcomes().items():
        assert torch.equal(value, plain[name]), name
    assert counters["stats"]["unique_graphs"] == 0


@pytest.fixture
def measured(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any], Any]:
    """Runs the script on two batches, another way to prepare layers in the place of inductor."""
    script = load("layer_compilation")
    monkeypatch.setattr(script, "BATCH_KINDS", ((0, 50), (9, 100)))
    monkeypatch.setattr(script, "PROFILED", 1)

    def measured(prepare: Callable[[Any], object]) -> dict[str, Any]:
        text = script.CONTESTANTS[script.COMPILED][1]
        monkeypatch.setitem(script.CONTESTANTS, script.COMPILED, (prepare, text))
        words = ["--size=tiny", "--text-tokens=40", "--repetitions=1"]
        output = ["--output", str(tmp_path / "result")]
        monkeypatch.setattr(sys, "argv", ["layer_compilation.py", *words, *output])
        script.main()
        return json.loads((tmp_path / "result.json").read_text())

    return measured


@pytest.mark.usefixtures("three_layers")
def test_the_result_has_its_figures_and_a_table(
    load: Load, measured: Callable[[Any], dict[str, Any]]
) -> None:
    compile_layers = load("compiled_layers").compile_layers
    result = measured(lambda model: compile_layers(model, backend="eager"))
    eager, compiled = result["rows"]["eager"], result["rows"]["compiled"]
    assert max(compiled["errors"]) < 1e-5
    # The shared layer is one graph at some positions and another one at all of them.
    assert compiled["graphs"] == compiled["graphs_after_rounds"] == 4
    assert compiled["graph_breaks"] == 0
    assert compiled["first_pass_seconds"] > eager["first_pass_seconds"] > 0
    assert 0 < result["product_share"]["median"] < 1
    assert result["saved_share"]["median"] < 1 - result["product_share"]["median"]
    for row in (eager, compiled):
        assert 0 < row["seconds"]["min"] <= row["seconds"]["max"]
    text = load("compilation_tables").layer_compilation(result)
    assert "- 4 graphs, 0 graph breaks; 0 graphs more in the timed rounds" in text
    assert "- Tokens of a row (learned): 40 (50%), 49 (100%)" in text
    share = f"{result['product_share']['median']:.1%}"[:-1]
    assert f"products of matrices take {share} (" in text
    assert text.count("\n| ") == 4


@pytest.mark.usefixtures("three_layers")
def test_layers_that_compute_something_else_are_refused(
    measured: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    def halve_a_gradient(model: Any) -> None:
        mlp = model.model.language_model.layers[0].mlp
        mlp.register_forward_hook(lambda module, args, out: 0.5 * out + 0.5 * out.detach())

    with pytest.raises(PatchError, match="contestant 'compiled' does not compute"):
        measured(halve_a_gradient)
    assert not list(tmp_path.iterdir())
