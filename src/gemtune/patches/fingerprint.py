"""What a function computes, as a short code, so that only known code is ever replaced.

A patch that stands in for a method of transformers knows the versions of it that were read and
proven equal. A release that computes something else must not be patched silently wrong: its
fingerprint is not in the list, and the patch refuses.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Collection
from typing import Any

from gemtune.errors import PatchError

_DIGITS = 12

# What differs between releases, or between Python's parsers, without a difference in what is
# computed: types, documentation, and the words of an error.
_IGNORED_FIELDS = {
    "annotation",
    "ctx",
    "decorator_list",
    "kind",
    "returns",
    "type_comment",
    "type_params",
}


def fingerprint(function: Any) -> str:
    """12 hexadecimal digits for the body and signature of a Python function, decorators aside.

    Comments, docstrings, annotations, strings built with f"" and what is raised do not count.
    The same in every Python from 3.11 on. OSError where the source is not at hand.
    """
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    return _digest(ast.parse(source).body[0])


def fingerprints_of_file(source: str) -> dict[str, str]:
    """ "Class.method" -> fingerprint for every method in the text of a module."""
    return {
        f"{outer.name}.{inner.name}": _digest(inner)
        for outer in ast.parse(source).body
        if isinstance(outer, ast.ClassDef)
        for inner in outer.body
        if isinstance(inner, ast.FunctionDef)
    }


def require_known(patch: str, function: Any, known: Collection[str]) -> None:
    """PatchError unless `function` is one of the versions that the patch was proven against."""
    try:
        found = fingerprint(function)
    except OSError:
        found = "none: its source is not at hand"
    if found not in known:
        import transformers

        raise PatchError(
            f"{patch}: {function.__qualname__} of transformers {transformers.__version__} is not "
            f"one of the versions that this patch was proven against (fingerprint {found}), so "
            f"nothing was changed. Leave {patch} out of patches=[...], or use a transformers "
            "release that gemtune is tested with, and report it."
        )


def _digest(function: ast.AST) -> str:
    return hashlib.sha256(_describe(function).encode()).hexdigest()[:_DIGITS]


def _describe(node: Any) -> str:
    if isinstance(node, list):
        return "[" + ",".join(map(_describe, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    name = type(node).__name__
    if isinstance(node, ast.JoinedStr | ast.Raise):
        return name
    fields = [
        (field, getattr(node, field, None))
        for field in node._fields
        if field not in _IGNORED_FIELDS
    ]
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
        fields = [(f, value[1:] if f == "body" else value) for f, value in fields]
    # An absent field is None or [], depending on the Python release.
    told = [f"{field}={_describe(value)}" for field, value in fields if value not in (None, [])]
    return f"{name}({','.join(told)})"
