"""What stock transformers, and peft, make of an exported folder; run in a process of its own.

    python -P stock_reader.py REQUEST_FOLDER

gemtune cannot be imported in it. `verification.py` writes `request.json` and `request.safetensors`
there and reads `answer.json` and `answer.safetensors`. Its functions are the exporting process'
too, so that both sides compute alike.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a mixture of experts, from the first layer on; none of a dense model."""
    return [module for name, module in model.named_modules() if name.endswith(".router")]


@contextmanager
def routed(
    model: nn.Module, routes: list[torch.Tensor] | None, *, evenly: bool = False
) -> Iterator[list[torch.Tensor]]:
    """Send tokens to the experts of `routes`, [T, K] for each layer; None: as the model chooses.

    Rounding decides between experts of almost one score, and then the logits jump: two models can
    only be compared where they choose alike. The weights of the experts stay the model's own, or
    are equal (`evenly`). Yields what was chosen, layer by layer.
    """
    chosen: list[torch.Tensor] = []

    def send(module: Any, _: Any, output: Any) -> Any:
        probabilities, weights, index = output
        if routes is not None:
            index = routes[len(chosen)]
            weights = probabilities.gather(-1, index)
            weights = weights / weights.sum(dim=-1, keepdim=True)
            weights = weights * module.per_expert_scale[index]
            if evenly:
                weights = torch.full_like(weights, 1 / index.shape[-1])
        chosen.append(index)
        return probabilities, weights, index

    handles = [router.register_forward_hook(send) for router in routers(model)]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits_of(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[S, V] float32 logits of one row."""
    return model(**inputs, use_cache=False).logits[0].float()


def digests(model: nn.Module, part: str = "") -> dict[str, str]:
    """Name -> SHA-256 of the float32 values, of what `state_dict` has with `part` in its name."""
    return {
        name: hashlib.sha256(value.detach().float().contiguous().numpy().data).hexdigest()
        for name, value in model.state_dict().items()
        if part in name
    }


def rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """Ids of a conversation by the tokenizer's template."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def patches_of(image_processor: Any, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    """pixel_values [1, P, D] and image_position_ids [1, P, 2] of [H, W, 3] bytes."""
    features = image_processor(Image.fromarray(pixels), return_tensors="np")
    names = ("pixel_values", "image_position_ids")
    return {name: torch.from_numpy(np.asarray(features[name])) for name in names}


def load_stock(request: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The model in float32 as transformers and peft load it, and what they miss in the folder."""
    from transformers import Gemma4ForConditionalGeneration

    folder, base = request["folder"], request["base"]
    where = {"pretrained_model_name_or_path": folder} if base is None else base["where"]
    model, found = Gemma4ForConditionalGeneration.from_pretrained(
        **where, dtype=torch.float32, output_loading_info=True
    )
    problems = [f"{kind}: {sorted(map(str, keys))[:3]}" for kind, keys in found.items() if keys]
    if base is not None:
        from peft import PeftModel

        for value in model.state_dict().values():  # as it was below the adapter in training
            if value.is_floating_point():
                value.copy_(value.to(getattr(torch, base["dtype"])))
        model = PeftModel.from_pretrained(model, folder)
    return model.eval(), problems


def answer(request: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Digests and logits of every pass of the request."""
    from transformers import AutoTokenizer
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    torch.set_num_threads(request["num_threads"])
    folder = request["folder"]
    ids = rendered(AutoTokenizer.from_pretrained(folder), request["messages"])
    logits = {}
    if "image" in tensors:
        processor = Gemma4ImageProcessorPil.from_pretrained(folder)
        found = patches_of(processor, tensors["image"].numpy())
        logits |= {f"patches|{name}": value for name, value in found.items()}
    model, problems = load_stock(request)
    for each in request["passes"]:
        prefix = f"{each['name']}|"
        mine = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        routes = [mine.pop(f"route{i}") for i in range(len(routers(model)))] or None
        with routed(model, routes, evenly=each["evenly"]):
            logits[f"logits|{each['name']}"] = logits_of(model, mine)
    kind = "" if request["base"] is None else "lora_"
    return {"problems": problems, "ids": ids, "digests": digests(model, kind), "logits": logits}


def main() -> int:
    sys.modules["gemtune"] = None  # type: ignore[assignment]  # importing it is an error
    place = Path(sys.argv[1])
    request = json.loads((place / "request.json").read_text())
    found = answer(request, load_file(place / "request.safetensors"))
    save_file(
        {n: t.contiguous() for n, t in found.pop("logits").items()}, place / "answer.safetensors"
    )
    (place / "answer.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
