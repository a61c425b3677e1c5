"""What prepared rows depend on, as one name: another file, template, option or code is another."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

import gemtune
from gemtune.data.rendering.chat import ChatEncoder
from gemtune.data.sources.source import JoinedRows, ReadRows, Source
from gemtune.data.sources.tables import ArrowRows, PlainRows

_END_BYTES = 65_536


def preparation_key(source: Source, encoder: ChatEncoder) -> str | None:
    """A name that is the same only where the same rows come out; None if the source has none."""
    identity = source_identity(source.rows)
    if identity is None:
        return None
    facts = {
        "source": identity,
        "template": encoder.tokenizer.chat_template,
        "tokenizer": tokenizer_digest(encoder.tokenizer),
        "rendering": dataclasses.asdict(encoder.rendering),
        "max_length": encoder.max_length,
        "truncate": encoder.truncate,
        "images": encoder.media.image.processor.to_dict(),
        "videos": None if encoder.media.video is None else encoder.media.video.options,
        "audios": None if encoder.media.audio is None else encoder.media.audio.options,
        "refusals": dict(encoder.media.refusals),
        "media": dataclasses.asdict(encoder.media.image.policy),
        "media_root": str(encoder.media.image.media_root),
        "versions": [gemtune.__version__, jinja2.__version__, tokenizers.__version__],
        "code": code_digest(),
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:32]


def source_identity(rows: ReadRows | JoinedRows) -> Any:
    """What decides the rows of a source: files by path, size, time and their ends; tables by the
    fingerprint that `datasets` gives them; mapping, filter and faults. None if it is not known."""
    if isinstance(rows, JoinedRows):
        several = [source_identity(each) for each in rows.several]
        return None if any(each is None for each in several) else several
    table = rows.table
    content: list[Any] = [table.name]
    file = Path(table.name)
    if file.is_file():
        content.append(_file_identity(file))
    if isinstance(table.rows, PlainRows):
        content.append(table.rows.fingerprint)
    if len(content) == 1 or (isinstance(table.rows, ArrowRows) and not file.is_file()):
        return None
    return [*content, rows.identity()]


def _file_identity(path: Path) -> list[Any]:
    status = path.stat()
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_END_BYTES))
        file.seek(max(0, status.st_size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
    return [os.path.realpath(path), status.st_size, status.st_mtime_ns, digest.hexdigest()]


def tokenizer_digest(tokenizer: Any) -> str:
    """Of everything that decides its ids."""
    text = tokenizer.backend_tokenizer.to_str()
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace"))
    names = [
        getattr(tokenizer, f"{name}_token", None)
        for name in ("boi", "image", "eoi", "bos", "boa", "audio", "eoa")
    ]
    digest.update(repr(names).encode())
    return digest.hexdigest()


@functools.cache
def code_digest() -> str:
    """Of the code in `gemtune.data`: what was prepared by other code may be other rows."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
