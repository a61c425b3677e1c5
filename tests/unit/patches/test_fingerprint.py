"""The code for a function: the same for the same computation, another for any other."""

from __future__ import annotations

import functools

import pytest

from gemtune.errors import PatchError
from gemtune.patches.fingerprint import fingerprint, fingerprints_of_file, require_known

MODULE = '''
class Pooler:
    def forward(self, x: Tensor, *, length: int = 3) -> Tensor:
        """Averages."""
        # a comment
        if length > len(x):
            raise ValueError(f"{length} is too long")
        return x.view(length, -1).mean(dim=-1)
'''


def one(source: str) -> str:
    return fingerprints_of_file(source)["Pooler.forward"]


def test_it_is_the_same_in_every_python() -> None:
    # Written down once; Python 3.11, 3.12 and 3.13 agree.
    assert one(MODULE) == "57f637b68b1c"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('        """Averages."""\n', ""),
        ("        # a comment\n", ""),
        (": Tensor", ""),
        (" -> Tensor", ' -> "torch.Tensor"'),
        ("is too long", "is too large"),
        ("    def forward", "    @torch.no_grad()\n    def forward"),
    ],
)
def test_words_types_and_decorators_do_not_count(before: str, after: str) -> None:
    assert before in MODULE
    assert one(MODULE.replace(before, after)) == one(MODULE)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("dim=-1", "dim=-2"),
        ("mean", "sum"),
        ("length: int = 3", "length: int = 4"),
        ("*, length", "length"),
        ("length > len(x)", "length >= len(x)"),
        ("return x.view", "x = x * 2\n        return x.view"),
    ],
)
def test_what_is_computed_counts(before: str, after: str) -> None:
    assert before in MODULE
    assert one(MODULE.replace(before, after)) != one(MODULE)


def computes(x: int) -> int:
    return x + 1


def test_decorators_are_looked_through() -> None:
    @functools.wraps(computes)
    def wrapper(*args: int) -> int:
        return computes(*args)

    assert fingerprint(wrapper) == fingerprint(computes)


def test_an_unknown_function_is_refused_with_the_remedy() -> None:
    require_known("some_patch", computes, [fingerprint(computes)])
    with pytest.raises(PatchError, match=r"some_patch: computes .*patches=\[\.\.\.\]"):
        require_known("some_patch", computes, ["0" * 12])


def test_a_function_without_source_is_refused() -> None:
    namespace: dict = {}
    exec("def computed(x): return x", namespace)
    with pytest.raises(PatchError, match="source is not at hand"):
        require_known("some_patch", namespace["computed"], ["0" * 12])
