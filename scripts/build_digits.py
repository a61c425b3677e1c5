"""Build the bundled digits data: src/gemtune/assets/digits/{train,heldout}.parquet and README.md.

    python scripts/build_digits.py            # write
    python scripts/build_digits.py --check    # exit 1 if what is on disk says something else

The images are the 1,797 handwritten digits that scikit-learn ships (no download). They are split
by image first and only then put into conversations, so no held-out image is in a training row.
`--check` compares rows and decoded pixels, not bytes: the compressed bytes also depend on the
versions of zlib, Pillow and pyarrow, the content only on this file.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "src" / "gemtune" / "assets" / "digits"
SEED = 1998
HELD_OUT_PER_DIGIT = 36
# 8 source pixels x 12 = 96 = 6 patches of 16 a side, which 3x3 pooling turns into 4 soft tokens.
PIXEL_SCALE = 12

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS = {
    "digit": ("What digit is this?", "Which digit does the image show?", "Read the digit."),
    "word": ("Spell this digit.", "Write the digit as a word."),
    "parity": ("Is this digit even or odd?", "Even or odd?"),
    "pair": ("Read both digits in order.", "Which two digits are these?"),
    "follow_up": ("And this one?", "And what is this digit?"),
}
# Rows beyond one `digit` row for each image.
TRAIN_ROWS = {"word": 600, "parity": 600, "pair": 900, "follow_up": 600}
HELD_OUT_ROWS = {"word": 60, "parity": 60, "pair": 60, "follow_up": 60}

README = """\
# Digits

Short conversations about handwritten digits, for demonstrations and tests of image fine-tuning.

- Source: E. Alpaydin and C. Kaynak (1998), *Optical Recognition of Handwritten Digits*,
  UCI Machine Learning Repository, https://doi.org/10.24432/C50P49 - the 1,797 images of its
  test set, as distributed with scikit-learn (`sklearn.datasets.load_digits`).
- Licence: Creative Commons Attribution 4.0 International (CC BY 4.0),
  https://creativecommons.org/licenses/by/4.0/
- Changes: grey values were scaled from 0-16 to 0-255, each 8x8 image was enlarged to {side}x{side}
  pixels (each source pixel became a {scale}x{scale} square) and stored as PNG, the images were
  split into training and held-out ones, and questions and answers were written around them.

`scripts/build_digits.py` wrote these files; `--check` verifies them.

| file | images | rows | {kinds} |
|---|---|---|{rule}|
{table}

No image of `heldout.parquet` occurs in `train.parquet`. Columns:

- `messages`: turns of `role` and `content`; a content part is `{{type: "image", text: ""}}` or
  `{{type: "text", text: ...}}`.
- `images`: PNG files in the order of the image parts (an `Image` feature for `datasets`).
- `kind`: `digit` ("7"), `word` ("seven"), `parity` ("even" or "odd"), `pair` (two images in one
  turn, "3 and 8"), `follow_up` (a second image asked about after the first answer).
"""


def training_texts() -> list[str]:
    """Every question and answer that the rows can contain, for training a tokenizer."""
    questions = [question for asked in QUESTIONS.values() for question in asked]
    pairs = [f"{first} and {second}" for first in range(10) for second in range(10)]
    return questions + list(WORDS) * 4 + ["even", "odd"] * 4 + pairs


def load_images() -> tuple[list[bytes], list[int]]:
    """PNG bytes and label of each source image, in scikit-learn's order."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pngs = []
    for image in digits.images:
        grey = np.round(image * (255 / 16)).astype(np.uint8)
        square = np.ones((PIXEL_SCALE, PIXEL_SCALE), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(np.kron(grey, square)).save(buffer, format="PNG", optimize=True)
        pngs.append(buffer.getvalue())
    return pngs, [int(label) for label in digits.target]


def split_images(labels: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """(training, held-out) image numbers; each digit is held out equally often."""
    held_out = set()
    for digit in range(10):
        numbers = [number for number, label in enumerate(labels) if label == digit]
        held_out.update(rng.sample(numbers, HELD_OUT_PER_DIGIT))
    training = [number for number in range(len(labels)) if number not in held_out]
    return training, sorted(held_out)


def user_turn(num_images: int, text: str) -> dict:
    parts = [{"type": "image", "text": ""}] * num_images
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant_turn(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def conversation(kind: str, digits: list[int], rng: random.Random) -> list[dict]:
    """The turns of one row about images that show `digits`."""
    question = rng.choice(QUESTIONS[kind])
    if kind == "follow_up":
        first = rng.choice(QUESTIONS["digit"])
        return [
            user_turn(1, first),
            assistant_turn(str(digits[0])),
            user_turn(1, question),
            assistant_turn(str(digits[1])),
        ]
    answers = {
        "digit": str(digits[0]),
        "word": WORDS[digits[0]],
        "parity": ("even", "odd")[digits[0] % 2],
        "pair": " and ".join(map(str, digits)),
    }
    return [user_turn(len(digits), question), assistant_turn(answers[kind])]


def build_rows(
    numbers: list[int], counts: dict[str, int], labels: list[int], rng: random.Random
) -> list[dict]:
    """One `digit` row for each image and `counts` rows of the other kinds, shuffled.

    Images of the other kinds are dealt from shuffled decks, so that each is used about equally
    often.
    """
    chosen = [("digit", [number]) for number in numbers]
    deck: list[int] = []
    for kind, count in counts.items():
        for _ in range(count):
            needed = 2 if kind in ("pair", "follow_up") else 1
            if len(deck) < needed:
                deck = rng.sample(numbers, len(numbers))
            chosen.append((kind, [deck.pop() for _ in range(needed)]))
    rng.shuffle(chosen)
    return [
        {
            "messages": conversation(kind, [labels[number] for number in used], rng),
            "images": used,
            "kind": kind,
        }
        for kind, used in chosen
    ]


def make_table(rows: list[dict], pngs: list[bytes]):
    """The rows as a pyarrow table that `datasets` reads with an Image feature."""
    import pyarrow as pa

    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    message = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    string = {"dtype": "string", "_type": "Value"}
    part_feature = {"type": string, "text": string}
    content_feature = {"feature": part_feature, "_type": "List"}
    features = {
        "messages": {"feature": {"role": string, "content": content_feature}, "_type": "List"},
        "images": {"feature": {"_type": "Image"}, "_type": "List"},
        "kind": string,
    }
    schema = pa.schema(
        [("messages", pa.list_(message)), ("images", pa.list_(image)), ("kind", pa.string())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    with_images = [
        row | {"images": [{"bytes": pngs[n], "path": f"digit-{n:04d}.png"} for n in row["images"]]}
        for row in rows
    ]
    return pa.Table.from_pylist(with_images, schema=schema)


def make_readme(splits: dict[str, list[dict]]) -> str:
    lines = []
    for name, rows in splits.items():
        images = {number for row in rows for number in row["images"]}
        counts = [sum(row["kind"] == kind for row in rows) for kind in QUESTIONS]
        lines.append(
            f"| {name}.parquet | {' | '.join(map(str, [len(images), len(rows), *counts]))} |"
        )
    return README.format(
        side=8 * PIXEL_SCALE,
        scale=PIXEL_SCALE,
        kinds=" | ".join(QUESTIONS),
        rule="|".join("---" for _ in QUESTIONS),
        table="\n".join(lines),
    )


def build() -> tuple[dict, str]:
    """({split name: table}, README text)."""
    rng = random.Random(SEED)
    pngs, labels = load_images()
    training, held_out = split_images(labels, rng)
    splits = {
        "train": build_rows(training, TRAIN_ROWS, labels, rng),
        "heldout": build_rows(held_out, HELD_OUT_ROWS, labels, rng),
    }
    tables = {name: make_table(rows, pngs) for name, rows in splits.items()}
    return tables, make_readme(splits)


def write(tables: dict, readme: str) -> None:
    import pyarrow.parquet as pq

    TARGET.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        # An image is used by several rows; a dictionary page large enough for all of them stores
        # each one once.
        pq.write_table(
            table,
            TARGET / f"{name}.parquet",
            compression="zstd",
            compression_level=19,
            dictionary_pagesize_limit=2**24,
            row_group_size=len(table),
            write_statistics=False,
        )
    (TARGET / "README.md").write_text(readme, encoding="utf-8")


def with_pixels(table) -> list[dict]:
    from PIL import Image

    rows = table.to_pylist()
    for row in rows:
        row["images"] = [
            (image["path"], Image.open(io.BytesIO(image["bytes"])).tobytes())
            for image in row["images"]
        ]
    return rows


def differences(tables: dict, readme: str) -> list[str]:
    """Names of the files on disk that are missing or say something else."""
    import pyarrow.parquet as pq

    wrong = []
    for name, table in tables.items():
        path = TARGET / f"{name}.parquet"
        if not path.exists():
            wrong.append(path.name)
            continue
        found = pq.read_table(path)
        same_features = found.schema.metadata == table.schema.metadata
        if not same_features or with_pixels(found) != with_pixels(table):
            wrong.append(path.name)
    path = TARGET / "README.md"
    if not path.exists() or path.read_text(encoding="utf-8") != readme:
        wrong.append(path.name)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    tables, readme = build()
    if not check:
        write(tables, readme)
        return 0
    wrong = differences(tables, readme)
    for name in wrong:
        print(
            f"{name} differs from what this script builds; run it without --check", file=sys.stderr
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
