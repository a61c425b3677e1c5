"""The two ways of differentiating a linear cross-entropy: gradients now, or logits again later."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gemtune.losses.supervision import has_values
from gemtune.losses.tiles import Product, Settings, score

NO_SECOND_DERIVATIVE = (
    "linear_cross_entropy has no second derivative: its gradients are made without a graph. "
    "Compute the loss from the logits where create_graph=True is needed."
)


def products_of(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Product]:
    """(rows, weight) of the head, then of a LoRA on it (None, None: there is none)."""
    pairs = zip(tensors[0::2], tensors[1::2], needs[0::2], needs[1::2], strict=True)
    return [Product(*pair) for pair in pairs if pair[0] is not None]


def take_gradients(ctx) -> list[Tensor | None]:
    """Release the gradients that forward left; RuntimeError for all but one plain backward."""
    if torch.is_grad_enabled():
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    if ctx.gradients is None:
        raise RuntimeError(
            "linear_cross_entropy: second backward through one loss; its gradients are released at "
            "the first, to free their memory. Call linear_cross_entropy again, add losses before "
            "backward, or use reduction='none' with retain_graph=True."
        )
    gradients, ctx.gradients = ctx.gradients, None
    return gradients


class ReducedLoss(torch.autograd.Function):
    """scale * sum of losses; gradients are made in forward and given away in backward."""

    @staticmethod
    def forward(ctx, rows, weight, low_rows, low_weight, targets, scale, settings, recording):
        # A weight of 1 / num_items would push float16 gradients of logits below the smallest
        # float16, so there it is applied at the end.
        late = settings.matmul_dtype == torch.float16
        row_scale = torch.ones_like(scale) if late else scale
        tensors = (rows, weight, low_rows, low_weight)
        needs = ctx.needs_input_grad[:4] if recording else (False,) * 4
        with torch.autocast(rows.device.type, enabled=False):
            scores = score(products_of(tensors, needs), targets, row_scale, settings)
        missing = [None] * (4 - len(scores.gradients))
        ctx.gradients = [*scores.gradients, *missing]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.late_scale = scale if late else None
        ctx.mark_non_differentiable(*scores.sums)
        return scores.losses_N.sum() * scale, *scores.sums

    @staticmethod
    def backward(ctx, grad_loss, *_):
        gradients = take_gradients(ctx)
        factor = grad_loss if ctx.late_scale is None else grad_loss * ctx.late_scale
        # Only the CPU can read the factor without waiting; elsewhere the multiplication is cheaper.
        if factor.device.type == "cpu" and has_values(factor) and factor.item() == 1.0:
            factor = None
        finished = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            if gradient is not None:
                gradient = gradient if factor is None else gradient.mul_(factor)
                gradient = gradient.to(dtype)
            finished.append(gradient)
        return *finished, None, None, None, None


class PerTokenLoss(torch.autograd.Function):
    """One loss per row; backward scores the rows again, weighted by the upstream gradient."""

    @staticmethod
    def forward(ctx, rows, weight, low_rows, low_weight, targets, settings):
        ctx.settings = settings
        ctx.save_for_backward(rows, weight, low_rows, low_weight, targets)
        products = products_of((rows, weight, low_rows, low_weight), (False,) * 4)
        with torch.autocast(rows.device.type, enabled=False):
            scores = score(products, targets, torch.ones((), device=rows.device), settings)
        ctx.mark_non_differentiable(*scores.sums)
        return scores.losses_N, *scores.sums

    @staticmethod
    def backward(ctx, grad_losses, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        *tensors, targets = ctx.saved_tensors
        settings: Settings = ctx.settings._replace(metrics=False)
        products = products_of(tensors, ctx.needs_input_grad[:4])
        with torch.autocast(grad_losses.device.type, enabled=False):
            gradients = score(products, targets, grad_losses, settings).gradients
        gradients += [None] * (4 - len(gradients))
        finished = [
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, tensors, strict=True)
        ]
        return *finished, None, None
