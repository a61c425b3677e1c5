"""What is rendered, what is learned, and what is refused."""

import copy

import numpy as np
import pytest

from gemtune.errors import DataError

EMPTY_THOUGHT = "<|channel>thought\n<channel|>"


@pytest.fixture
def with_template(tokenizer):
    """edit(old, new) -> the tokenizer with its template changed in one place."""

    def edit(old, new):
        assert old in tokenizer.chat_template
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = tokenizer.chat_template.replace(old, new)
        return changed

    return edit


@pytest.fixture
def with_thoughts(with_template):
    """As the larger sizes: an answer is asked for after an empty thought, which is not kept."""
    return with_template(
        "{{- '<|turn>model\\n' -}}", f"{{{{- '<|turn>model\n{EMPTY_THOUGHT}' -}}}}"
    )


def images_as_text(num_soft_tokens):
    return "<|image>" + "<|image|>" * num_soft_tokens + "<image|>"


def learned(tokenizer, example):
    """The learned text, a `|` between runs that do not touch."""
    runs, previous = [], None
    for place in np.flatnonzero(example.labels != -100):
        assert example.labels[place] == example.input_ids[place]
        if previous is None or place != previous + 1:
            runs.append([])
        runs[-1].append(int(example.labels[place]))
        previous = place
    return [tokenizer.decode(run) for run in runs]


def check(tokenizer, example, text, answers):
    """The ids are those of `text`, and exactly the answers are learned."""
    assert example.input_ids.tolist() == tokenizer.encode(text, add_special_tokens=False)
    assert learned(tokenizer, example) == answers
    assert tokenizer.decode(example.input_ids) == text


# Rendering and labels


def test_one_turn(tokenizer, make_encoder, chat):
    example = make_encoder().encode(chat("What is it?", "A cat."), "row 1")
    text = "<bos><|turn>user\nWhat is it?<turn|>\n<|turn>model\nA cat.<turn|>\n"
    check(tokenizer, example, text, ["A cat.<turn|>"])
    assert example.where == "row 1" and example.images == []


def test_system_and_several_turns(tokenizer, make_encoder, chat):
    row = chat("One?", "1", "Two?", "2 and\n\nmore", "Thanks.", system="Be brief.")
    example = make_encoder().encode(row, "")
    text = (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nOne?<turn|>\n<|turn>model\n1<turn|>\n"
        "<|turn>user\nTwo?<turn|>\n<|turn>model\n2 and\n\nmore<turn|>\n"
        "<|turn>user\nThanks.<turn|>\n"
    )
    check(tokenizer, example, text, ["1<turn|>", "2 and\n\nmore<turn|>"])


@pytest.mark.parametrize(
    "answer",
    ["model", "model\nA", "I said: user", "<turn", "<", "a<b>|", "x " * 50 + "x", "0", "."],
)
def test_answers_that_look_like_something_else(tokenizer, make_encoder, chat, answer):
    text = f"<bos><|turn>user\nmodel\n<turn|>\n<|turn>model\n{answer}<turn|>\n"
    text = text.replace("model\n<turn|>", "model<turn|>")  # the template trims
    example = make_encoder().encode(chat("model\n", answer), "")
    check(tokenizer, example, text, [answer + "<turn|>"])


@pytest.mark.parametrize(
    "answer", ["é", "日本語", "👩‍👩‍👧", "a\u0301 ß \U0001d518", "\u200bx\u200b", "\ufeffx"]
)
def test_characters_of_several_tokens_are_learned_whole(tokenizer, make_encoder, chat, answer):
    example = make_encoder().encode(chat("日本é", answer, "👧", answer), "")
    turns = "<|turn>user\n{}<turn|>\n<|turn>model\n" + answer + "<turn|>\n"
    text = "<bos>" + turns.format("日本é") + turns.format("👧")
    check(tokenizer, example, text, [answer + "<turn|>"] * 2)


def test_spaces_around_an_answer_are_trimmed_as_the_template_does(tokenizer, make_encoder, chat):
    example = make_encoder().encode(chat("  hi\n", "\n\n  A cat. \n"), "")
    text = "<bos><|turn>user\nhi<turn|>\n<|turn>model\nA cat.<turn|>\n"
    check(tokenizer, example, text, ["A cat.<turn|>"])


@pytest.mark.parametrize("merged", ["\n\n", "\n1"])
def test_no_token_reaches_into_an_answer(tokenizer, make_encoder, with_template, chat, merged):
    """A template that does not trim, and a vocabulary that joins the edge of the answer."""
    untrimmed = with_template("message.content | trim", "message.content")
    joined = _with_token(untrimmed, merged)
    answer = merged[1:] + "3"
    assert len(joined.encode(merged, add_special_tokens=False)) == 1
    encoder = make_encoder(tokenizer=joined)
    row = chat("hi", answer)
    example = encoder.encode(row, "")
    assert learned(joined, example) == [answer + "<turn|>"]
    prompt, _ = encoder.encode_prompt(row, "")
    assert example.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()


def _with_token(tokenizer, text):
    """A copy whose vocabulary has the two characters of `text` as one token."""
    import json

    from tokenizers import Tokenizer

    changed = copy.deepcopy(tokenizer)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["vocab"] = {k: v for k, v in spec["model"]["vocab"].items() if v != 639}
    for character in text:
        assert character in spec["model"]["vocab"]
    spec["model"]["vocab"][text] = 639
    gone = {k for k, v in tokenizer.get_vocab().items() if v == 639}
    merges = [m for m in spec["model"]["merges"] if "".join(m) not in gone and not gone & set(m)]
    spec["model"]["merges"] = [list(text), *merges]
    changed._tokenizer = Tokenizer.from_str(json.dumps(spec))
    return changed


def test_content_as_text_or_as_parts_is_the_same(make_encoder, chat):
    encoder = make_encoder()
    texts = encoder.encode(chat("hi there", "yes", system="s"), "")
    parts = encoder.encode(
        chat(("hi there",), ("yes",), system=[{"type": "text", "text": "s"}]), ""
    )
    assert texts.input_ids.tolist() == parts.input_ids.tolist()
    assert texts.labels.tolist() == parts.labels.tolist()


def test_images_expand_to_their_soft_tokens(tokenizer, make_encoder, chat, png):
    row = chat(
        (None, "Read", None), "3 and 8", ("And", None), "5",
        images=[png(48, 48, 1), png(96, 144, 2), png(48, 96, 3)],
    )  # fmt: skip
    example = make_encoder().encode(row, "")
    text = (
        f"<bos><|turn>user\n{images_as_text(1)}Read{images_as_text(6)}<turn|>\n"
        f"<|turn>model\n3 and 8<turn|>\n<|turn>user\nAnd{images_as_text(2)}<turn|>\n"
        "<|turn>model\n5<turn|>\n"
    )
    check(tokenizer, example, text, ["3 and 8<turn|>", "5<turn|>"])
    assert [len(image.pixels) for image in example.images] == [9, 54, 18]


def test_images_keep_their_order(make_encoder, make_image, chat):
    """Inline ones stand where they are; the others fill the open places in turn."""
    one, two, three = (make_image(48, 48, seed) for seed in (1, 2, 3))
    row = chat((None, None), "a", (None, None), "b", images=[one, three])
    row["messages"][0]["content"][1]["image"] = two
    row["messages"][2]["content"][0]["image"] = two
    example = make_encoder().encode(row, "")
    encoder = make_encoder().media.image
    expected = [encoder.encode(image, "").pixels for image in (one, two, two, three)]
    for found, pixels in zip(example.images, expected, strict=True):
        np.testing.assert_array_equal(found.pixels, pixels)


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_an_inline_image(tokenizer, make_encoder, chat, png, tmp_path, key):
    (tmp_path / "a.png").write_bytes(png(96, 48))
    row = chat((None, "?"), "b")
    row["messages"][0]["content"][0][key] = "a.png"
    example = make_encoder(root=tmp_path).encode(row, "")
    text = f"<bos><|turn>user\n{images_as_text(2)}?<turn|>\n<|turn>model\nb<turn|>\n"
    check(tokenizer, example, text, ["b<turn|>"])


def test_fields_that_parquet_filled_with_null(tokenizer, make_encoder, png):
    empty = {"text": None, "image": None, "path": None, "url": None}
    row = {
        "messages": [
            {
                "role": "user",
                "content": [empty | {"type": "image"}, empty | {"type": "text", "text": "?"}],
                "tool_calls": None,
                "reasoning": None,
            },
            {"role": "assistant", "content": [empty | {"type": "text", "text": "b"}], "name": None},
        ],
        "images": [{"bytes": png(), "path": None}],
        "tools": None,
    }
    text = f"<bos><|turn>user\n{images_as_text(1)}?<turn|>\n<|turn>model\nb<turn|>\n"
    check(tokenizer, make_encoder().encode(row, ""), text, ["b<turn|>"])
    del row["messages"][0]["content"][0], row["images"]
    make_encoder().encode(row | {"images": None}, "")


def test_encoding_leaves_the_row_as_it_was(make_encoder, chat, png):
    row = chat((None, "?"), "b", images=[png()])
    row["messages"][0]["content"].append({"type": "image", "image": png()})
    before = copy.deepcopy(row)
    make_encoder().encode(row, "")
    assert row == before


# The empty thought of the larger sizes


def test_the_last_answer_follows_an_empty_thought_that_is_not_learned(
    tokenizer, make_encoder, with_thoughts, chat, png
):
    encoder = make_encoder(tokenizer=with_thoughts)
    row = chat((None, "One?"), "1", "Two?", "2", images=[png()])
    example = encoder.encode(row, "")
    text = (
        f"<bos><|turn>user\n{images_as_text(1)}One?<turn|>\n<|turn>model\n1<turn|>\n<|turn>user\n"
        f"Two?<turn|>\n<|turn>model\n{EMPTY_THOUGHT}2<turn|>\n"
    )
    check(tokenizer, example, text, ["1<turn|>", "2<turn|>"])
    prompt, reference = encoder.encode_prompt(row, "")
    assert reference == "2"
    assert tokenizer.decode(prompt.input_ids) == text.removesuffix("2<turn|>\n")
    assert example.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()


def test_a_template_that_keeps_the_empty_thought(tokenizer, make_encoder, with_template, chat):
    """It is neither put in twice nor learned."""
    keeps = with_template(
        "('model' if message.role == 'assistant' else message.role) ~ '\\n'",
        "('model\\n<|channel>thought\\n<channel|>' if message.role == 'assistant'"
        " else message.role ~ '\\n')",
    )
    keeps.chat_template = keeps.chat_template.replace(
        "{{- '<|turn>model\\n' -}}", f"{{{{- '<|turn>model\n{EMPTY_THOUGHT}' -}}}}"
    )
    example = make_encoder(tokenizer=keeps).encode(chat("a", "1", "b", "2"), "")
    turns = f"<|turn>user\n%s<turn|>\n<|turn>model\n{EMPTY_THOUGHT}%s<turn|>\n"
    text = "<bos>" + turns % ("a", "1") + turns % ("b", "2")
    check(tokenizer, example, text, ["1<turn|>", "2<turn|>"])


# Templates that cannot be used


def test_a_template_of_another_model(make_encoder, with_template):
    with pytest.raises(DataError, match="not a Gemma 4 template"):
        make_encoder(tokenizer=with_template("<|turn>", "<start_of_turn>"))


def test_a_template_that_ends_turns_otherwise(make_encoder, with_template, chat):
    encoder = make_encoder(tokenizer=with_template("<turn|>", "<eos>"))
    with pytest.raises(DataError, match=r"^row 3: .* rendered 0 model turns for 1 assistant"):
        encoder.encode_text(chat("a", "b"), "row 3")


def test_a_template_that_drops_images(make_encoder, with_template, chat, png):
    encoder = make_encoder(tokenizer=with_template("{{- '<|image|>' -}}", ""))
    with pytest.raises(DataError, match=r"^row 3: the chat template dropped a medium .image."):
        encoder.encode_text(chat((None, "a"), "b", images=[png()]), "row 3")


def test_a_template_that_adds_images(make_encoder, with_template, chat, png):
    encoder = make_encoder(tokenizer=with_template("'<|image|>'", "'<|image|><|image|>'"))
    with pytest.raises(DataError, match=r"^row 3: the chat template rendered extra media .image."):
        encoder.encode_text(chat((None, "a"), "b", images=[png()]), "row 3")


def test_a_template_that_refuses_a_row(make_encoder, with_template, chat):
    refusing = with_template("['system', 'user', 'assistant']", "['user', 'assistant']")
    with pytest.raises(DataError, match=r"^row 3: the chat template refuses it: message role is"):
        make_encoder(tokenizer=refusing).encode_text(chat("a", "b", system="s"), "row 3")


# Rows that cannot be learned from


def message(role="user", content="a", **more):
    return {"role": role, "content": content} | more


ANSWER = message("assistant", "b")
BAD_MESSAGES = {
    "'messages' must be a list": [None, [], "text", {"role": "user"}, 3],
    "message 1 must be an object": [["text", ANSWER], [None, ANSWER], [[], ANSWER]],
    "message 1 has role": [[message("human"), ANSWER], [{"content": "a"}, ANSWER], [{}]],
    "message 2 .tool. is out of order": [[message(), message("tool"), ANSWER]],
    "message 1 .assistant. is out of order": [[ANSWER], [ANSWER, message()]],
    "message 2 .user. is out of order": [[message(), message(), ANSWER]],
    "message 3 .assistant. is out of order": [[message(), ANSWER, ANSWER]],
    "message 2 .system. is out of order": [[message(), message("system"), ANSWER]],
    "message 2 .assistant. is out of order": [[message("system"), ANSWER]],
    "no assistant message": [[message()], [message("system"), message()]],
    "message 2: the assistant message is empty": [
        [message(), message("assistant", content)]
        for content in ("", " \n", [{"type": "text", "text": ""}], [{"type": "text", "text": "  "}])
    ],
    "message 1: 'content' must be a text or a list": [
        [message(content=content), ANSWER] for content in (None, 3, [], {"type": "text"})
    ],
    "message 1: a part of type": [
        [message(content=[part]), ANSWER]
        for part in ({"type": "audio"}, {"text": "a"}, "a", None, {"type": None})
    ],
    "message 1: a part of type 'image' is not read from the system role": [
        [message("system", [{"type": "image"}]), message(), ANSWER]
    ],
    "message 2: a part of type 'image' is not read from the assistant role": [
        [message(), message("assistant", [{"type": "image"}, {"type": "text", "text": "b"}])]
    ],
    "message 1: a text part needs": [
        [message(content=[{"type": "text", "text": text}]), ANSWER] for text in (None, 3, ["a"])
    ],
    "message 1: the text contains '.ud800', half of a surrogate": [
        [message(content="a\ud800b"), ANSWER]
    ],
    "the chat template leaves out the tool call of message 2": [
        [message(), message("assistant", "b", tool_calls=[{"name": "f", "arguments": {}}])]
    ],
    "the chat template leaves out the reasoning of message 2": [
        [message(), message("assistant", "b", reasoning="hm")]
    ],
    "message 2: its text has reasoning in it": [
        [message(), message("assistant", "<|channel>thought\nhm\n<channel|>b")]
    ],
    "message 1 .user. has 'name', which is not rendered": [[message(name="Ann"), ANSWER]],
    "message 2 .assistant. has 'thought', which is not rendered": [
        [message(), message("assistant", "b", thought="hm")]
    ],
    "message 2 has a weight of 0.5": [[message(), message("assistant", "b", weight=0.5)]],
}


@pytest.mark.parametrize(
    ("says", "messages"),
    [(says, messages) for says, several in BAD_MESSAGES.items() for messages in several],
)
def test_bad_messages_are_refused_by_name(make_encoder, says, messages):
    encoder = make_encoder()
    expected = "^" + ("f.jsonl line 3: " + says).replace("|", r"\|").replace(
        ": message", "[:,] message"
    )
    for encode in (encoder.encode_text, encoder.encode, encoder.encode_prompt):
        with pytest.raises(DataError, match=expected):
            encode({"messages": messages}, "f.jsonl line 3")


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (0, "the messages have more image parts than the 0 images"),
        (1, "the messages have more image parts than the 1 images"),
        (3, "3 images are given but the messages have 2 image parts"),
    ],
)
def test_image_counts_must_agree(make_encoder, chat, png, images, says):
    with pytest.raises(DataError, match=rf"^row 3: {says}"):
        make_encoder().encode_text(chat((None, None, "a"), "b", images=[png()] * images), "row 3")


@pytest.mark.parametrize("images", ["a.png", {"bytes": b"", "path": None}, b"x"])
def test_images_must_be_a_list(make_encoder, chat, images):
    with pytest.raises(DataError, match=r"^row 3: 'images' must be a list, not"):
        make_encoder().encode_text(chat((None, "a"), "b", images=images), "row 3")


def test_tools_that_the_template_does_not_know(make_encoder, chat):
    with pytest.raises(DataError, match=r"^row 3: the chat template leaves out the declared tools"):
        make_encoder().encode_text(chat("a", "b") | {"tools": [{"name": "f"}]}, "row 3")


def test_an_image_that_was_exchanged_since_the_check(make_encoder, chat, png):
    encoder = make_encoder()
    example, _ = encoder.encode_text(chat((None, "a"), "b", images=[png(96, 96)]), "row 3")
    with pytest.raises(DataError, match=r"^row 3: its images take 1 tokens where 4 were counted"):
        encoder.add_media(example, chat((None, "a"), "b", images=[png(48, 48)]), {"image": (0, 1)})
