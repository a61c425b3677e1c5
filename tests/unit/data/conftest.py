"""The bundled tokenizer and image processor, the stock processor, and small makers of data."""

from __future__ import annotations

import importlib.resources
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoTokenizer, Gemma4ImageProcessorPil

from gemtune.data import ChatEncoder
from gemtune.data.media.images import ImageEncoder
from gemtune.data.rendering.chat import Rendering


@pytest.fixture(scope="session")
def tiny_dir():
    return Path(str(importlib.resources.files("gemtune"))) / "assets" / "tiny"


@pytest.fixture(scope="session", autouse=True)
def own_datasets_cache(tmp_path_factory):
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is prepared or fetched in these tests is kept for them alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tokenizer(tiny_dir):
    return AutoTokenizer.from_pretrained(tiny_dir)


@pytest.fixture(scope="session")
def tiny_processor(tiny_dir):
    """Does not resize."""
    return Gemma4ImageProcessorPil.from_pretrained(tiny_dir)


@pytest.fixture(scope="session")
def stock_processor():
    """Resizes, 280 soft tokens."""
    return Gemma4ImageProcessorPil()


@pytest.fixture(scope="session")
def stock_processor_class():
    """`Gemma4Processor`; some releases of transformers import torchvision for it."""
    try:
        from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
    except ImportError as error:
        pytest.skip(f"Gemma4Processor cannot be imported: {error}")
    return Gemma4Processor


@pytest.fixture
def make_encoder(tokenizer, tiny_processor):
    def make(
        max_length=4096,
        truncate="none",
        tokenizer=tokenizer,
        root=None,
        processor=None,
        **rendering,
    ):
        images = ImageEncoder(processor or tiny_processor, root)
        return ChatEncoder(
            tokenizer,
            images,
            max_length=max_length,
            truncate=truncate,
            rendering=Rendering(**rendering),
        )

    return make


@pytest.fixture(scope="session")
def make_image():
    """(width, height) -> an RGB image of noise, different for each seed."""

    def make(width=48, height=48, seed=0):
        noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(noise)

    return make


@pytest.fixture(scope="session")
def encode_file():
    """(image, format) -> the bytes of its file."""

    def encode(image, format="PNG", **options):
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def png(make_image, encode_file):
    def make(width=48, height=48, seed=0):
        return encode_file(make_image(width, height, seed))

    return make


@pytest.fixture(scope="session")
def chat():
    """chat("q", "a", "q2", "a2") -> a row; a tuple is (image marks and texts) of one turn."""

    def make(*turns, system=None, images=None):
        messages = [{"role": "system", "content": system}] if system is not None else []
        for number, turn in enumerate(turns):
            if isinstance(turn, tuple):
                turn = [
                    {"type": "image"} if part is None else {"type": "text", "text": part}
                    for part in turn
                ]
            messages.append({"role": ("user", "assistant")[number % 2], "content": turn})
        return {"messages": messages} | ({"images": images} if images is not None else {})

    return make


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def write_parquet(tmp_path):
    def write(rows, name="rows.parquet"):
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)

    return write
