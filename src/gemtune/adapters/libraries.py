"""What weights in few bits need, asked before anything is read."""

from __future__ import annotations

import importlib.util

from gemtune.errors import ConfigError

NF4, INT4, INT8 = "nf4", "int4", "int8"
_LIBRARIES = {
    NF4: ("bitsandbytes", "nf4"),
    INT4: ("torchao", "quant"),
    INT8: ("torchao", "quant"),
}


def in_words(kind: str) -> str:
    """`4 bits (nf4, bitsandbytes)`."""
    return f"{kind.removeprefix('nf').removeprefix('int')} bits ({kind}, {_LIBRARIES[kind][0]})"


def is_installed(kind: str) -> bool:
    """Whether the library of this kind is there. Imports nothing."""
    return importlib.util.find_spec(_LIBRARIES[kind][0]) is not None


def require_library(kind: str) -> None:
    """Raise ConfigError where the library of this kind is not installed. Imports nothing."""
    library, extra = _LIBRARIES[kind]
    if not is_installed(kind):
        raise ConfigError(
            f"adapter.quantization={kind} needs {library}, which is not installed: "
            f"pip install 'gemtune[{extra}]'. To train without it: adapter=lora."
        )


def unusable(kind: str, error: ImportError) -> ConfigError:
    """For a library that is there, and is not what it should be."""
    library, extra = _LIBRARIES[kind]
    return ConfigError(
        f"adapter.quantization={kind}: this {library} cannot be used: {error}. Install the one "
        f"that was tried: pip install 'gemtune[{extra}]'. To train without it: adapter=lora."
    )
