"""The patch of the model's forward: when it steps in, and what it hands back."""

from __future__ import annotations

import inspect

import pytest
import torch
from gemma4_zoo import batch, build, cast, exact_float64, loss_and_gradients, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.losses import HostLabels
from gemtune.patches.linear_cross_entropy import LinearCrossEntropy


@pytest.fixture
def model():
    model = build("e2b")
    patches.apply(model, ["linear_cross_entropy"])
    return model


def test_training_with_labels_has_no_logits(model) -> None:
    output = model(**batch(model), use_cache=False)
    assert output.logits is None
    assert output.loss.requires_grad


def test_evaluation_keeps_logits_unless_told_otherwise(model) -> None:
    model.eval()
    inputs = batch(model)
    with torch.no_grad():
        stock = model(**inputs)
        lean = model(**inputs, skip_logits=True)
    assert stock.logits is not None
    assert lean.logits is None
    assert relative_error(lean.loss, stock.loss) < 1e-6  # the stock loss is float32 inside


def test_without_labels_the_stock_forward_runs(model) -> None:
    inputs = batch(model)
    del inputs["labels"]
    assert model(**inputs).logits is not None
    assert model(**inputs, logits_to_keep=1).logits.shape[1] == 1


def test_positional_arguments_mean_what_they_mean_upstream(model) -> None:
    inputs = batch(model, (0, 0))
    by_name = model(**inputs, use_cache=False).loss
    ids = inputs.pop("input_ids")
    assert torch.equal(model(ids, **inputs, use_cache=False).loss, by_name)


def test_num_items_in_batch_divides_the_sum(model) -> None:
    inputs = batch(model)
    count = int((inputs["labels"][:, 1:] != -100).sum())
    mean = model(**inputs, use_cache=False).loss
    split = model(**inputs, use_cache=False, num_items_in_batch=4 * count).loss
    assert relative_error(split * 4, mean) < 1e-12


def test_the_signature_is_the_stock_one(model) -> None:
    # transformers' Trainer drops every column that it does not find here.
    assert inspect.signature(model.forward) == inspect.signature(build("e2b").forward)


def test_a_tuple_is_returned_where_asked(model) -> None:
    loss = model(**batch(model), use_cache=False, return_dict=False)[0]
    assert loss.dim() == 0


def test_the_chunk_budget_is_kept() -> None:
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                # weight.T has as many columns as the logits, and hidden_size rows.
                if isinstance(tensor, torch.Tensor) and tensor.shape[1:] == (vocabulary,):
                    rows = tensor.shape[0]
                    self.rows = max(self.rows, rows if rows != hidden_size else 0)
            return result

    model = build("e2b")
    vocabulary, hidden_size = model.lm_head.weight.shape
    model.lm_head.weight = nn.Parameter(
        model.lm_head.weight.detach().repeat(400, 1)
    )  # 640 * 400 * 8 bytes: one row of logits is 2 MB
    vocabulary *= 400
    patches.apply(model, [LinearCrossEntropy(chunk_mib=10)])
    inputs = batch(model)
    num_supervised = int((inputs["labels"][:, 1:] != -100).sum())
    with Largest() as largest:
        model(**inputs, use_cache=False).loss.backward()
    assert 0 < largest.rows * vocabulary * 8 <= 10 * 2**20
    assert num_supervised > largest.rows  # so the budget did decide


def test_any_other_class_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Gemma4ForConditionalGeneration.*not Linear"):
        patches.apply(nn.Linear(2, 2), ["linear_cross_entropy"])


def test_the_text_model_alone_is_patched_too() -> None:
    from transformers import Gemma4ForCausalLM

    torch.manual_seed(0)
    model = Gemma4ForCausalLM(build("e2b").config.text_config).double().train()
    inputs = batch(build("e2b"), (0, 0))
    del inputs["mm_token_type_ids"]
    expected, _ = loss_and_gradients(model, inputs, reference=True)
    patches.apply(model, ["linear_cross_entropy"])
    output = model(**inputs, use_cache=False)
    assert output.logits is None
    assert relative_error(output.loss, expected) < 1e-10


def head_lora(model, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False, **options)
    torch.manual_seed(1)
    return cast(peft.get_peft_model(model, config), torch.float64)


@pytest.mark.parametrize("choice", [["linear_cross_entropy"], ["supervised_positions"]])
@pytest.mark.parametrize("state", ["one", "two", "disabled", "merged"])
def test_lora_on_the_head_is_learned(choice, state) -> None:
    results = []
    for names in ([], choice):
        model = build("e2b")
        inputs = batch(model)
        patches.apply(model, names)
        model = head_lora(model, lora_alpha=7)
        if state == "two":
            model.add_adapter("other", model.peft_config["default"])
            model.base_model.set_adapter(["default", "other"])
            cast(model, torch.float64)
        elif state == "disabled":
            model.disable_adapter_layers()
            model.get_base_model().lm_head.base_layer.weight.requires_grad_()
        elif state == "merged":
            model.merge_adapter()
            model.get_base_model().lm_head.base_layer.weight.requires_grad_()
        with exact_float64():
            results.append(loss_and_gradients(model, inputs, reference=not names))
    (expected_loss, expected), (loss, gradients) = results
    assert relative_error(loss, expected_loss) < 1e-10
    assert gradients.keys() == expected.keys() and gradients
    for name, gradient in expected.items():
        assert relative_error(gradients[name], gradient) < 1e-10, name


def test_a_head_trained_as_a_whole_is_read(model) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    inputs = batch(model)
    targets = r".*language_model\.layers\.0\.mlp\.up_proj"
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["lm_head"])
    adapted = cast(peft.get_peft_model(model, config), torch.float64)
    (copied,) = [p for n, p in adapted.named_parameters() if "lm_head.modules_to_save" in n]
    before = adapted(**inputs, use_cache=False).loss
    before.backward()
    assert copied.grad is not None
    with torch.no_grad():
        copied.mul_(1.5)
    changed = adapted(**inputs, use_cache=False).loss
    with exact_float64():
        expected, _ = loss_and_gradients(adapted, inputs, reference=True)
    assert relative_error(changed, expected) < 1e-6
    assert relative_error(changed, before) > 1e-3


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_no_sum_of_products_is_refused(model, options) -> None:
    inputs = batch(model)
    adapted = head_lora(model, **options)
    with pytest.raises(PatchError, match=r"lm_head is adapted by.*LoRA.*supervised_positions"):
        adapted(**inputs, use_cache=False)


def test_another_kind_of_head_is_refused(model) -> None:
    inputs = batch(model)
    hidden_size = model.lm_head.in_features
    model.lm_head = nn.Linear(hidden_size, 640, bias=True, dtype=torch.float64)
    with pytest.raises(PatchError, match=r"lm_head is a Linear with bias"):
        model(**inputs, use_cache=False)
    model.lm_head = nn.Sequential(nn.Linear(hidden_size, 640))
    with pytest.raises(PatchError, match=r"lm_head is a Sequential"):
        model(**inputs, use_cache=False)


def test_token_sums_come_with_the_loss(model) -> None:
    inputs = batch(model)
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
    targets = inputs["labels"][:, 1:]
    predicted = logits[:, :-1].argmax(-1)
    output = model(**inputs, use_cache=False)
    assert output.num_tokens == (targets != -100).sum()
    assert output.num_correct == (predicted == targets).sum()


def test_loss_only_evaluation_needs_no_word_with_each_call() -> None:
    model = build("e2b").eval()
    inputs = batch(model)
    patches.apply(model, [LinearCrossEntropy(loss_only_evaluation=True)])
    with torch.no_grad():
        assert model(**inputs).logits is None
        assert model(**inputs, skip_logits=False).logits is not None


def test_labels_on_the_cpu_are_read_instead_of_those_on_the_device(model) -> None:
    inputs = batch(model)
    expected = model(**inputs, use_cache=False).loss
    host_labels = HostLabels(inputs["labels"].clone())
    inputs["labels"] = torch.zeros_like(inputs["labels"])
    assert torch.equal(model(**inputs, host_labels=host_labels, use_cache=False).loss, expected)
