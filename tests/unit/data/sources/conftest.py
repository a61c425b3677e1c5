"""Files that hold what a test writes."""

import pytest


@pytest.fixture
def jsonl(tmp_path):
    def write(content):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content)
        return str(path)

    return write
