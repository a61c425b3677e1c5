"""Show what changed in Gemma 4's modeling code between transformers releases.

    python scripts/fingerprints.py 5.22.2 5.23.0

For every method whose fingerprint (gemtune.patches.fingerprint) differs between two neighbours: the
release and the new one. What a patch replaces must be read again, proven by `make test-matrix
MATRIX=...`, and added to the patch's list. Needs pip and the package index.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gemtune.patches.fingerprint import fingerprints_of_file

MODELING = "transformers/models/gemma4/modeling_gemma4.py"


def modeling_source(release: str) -> str:
    """The module's text in that release, from its wheel."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, f"transformers=={release}"], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return wheel.read(MODELING).decode()


def changes(sources: dict[str, str]) -> list[str]:
    """One line for each method and each release in which it is not what it was before."""
    lines: list[str] = []
    known: dict[str, str] | None = None
    for release, source in sources.items():
        found = fingerprints_of_file(source)
        for method in sorted({*(known or found), *found}):
            if known is not None and found.get(method) != known.get(method):
                lines.append(f"{release:8} {found.get(method, 'gone'):12} {method}")
        known = found
    return lines


def main() -> int:
    """Print the changes; 2 without two releases."""
    releases = sys.argv[1:]
    if len(releases) < 2 or releases[0].startswith("-"):
        print((__doc__ or "").strip())
        return 2
    print("\n".join(changes({release: modeling_source(release) for release in releases})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
