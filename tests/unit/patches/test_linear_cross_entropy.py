"""The patch of the model's forward: when it steps in, and what it hands back."""

from __future__ import annotations

import inspect

import pytest
import torch
from gemma4_zoo import batch, build, loss_and_gradients, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemtune import patches
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
