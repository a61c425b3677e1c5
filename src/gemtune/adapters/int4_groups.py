"""How the values of an int4 weight share their scales; needs no library."""

from __future__ import annotations

from gemtune.errors import ConfigError

GROUP = 64
"""Values of a row with one scale and one zero point. It divides the inputs of every linear layer of
every Gemma 4; 128 does not (the dense layers of 26B-A4B have 2,112)."""


def require_groups(name: str, in_features: int) -> None:
    """Raise ConfigError where the inputs of a layer are not whole groups."""
    if in_features % GROUP:
        raise ConfigError(
            f"adapter.quantization=int4: {name} has {in_features} inputs, which are not whole "
            f"groups of {GROUP}. Use adapter.quantization=nf4 or int8."
        )


def int4_bytes(out_features: int, in_features: int, scale_bytes: int) -> int:
    """What a weight takes: half a byte for a value; for a group its scale, and a zero point."""
    return out_features * (in_features // 2 + in_features // GROUP * (scale_bytes + 1))
