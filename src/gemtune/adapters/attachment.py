"""Putting an adapter around a model, and adding it into the weights."""

from __future__ import annotations

import warnings
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemtune.adapters.config import Adapter, Dora, Lora, Qlora, RsLora
from gemtune.adapters.libraries import NF4
from gemtune.adapters.quantization import dequantized, quantize, quantized_linears
from gemtune.adapters.targets import also_trained, find_targets

_CPU = torch.device("cpu")


def attach(model: nn.Module, adapter: Adapter, device: torch.device = _CPU) -> nn.Module:
    """The model with its adapter: peft's wrapper, or the model itself where there is none.

    What the adapter does not name is frozen. An adapter of the embeddings goes to the tied head as
    well, so that the two stay one matrix. Under QLoRA weights are quantised on `device`, and stay.

    Raises:
        ConfigError: a part that is named is not in this model.
    """
    if not isinstance(adapter, Lora):
        return model
    from peft import LoraConfig, get_peft_model

    targets = find_targets(model, adapter.parts)
    if isinstance(adapter, Qlora):
        quantize(model, adapter.quantization, device)
        # For peft, which asks; accelerate would ask for a map of devices.
        vars(model)["is_loaded_in_4bit"] = adapter.quantization == NF4
    full = [model.get_parameter(name) for name in also_trained(model, adapter.also_train)]
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=[name for found in targets for name in found.modules],
        target_parameters=[name for found in targets for name in found.parameters] or None,
        rank_pattern={t.pattern: adapter.ranks[t.part] for t in targets if t.part in adapter.ranks},
        use_rslora=isinstance(adapter, RsLora),
        use_dora=isinstance(adapter, Dora),
        ensure_weight_tying="embeddings" in adapter.parts,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks for it under its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # Ranks of experts are followed all the same; the tied head is merged once, see `merge`.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        # It would merge into few bits; `merge` here does not.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without")
        adapted = get_peft_model(model, config)
    vars(model).pop("is_loaded_in_4bit", None)
    if "embeddings" in adapter.parts:
        _tie(adapted.get_base_model())
    for parameter in full:
        parameter.requires_grad_(True)
    # peft before 0.21 calls the forward of the model inside, past the hooks by which FSDP2 gathers.
    tuner = adapted.base_model
    vars(tuner)["forward"] = MethodType(_call_inside, tuner)
    return adapted


class _Transposed(nn.Module):
    """One factor of the head's update: the other one of the embeddings', turned round."""

    bias = None

    def __init__(self, factors: nn.ParameterDict, name: str) -> None:
        super().__init__()
        vars(self)["_factor"] = (factors, name)  # not a child: it is registered where it belongs

    @property
    def weight(self) -> Tensor:
        factors, name = self._factor
        return factors[name].T

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


def _tie(plain: nn.Module) -> None:
    """Let the head have the embeddings' update itself.

    peft (0.21) gives it parameters of its own in the same memory: neither gets the gradient of the
    other's use, and an optimizer moves that memory twice.
    """
    table, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    for name in list(head.lora_A):
        head.lora_A[name] = _Transposed(table.lora_embedding_B, name)
        head.lora_B[name] = _Transposed(table.lora_embedding_A, name)


def _call_inside(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self.model(*args, **kwargs)


def merge(model: nn.Module) -> nn.Module:
    """The plain model with the adapter added into its weights; a plain model as it is.

    Weights in few bits become what they stand for, in the dtype of the computation and on the CPU,
    before the adapter is added: what was trained is what comes out.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        return model
    plain = model.get_base_model()
    head, table = plain.get_output_embeddings(), plain.get_input_embeddings()
    if isinstance(head, LoraLayer) and isinstance(table, LoraLayer):
        # One matrix: added twice it would have the update twice.
        plain.lm_head = head.get_base_layer()
    _dequantize(plain)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        return model.merge_and_unload()


@torch.no_grad()
def _dequantize(plain: nn.Module) -> None:
    from peft.tuners.lora import LoraLayer

    for name, linear in list(quantized_linears(plain)):
        weight = dequantized(linear)
        dtype, sum_ = weight.dtype, weight.float()
        path = name.removesuffix(".base_layer")
        adapted = plain.get_submodule(path)
        if isinstance(adapted, LoraLayer):
            for each in adapted.active_adapters:
                sum_ += adapted.get_delta_weight(each)
        merged = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter(sum_.to(dtype).cpu(), requires_grad=False)
        merged.bias = linear.bias
        plain.set_submodule(path, merged)
