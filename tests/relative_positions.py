"""Algorithm 3 of AlphaFold3 written out with one-hots, as a module that the patch looks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

R_MAX, S_MAX, C_Z = 4, 2, 6
Features = dict[str, torch.Tensor]


def one_hots(features: Features, r_max: int, s_max: int) -> torch.Tensor:
    """[..., N, N, 4 r_max + 2 s_max + 7], int64: algorithm 3, lines 1 to 10."""

    def pairs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return features[name].unsqueeze(-1), features[name].unsqueeze(-2)

    def same(name: str) -> torch.Tensor:
        return torch.eq(*pairs(name))

    def binned(name: str, limit: int, counts: torch.Tensor) -> torch.Tensor:
        i, j = pairs(name)
        clipped = (i - j).clamp(-limit, limit) + limit
        return F.one_hot(torch.where(counts, clipped, 2 * limit + 1).long(), 2 * limit + 2)

    same_chain, same_entity = same("asym_id"), same("entity_id")
    parts = [
        binned("residue_index", r_max, same_chain),
        binned("token_index", r_max, same_chain & same("residue_index")),
        same_entity.long().unsqueeze(-1),
        binned("sym_id", s_max, same_entity),
    ]
    return torch.cat(parts, dim=-1)


class _Encoding(nn.Module):
    def __init__(self, r_max: int = R_MAX, s_max: int = S_MAX, c_z: int = C_Z) -> None:
        super().__init__()
        self.r_max, self.s_max, self.c_z = r_max, s_max, c_z
        self.linear_no_bias = nn.Linear(4 * r_max + 2 * s_max + 7, c_z, bias=False)


def encoding_class(forward: Callable[..., Any]) -> type[nn.Module]:
    """A class of the name that the patch looks for."""
    return type("RelativePositionEncoding", (_Encoding,), {"forward": forward})


def one_hot_forward(self: Any, input_feature_dict: Features) -> torch.Tensor:
    found = one_hots(input_feature_dict, self.r_max, self.s_max)
    return self.linear_no_bias(found.float())


def make(forward: Callable[..., Any] = one_hot_forward, **sizes: int) -> Any:
    torch.manual_seed(0)
    return encoding_class(forward)(**sizes)


def features(num_tokens: int, batch: tuple[int, ...] = (), seed: int = 0) -> Features:
    """Chains of residues of one to three tokens; entities in several copies; long distances."""
    new = torch.Generator().manual_seed(seed)
    shape = (*batch, num_tokens)
    chain = torch.randint(4, shape, generator=new).sort(dim=-1).values
    residue = torch.randint(2, shape, generator=new).cumsum(-1)
    return {
        "asym_id": chain,
        "entity_id": chain // 2,
        "sym_id": chain % 2 + 3 * (chain == 3),
        "residue_index": residue,
        "token_index": torch.arange(num_tokens).expand(shape),
    }
