"""Fail when a Python file is over 400 lines, or a function over 60 without its docstring."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def docstring_lines(function: ast.FunctionDef) -> int:
    """How many lines the docstring takes."""
    docstring = ast.get_docstring(function, clean=False)
    return 0 if docstring is None else docstring.count("\n") + 1


def main() -> int:
    """Print every offender; 1 if there is one."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    too_long = []
    for path in map(Path, sorted(listed.stdout.split())):
        if not path.exists():
            continue
        source = path.read_text(encoding="utf-8")
        num_lines = source.count("\n")
        if num_lines > MAX_FILE_LINES:
            too_long.append(f"{path}: {num_lines} lines, at most {MAX_FILE_LINES}")
        if path.parts[0] == "tests":
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1 - docstring_lines(node)
                if length > MAX_FUNCTION_LINES:
                    too_long.append(
                        f"{path}:{node.lineno} {node.name}: {length} lines, "
                        f"at most {MAX_FUNCTION_LINES}"
                    )
    print("\n".join(too_long) or "file and function lengths: good")
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
