"""Where the upper layers run at every position: the results of the stock model, and one message."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from gemma4_zoo import build, exact_float64, loss_and_gradients, relative_error
from supervised_rows import ALONE, CASES, EXACT, IGNORE, WITH_LOSS, Widths, patched

from gemtune.patches.supervised_positions import SupervisedPositions

IN_FULL: dict[str, tuple[dict[str, Any], str]] = {
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states"),
    "attentions": ({"output_attentions": True}, "output_attentions"),
}


@pytest.mark.parametrize("case", IN_FULL)
def test_calls_for_more_than_the_loss_run_in_full(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("e2b", attention="eager")
    options, words = IN_FULL[case]
    inputs = CASES["unequal counts"](model)
    with exact_float64():
        expected, _ = loss_and_gradients(model, inputs, reference=True)
    for choice in (ALONE, WITH_LOSS):
        with patched(model, choice), exact_float64(), Widths(model) as widths:
            output = model(**inputs, **options, use_cache=False)
        assert widths.upper == {44}
        assert relative_error(output.loss, expected) < EXACT
        asked = output.hidden_states if "hidden" in case else output.attentions
        assert all(tensor.shape[-2] == 44 for tensor in asked)
    assert [words in message for message in caplog.messages].count(True) == 1  # said once


def test_a_batch_without_labels_runs_in_full_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build("e2b")
    inputs = CASES["unequal counts"](model)
    inputs["labels"].fill_(IGNORE)
    with patched(model), Widths(model) as widths:
        for _ in range(2):
            loss = model(**inputs, use_cache=False).loss
    assert widths.upper == {44}
    assert loss.requires_grad and loss.item() == 0
    loss.backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)
    assert sum("a batch without labels" in message for message in caplog.messages) == 1


def test_a_batch_that_is_all_labels_runs_in_full(caplog: pytest.LogCaptureFixture) -> None:
    model = build("e2b")
    inputs = CASES["one row"](model)
    inputs["labels"] = inputs["input_ids"].clone()
    with exact_float64():
        expected, _ = loss_and_gradients(model, inputs, reference=True)
    with patched(model), exact_float64(), Widths(model) as widths:
        loss = model(**inputs, use_cache=False).loss
    assert widths.upper == {40}
    assert relative_error(loss, expected) < EXACT
    with patched(model, [SupervisedPositions(largest_share=1.0)]), Widths(model) as widths:
        model(**inputs, use_cache=False)
    assert widths.upper == {39}


def test_evaluation_keeps_its_logits_unless_told_otherwise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build("e2b").eval()
    inputs = CASES["unequal counts"](model)
    for choice in (ALONE, WITH_LOSS):
        with patched(model, choice), torch.no_grad(), exact_float64():
            with Widths(model) as widths:
                whole = model(**inputs)
            assert widths.upper == {44}
            with Widths(model) as widths:
                lean = model(**inputs, skip_logits=True)
            assert widths.upper == {11}
        assert whole.logits.shape[1] == 44 and lean.logits is None
        assert relative_error(lean.loss, whole.loss) < 1e-6  # the stock loss is float32 inside
    assert sum("may look at the logits" in message for message in caplog.messages) == 1


def test_loss_only_evaluation_of_the_other_patch_holds_here_too() -> None:
    from gemtune.patches.linear_cross_entropy import LinearCrossEntropy

    model = build("e2b").eval()
    inputs = CASES["unequal counts"](model)
    choice = [LinearCrossEntropy(loss_only_evaluation=True), "supervised_positions"]
    with patched(model, choice), torch.no_grad(), Widths(model) as widths:
        assert model(**inputs).logits is None
    assert widths.upper == {11}


def test_generation_runs_in_full_and_is_only_noted(caplog: pytest.LogCaptureFixture) -> None:
    model = build("e2b", torch.float32).eval()
    inputs = CASES["one row"](model)
    del inputs["labels"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    with patched(model), caplog.at_level(logging.INFO):
        assert torch.equal(model.generate(**inputs, **options), expected)
    said = [r for r in caplog.records if "a call without labels" in r.getMessage()]
    assert [record.levelno for record in said] == [logging.INFO]


def test_a_filled_cache_and_another_attention_run_in_full() -> None:
    model = build("e2b")
    inputs = CASES["one row"](model)
    with torch.no_grad():
        cache = model(**{k: v[:, :20] for k, v in inputs.items()}, use_cache=True).past_key_values
    rest = {k: v[:, 20:] for k, v in inputs.items() if k != "attention_mask"}
    with patched(model), Widths(model) as widths:
        model(**rest, attention_mask=inputs["attention_mask"], past_key_values=cache)
    assert widths.upper == {20}
    model.config.text_config._attn_implementation = "flex_attention"
    with patched(model):
        assert "flex" in str(_reason(model, inputs))


def _reason(model: Any, inputs: dict[str, torch.Tensor]) -> str | None:
    from gemtune.patches.supervised_positions import _why_in_full

    return _why_in_full(model, dict(inputs), loss_alone=True)
