"""The upper layers at supervised positions: same loss and gradients, and only there."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from gemma4_zoo import (
    SHARING_FAMILIES,
    build,
    cast,
    config_of,
    exact_float64,
    loss_and_gradients,
    relative_error,
)
from kept_bytes import kept_bytes
from supervised_rows import (
    ALONE,
    CASES,
    EXACT,
    IGNORE,
    WITH_LOSS,
    Widths,
    most_learned,
    patched,
    text_rows,
)

from gemtune import patches
from gemtune.losses import HostLabels
from gemtune.patches.supervised_positions import locate


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", SHARING_FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient(case: str, family: str, attention: str) -> None:
    model = build(family, attention=attention)
    inputs = CASES[case](model)
    with exact_float64():
        expected_loss, expected = loss_and_gradients(model, inputs, reference=True)
    for choice in (ALONE, WITH_LOSS):
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            with patched(model, choice), exact_float64(), Widths(model) as widths:
                loss, gradients = loss_and_gradients(model, inputs)
            model.gradient_checkpointing_disable()
            assert widths.upper == {most_learned(inputs)}
            assert relative_error(loss, expected_loss) < EXACT
            assert gradients.keys() == expected.keys()
            for name, gradient in expected.items():
                assert relative_error(gradients[name], gradient) < EXACT, name


def test_lower_layers_run_everywhere_and_upper_ones_do_not() -> None:
    model = build("e2b")
    inputs = CASES["unequal counts"](model)
    with patched(model), Widths(model) as widths:
        model(**inputs, use_cache=False)
    assert widths.lower == {44}
    assert widths.upper == {11}


def test_experts_run_at_these_positions_too() -> None:
    config = config_of("26b_a4b")
    config.text_config.num_kv_shared_layers = 3
    config.text_config.hidden_size_per_layer_input = 16
    model = build("e2b")
    text = model.config.text_config
    for name in ("enable_moe_block", "num_experts", "top_k_experts", "moe_intermediate_size"):
        setattr(text, name, getattr(config.text_config, name))
    text._experts_implementation = "eager"
    torch.manual_seed(0)
    model = cast(type(model)(model.config), torch.float64).train()
    inputs = CASES["unequal counts"](model)
    with exact_float64():
        expected_loss, expected = loss_and_gradients(model, inputs, reference=True)
    with patched(model), exact_float64(), Widths(model) as widths:
        loss, gradients = loss_and_gradients(model, inputs)
    assert widths.upper == {11}
    assert any("experts" in name for name in gradients)
    assert relative_error(loss, expected_loss) < EXACT
    for name, gradient in expected.items():
        # An expert that no token chose has no gradient but zeros.
        assert (gradients[name] - gradient).norm() <= EXACT * gradient.norm().clamp(min=1e-6), name


def test_the_text_model_alone() -> None:
    from transformers import Gemma4ForCausalLM

    torch.manual_seed(0)
    model = cast(Gemma4ForCausalLM(build("e2b").config.text_config), torch.float64).train()
    inputs = CASES["unequal counts"](build("e2b"))
    del inputs["mm_token_type_ids"]
    with exact_float64():
        expected_loss, expected = loss_and_gradients(model, inputs, reference=True)
    with patched(model), exact_float64():
        loss, gradients = loss_and_gradients(model, inputs)
    assert relative_error(loss, expected_loss) < EXACT
    for name, gradient in expected.items():
        assert relative_error(gradients[name], gradient) < EXACT, name


@pytest.mark.parametrize("choice", [ALONE, WITH_LOSS], ids=["alone", "with the loss"])
def test_num_items_and_labels_that_are_shifted_already(choice: list[str]) -> None:
    model = build("e2b")
    inputs = CASES["unequal counts"](model)
    with exact_float64():
        expected, _ = loss_and_gradients(model, inputs, reference=True)
    count = int((inputs["labels"][:, 1:] != IGNORE).sum())
    shifted = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)
    with patched(model, choice), exact_float64(), Widths(model) as widths:
        divided = model(**inputs, num_items_in_batch=4 * count, use_cache=False).loss
        by_shifted = model(**inputs, shift_labels=shifted, use_cache=False).loss
    assert widths.upper == {11}
    assert relative_error(4 * divided, expected) < EXACT
    assert relative_error(by_shifted, expected) < EXACT


@pytest.mark.parametrize("choice", [ALONE, WITH_LOSS], ids=["alone", "with the loss"])
def test_labels_on_the_cpu_are_read_instead_of_those_on_the_device(choice: list[str]) -> None:
    model = build("e2b")
    inputs = CASES["unequal counts"](model)
    with patched(model, choice):
        expected = model(**inputs, use_cache=False).loss
        host_labels = HostLabels(inputs["labels"].clone())
        inputs["labels"] = torch.zeros_like(inputs["labels"])
        found = model(**inputs, host_labels=host_labels, use_cache=False).loss
    assert torch.equal(found, expected)


def test_token_sums_are_those_of_the_full_model() -> None:
    model = build("e2b")
    inputs = CASES["unequal counts"](model)
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
    targets = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE)
    learned = targets != IGNORE
    log_p = logits[learned].double().log_softmax(-1)
    with patched(model):
        output = model(**inputs, use_cache=False)
    assert output.num_tokens == learned.sum()
    assert output.num_correct == (log_p.argmax(-1) == targets[learned]).sum()
    assert relative_error(output.entropy_sum, -(log_p.exp() * log_p).sum()) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_near_to_float64_as_stock(autocast: bool) -> None:
    exact = build("e2b")
    inputs = CASES["unequal counts"](exact)
    with exact_float64():
        _, expected = loss_and_gradients(exact, inputs, reference=True)
    model = build("e2b", torch.float32 if autocast else torch.bfloat16)

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, gradients = loss_and_gradients(model, inputs)
        joined = [
            torch.cat([g[n].double().flatten() for n in expected]) for g in (gradients, expected)
        ]
        return relative_error(*joined)

    stock = error()
    with patched(model):
        assert error() <= 1.25 * stock + 1e-2


def test_keeps_less_for_the_backward_pass() -> None:
    """Of what the upper half of the layers keeps, the share of the positions that run is left."""
    model = build("e2b", torch.float32, frozen=("",))
    model.get_input_embeddings().weight.requires_grad_()
    inputs = text_rows(model, [200], [list(range(180, 200))])

    def kept(choice: list[str]) -> int:
        with patched(model, choice):
            loss, num_bytes = kept_bytes(lambda: model(**inputs, use_cache=False).loss)
        del loss
        return num_bytes

    full, lean = kept(["linear_cross_entropy"]), kept(WITH_LOSS)
    assert lean < 0.7 * full


@pytest.mark.parametrize("family", ["26b_a4b", "31b"])
def test_a_model_that_shares_nothing_is_not_applicable(family: str) -> None:
    model = build(family)
    (row,) = patches.apply(model, ALONE).rows
    assert (row.status, row.sites) == ("not applicable", ())
    assert "share keys and values" in row.reason


def test_a_deep_copy_has_positions_of_its_own() -> None:
    model = build("e2b")
    inputs = CASES["unequal counts"](model)
    with patched(model):
        expected, gradients = loss_and_gradients(model, inputs)
        found, found_gradients = loss_and_gradients(copy.deepcopy(model), inputs)
    assert torch.equal(found, expected)
    assert all(torch.equal(found_gradients[n], g) for n, g in gradients.items())


def test_lora_layers_learn_the_same() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = r".*language_model\.layers.*\.(q_proj|o_proj|down_proj)"
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    results = []
    for choice in ([], ALONE):
        model = build("e2b", torch.float32)
        inputs = CASES["unequal counts"](model)
        patches.apply(model, choice)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        results.append(loss_and_gradients(model, inputs))
    (stock_loss, stock), (loss, gradients) = results
    assert relative_error(loss, stock_loss) < 1e-6
    assert gradients.keys() == stock.keys()
    for name, gradient in stock.items():
        assert relative_error(gradients[name], gradient) < 1e-4, name


def test_where_positions_are_found() -> None:
    labels = torch.full((3, 8), IGNORE)
    labels[0, [1, 6]] = torch.tensor([11, 16])
    labels[2, 3] = 23
    found = locate(labels, largest_share=0.9)
    assert not isinstance(found, str)
    index = found.index(torch.device("cpu"))
    assert index[0].tolist() == [1, 6]
    assert index[2].tolist() == [3, 3]
    assert found.targets.tolist() == [[11, 16], [IGNORE, IGNORE], [23, IGNORE]]
    values = torch.arange(24).reshape(3, 8)
    assert found.rows(values)[2].tolist() == [19, 19]
    assert found.rows(values[:1])[2].tolist() == [3, 3]
    mask = found.causal_mask(8, 3, torch.device("cpu"))
    assert mask[0, 0].int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0]]


@pytest.mark.parametrize("whole", [False, True], ids=["each layer", "the model"])
def test_compiled_it_learns_the_same(whole: bool) -> None:
    model = build("e2b", torch.float32)
    inputs = CASES["unequal counts"](model)
    expected_loss, expected = loss_and_gradients(model, inputs)
    patches.apply(model, WITH_LOSS)
    if whole:
        compiled = torch.compile(model, backend="aot_eager")
        model.zero_grad()
        loss = compiled(**inputs, use_cache=False).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    else:
        for layer in model.model.language_model.layers:
            layer.compile(backend="aot_eager")
        loss, gradients = loss_and_gradients(model, inputs)
    assert relative_error(loss, expected_loss) < 1e-6
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(gradients[name], gradient) < 1e-4, name
