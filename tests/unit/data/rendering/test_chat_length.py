"""Rows that are too long, and prompts."""

import pytest

from gemtune.errors import DataError


def tokens(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_a_row_as_long_as_allowed_is_kept(make_encoder, chat):
    row = chat("hi", "yes")
    length = len(make_encoder().encode(row, "").input_ids)
    assert len(make_encoder(max_length=length).encode(row, "").input_ids) == length
    with pytest.raises(DataError, match=rf"^row 3: {length} tokens .*data.max_length={length - 1}"):
        make_encoder(max_length=length - 1).encode_text(row, "row 3")


def test_text_is_cut_with_its_labels(make_encoder, chat):
    row = chat("hi", "a long answer " * 5, "and", "more")
    whole = make_encoder().encode(row, "")
    first = int((whole.labels != -100).argmax())
    for length in range(first + 1, len(whole.input_ids) + 1):
        cut = make_encoder(length, "right").encode(row, "")
        assert cut.input_ids.tolist() == whole.input_ids[:length].tolist()
        assert cut.labels.tolist() == whole.labels[:length].tolist()


def test_nothing_left_to_learn_is_refused(make_encoder, chat):
    row = chat("a long question " * 5, "yes")
    whole = make_encoder().encode(row, "")
    first = int((whole.labels != -100).argmax())
    for length in (2, first):
        with pytest.raises(DataError, match=r"^row 3: no token is left to learn after cutting"):
            make_encoder(length, "right").encode_text(row, "row 3")


def test_a_cut_through_an_image_is_refused_and_one_behind_it_drops_it(
    tokenizer, make_encoder, make_image, chat, png
):
    row = chat((None, "a"), "b", ("c", None), "d", images=[png(48, 48, 1), png(96, 96, 2)])
    head = "<bos><|turn>user\n<|image><|image|><image|>a<turn|>\n<|turn>model\nb<turn|>\n"
    begin = len(tokens(tokenizer, head + "<|turn>user\nc"))
    end = begin + 5  # of the second image: begin, four soft tokens, end
    for length in range(begin + 1, end + 1):
        with pytest.raises(DataError, match=rf"^row 3: .*cuts through an image .*least {end + 1},"):
            make_encoder(length, "right").encode_text(row, "row 3")
    before = make_encoder(begin, "right").encode(row, "row 3")
    assert tokenizer.decode(before.input_ids) == head + "<|turn>user\nc"
    after = make_encoder(end + 1, "right").encode(row, "row 3")
    assert tokenizer.decode(after.input_ids[-6:]) == "<|image>" + "<|image|>" * 4 + "<image|>"
    assert [len(image.pixels) for image in before.images] == [9]
    assert [len(image.pixels) for image in after.images] == [9, 36]
    first = make_encoder().media.image.encode(make_image(48, 48, 1), "")
    assert (before.images[0].pixels == first.pixels).all()


def test_a_dropped_image_is_not_decoded(make_encoder, chat, png):
    damaged = png(96, 96)[:200]
    row = chat("a", "b", (None, "c"), "d", images=[damaged])
    example = make_encoder(14, "right").encode(row, "row 3")
    assert example.images == []
    with pytest.raises(DataError, match=r"^row 3: the image is damaged"):
        make_encoder().encode(row, "row 3")


# Cut on the left


def left(make_encoder, length, row):
    return make_encoder(length, "left").encode(row, "row 3")


def test_whole_turns_go_from_the_oldest_on(tokenizer, make_encoder, chat):
    """The longest conversation that fits and begins with a user's turn; the system turn stays."""
    turns = ["first question", "one", "second", "two two", "third question", "three"]
    row = chat(*turns, system="Be brief.")
    whole = make_encoder().encode(row, "")
    shorter = [chat(*turns[2 * n :], system="Be brief.") for n in range(3)]
    expected = [make_encoder().encode(each, "") for each in shorter]
    lengths = [len(each.input_ids) for each in expected]
    assert lengths[0] == len(whole.input_ids) and lengths == sorted(lengths, reverse=True)
    for length in range(lengths[2], lengths[0] + 1):
        cut = left(make_encoder, length, row)
        fits = next(each for each, n in zip(expected, lengths, strict=True) if n <= length)
        assert cut.input_ids.tolist() == fits.input_ids.tolist()
        assert cut.labels.tolist() == fits.labels.tolist()


def test_of_the_last_question_the_beginning_goes(tokenizer, make_encoder, chat):
    row = chat("old", "one", "a b c d e f g h i j k", "yes", system="s")
    last = make_encoder().encode(chat("a b c d e f g h i j k", "yes", system="s"), "")
    head = len(tokens(tokenizer, "<bos><|turn>system\ns<turn|>\n<|turn>user\n"))
    tail = len(tokens(tokenizer, "<turn|>\n<|turn>model\nyes<turn|>\n"))
    for length in range(head + tail + 1, len(last.input_ids)):
        cut = left(make_encoder, length, row)
        assert len(cut.input_ids) == length
        assert cut.input_ids[:head].tolist() == last.input_ids[:head].tolist()
        assert cut.input_ids[head:].tolist() == last.input_ids[head - length :].tolist()
        assert tokenizer.decode(cut.labels[cut.labels != -100]) == "yes<turn|>"
    with pytest.raises(DataError, match=r"^row 3: data.max_length=\d+ is too short for its last"):
        left(make_encoder, head + tail, row)


def test_images_go_with_their_turns_and_are_never_cut(make_encoder, make_image, chat, png):
    pictures = [png(48, 48, 1), png(96, 96, 2)]
    row = chat((None, "a"), "b", (None, "what is this now"), "d", images=pictures)
    last = make_encoder().encode(chat((None, "what is this now"), "d", images=pictures[1:]), "")
    cut = left(make_encoder, len(last.input_ids), row)
    assert cut.input_ids.tolist() == last.input_ids.tolist()
    expected = make_encoder().media.image.encode(make_image(96, 96, 2), "").pixels
    assert len(cut.images) == 1 and (cut.images[0].pixels == expected).all()
    for length in range(len(last.input_ids) - 8, len(last.input_ids)):
        with pytest.raises(DataError, match=r"^row 3: .*(cuts through an image|cut an image out)"):
            left(make_encoder, length, row)


# Prompts


def test_a_prompt_is_all_before_the_last_answer(tokenizer, make_encoder, chat, png):
    pictures = [png(48, 48, 1), png(48, 96, 2), png(96, 96, 3)]
    row = chat((None, "One?"), "1", ("Two?", None), "2", (None, "Bye."), images=pictures)
    prompt, reference = make_encoder().encode_prompt(row, "row 3")
    text = (
        "<bos><|turn>user\n<|image><|image|><image|>One?<turn|>\n<|turn>model\n1<turn|>\n"
        "<|turn>user\nTwo?<|image><|image|><|image|><image|><turn|>\n<|turn>model\n"
    )
    assert prompt.input_ids.tolist() == tokens(tokenizer, text)
    assert (prompt.labels == -100).all()
    assert [len(image.pixels) for image in prompt.images] == [9, 18]
    assert (reference, prompt.where) == ("2", "row 3")


def test_a_prompt_is_the_beginning_of_its_training_example(make_encoder, chat, png):
    row = chat((None, "One?"), "1", "Two?", "2", images=[png()], system="s")
    prompt, _ = make_encoder().encode_prompt(row, "")
    example = make_encoder().encode(row, "")
    assert example.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()
    assert example.labels[len(prompt.input_ids)] != -100


def test_the_reference_is_the_answer_as_the_template_writes_it(make_encoder, chat):
    """Parts are trimmed one by one; a model that has learned them writes no space between."""
    _, reference = make_encoder().encode_prompt(chat("q", (" 3 and ", " 8\n")), "")
    assert reference == "3 and8"


def test_a_prompt_longer_than_the_limit_is_whole(tokenizer, make_encoder, chat):
    prompt, _ = make_encoder(20, "right").encode_prompt(chat("long " * 50, "b"), "")
    assert len(prompt.input_ids) > 20
    assert tokenizer.decode(prompt.input_ids).endswith("long<turn|>\n<|turn>model\n")
