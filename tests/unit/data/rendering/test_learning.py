"""What is learned of tools, reasoning and turns, in our own templates and in released ones."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from gemtune.errors import DataError

TEMPLATES = Path(__file__).parents[3] / "fixtures" / "templates"
EMPTY = "<|channel>thought\n<channel|>"
OWN = ("small", "large")
RELEASED = ("gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5")
GATE = "{{- '<|turn>model\\n' -}}"


def source(name):
    """A template by name; of a released one `name large` as the larger sizes have it."""
    name, _, size = name.partition(" ")
    if name in OWN:
        return (TEMPLATES / f"gemma4_{name}.jinja").read_text(encoding="utf-8")
    found = importlib.util.find_spec("trl")
    path = found and Path(found.origin).parent / "chat_templates" / f"{name}.jinja"
    if not path or not path.exists():
        pytest.skip("the templates of released checkpoints come with TRL, which is not there")
    text = path.read_text(encoding="utf-8")
    if size:
        assert text.count(GATE) == 1
        text = text.replace(GATE, GATE + "{%- if not enable_thinking -%}{{- '" + EMPTY.replace(
            "\n", "\\n") + "' -}}{%- endif -%}")  # fmt: skip
    return text


@pytest.fixture
def encoder(tokenizer, make_encoder):
    def make(name, **options):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = source(name)
        return make_encoder(tokenizer=changed, **options)

    return make


def runs(tokenizer, example):
    """The learned stretches as texts."""
    learned = np.concatenate([[False], example.labels != -100, [False]])
    edges = np.flatnonzero(np.diff(learned.astype(int))).reshape(-1, 2)
    assert (example.labels[learned[1:-1]] == example.input_ids[learned[1:-1]]).all()
    return [tokenizer.decode(example.input_ids[begin:end]) for begin, end in edges]


def user(text="q"):
    return {"role": "user", "content": text}


def model(text="a", **more):
    return {"role": "assistant", "content": text} | more


def call(name="get", **arguments):
    return {"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(text="3", name="get"):
    return {"role": "tool", "content": text, "name": name, "tool_call_id": name}


TOOLS = [{"type": "function", "function": {"name": "get", "description": "gets"}}]
CALL = '<|tool_call>call:get{city:<|"|>Bern<|"|>}<tool_call|>'
RESPONSE = '<|tool_response>response:get{value:<|"|>3<|"|>}<tool_response|>'


# Both families, and the released templates


@pytest.mark.parametrize("name", [*OWN, *RELEASED, *(f"{name} large" for name in RELEASED)])
def test_a_call_and_the_answer_are_learned_and_the_response_is_not(tokenizer, encoder, name):
    row = {
        "messages": [
            user(),
            model(None, tool_calls=[call(city="Bern")]),
            tool(),
            model("It is 3."),
        ],
        "tools": TOOLS,
    }
    example, _ = encoder(name).encode_text(row, "")
    text = tokenizer.decode(example.input_ids)
    assert runs(tokenizer, example) == [CALL, "It is 3.<turn|>"]
    empty = EMPTY if name.endswith("large") else ""
    assert f"<|turn>model\n{empty}{CALL}{RESPONSE}It is 3.<turn|>\n" in text
    assert text.count(EMPTY) == bool(empty)
    assert "<|tool>declaration:get{" in text


@pytest.mark.parametrize("name", [*OWN, *RELEASED])
def test_calls_in_turn(tokenizer, encoder, name):
    row = {
        "messages": [
            user(), model(None, tool_calls=[call(city="Bern")]), tool(),
            model(None, tool_calls=[call(city="Bern"), call("put", x=1)]), tool(), tool("4", "put"),
            model("done"), user("q2"), model("a2"),
        ],
        "tools": TOOLS,
    }  # fmt: skip
    example, _ = encoder(name).encode_text(row, "")
    both = CALL + "<|tool_call>call:put{x:1}<tool_call|>"
    assert runs(tokenizer, example) == [CALL, both, "done<turn|>", "a2<turn|>"]


@pytest.mark.parametrize("name", [*OWN, *RELEASED])
def test_a_call_that_nobody_answered(tokenizer, encoder, name):
    row = {"messages": [user(), model(None, tool_calls=[call(city="Bern")])], "tools": TOOLS}
    example, _ = encoder(name).encode_text(row, "")
    assert runs(tokenizer, example) == [CALL]
    assert tokenizer.decode(example.input_ids).rstrip("\n").endswith(CALL + "<|tool_response>")


@pytest.mark.parametrize("name", [*OWN, "gemma4_v5", "gemma4_v5 large"])
def test_reasoning_is_learned_before_its_answer(tokenizer, encoder, name):
    row = {"messages": [user(), model("a1"), user("q2"), model("a2", reasoning="hm, 2")]}
    example, _ = encoder(name).encode_text(row, "")
    thought = "<|channel>thought\nhm, 2\n<channel|>"
    assert runs(tokenizer, example) == ["a1<turn|>", thought + "a2<turn|>"]
    text = tokenizer.decode(example.input_ids)
    assert text.startswith("<bos><|turn>system\n<|think|>\n<turn|>\n")  # it is told that it thinks
    assert EMPTY not in text


@pytest.mark.parametrize(
    ("name", "empty_thought", "places"),
    [("small", "last", 0), ("small", "all", 0), ("large", "last", 1), ("large", "all", 2),
     ("gemma4_v5 large", "last", 1), ("gemma4_v5 large", "all", 2), ("gemma4_v5", "all", 0)],
)  # fmt: skip
def test_the_empty_thought_is_given_and_not_learned(
    tokenizer, encoder, name, empty_thought, places
):
    row = {"messages": [user(), model("a1"), user("q2"), model("a2")]}
    made = encoder(name, empty_thought=empty_thought)
    example, _ = made.encode_text(row, "")
    assert runs(tokenizer, example) == ["a1<turn|>", "a2<turn|>"]
    text = tokenizer.decode(example.input_ids)
    assert text.count(EMPTY) == places
    assert (EMPTY + "a2<turn|>" in text) == (places > 0)
    assert (EMPTY + "a1<turn|>" in text) == (places > 1)
    prompt, reference = made.encode_prompt(row, "")
    assert reference == "a2"
    if empty_thought == "last":
        assert example.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()


@pytest.mark.parametrize("name", [*OWN, *RELEASED])
def test_a_prompt_within_a_tool_loop(tokenizer, encoder, name):
    row = {
        "messages": [
            user(),
            model(None, tool_calls=[call(city="Bern")]),
            tool(),
            model("It is 3."),
        ],
        "tools": TOOLS,
    }
    made = encoder(name)
    prompt, reference = made.encode_prompt(row, "")
    assert reference == "It is 3."
    assert tokenizer.decode(prompt.input_ids).endswith(CALL + RESPONSE)


# What a template leaves out


@pytest.mark.parametrize("name", [*OWN, "gemma4_v5"])
def test_reasoning_before_the_last_question(tokenizer, encoder, name):
    row = {"messages": [user(), model("a1", reasoning="hm"), user("q2"), model("a2")]}
    with pytest.raises(
        DataError, match=r"^row 3: .* leaves out the reasoning of message 2, .*=keep"
    ):
        encoder(name).encode_text(row, "row 3")
    kept, _ = encoder(name, dropped_reasoning="keep").encode_text(row, "")
    thought = "<|channel>thought\nhm\n<channel|>"
    assert runs(tokenizer, kept) == [thought + "a1<turn|>", "a2<turn|>"]
    assert "<|turn>model\n" + thought + "a1<turn|>" in tokenizer.decode(kept.input_ids)
    dropped, _ = encoder(name, dropped_reasoning="drop").encode_text(row, "")
    assert runs(tokenizer, dropped) == ["a1<turn|>", "a2<turn|>"]
    assert "hm" not in tokenizer.decode(dropped.input_ids)


def test_reasoning_that_is_put_back_into_a_tool_loop(tokenizer, encoder):
    """The first released template leaves it out wherever a tool is called."""
    messages = [
        user(), model(None, tool_calls=[call(city="Bern")], reasoning="first"), tool(),
        model("a", reasoning="then"),
    ]  # fmt: skip
    row = {"messages": messages, "tools": TOOLS}
    made = encoder("gemma4", dropped_reasoning="keep", thinking="off")
    example, _ = made.encode_text(row, "")
    thoughts = [f"<|channel>thought\n{text}\n<channel|>" for text in ("first", "then")]
    assert runs(tokenizer, example) == [thoughts[0] + CALL, thoughts[1] + "a<turn|>"]


def test_the_first_template_knows_no_tool_messages(encoder):
    row = {"messages": [user(), model(None, tool_calls=[call()]), tool(), model()], "tools": TOOLS}
    with pytest.raises(DataError, match=r"^row 3: the chat template rendered"):
        encoder("gemma4_v2").encode_text(row, "row 3")


INLINE = "<|channel>thought\nhm\n<channel|>a2"


@pytest.mark.parametrize("name", [*OWN, "gemma4_v5"])
def test_reasoning_inside_of_an_answer(tokenizer, encoder, name):
    row = {"messages": [user(), model("a1"), user("q2"), model(INLINE)]}
    with pytest.raises(DataError, match=r"^row 3, message 4: its text has reasoning in it"):
        encoder(name).encode_text(row, "row 3")
    kept, _ = encoder(name, dropped_reasoning="keep").encode_text(row, "")
    assert runs(tokenizer, kept) == ["a1<turn|>", INLINE + "<turn|>"]
    thought = tokenizer.convert_tokens_to_ids("<|channel>")
    assert kept.input_ids.tolist().count(thought) == 1  # the token, not its letters
    dropped, _ = encoder(name, dropped_reasoning="drop").encode_text(row, "")
    assert runs(tokenizer, dropped) == ["a1<turn|>", "a2<turn|>"]


@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_an_answer_of_reasoning_alone(encoder, policy):
    row = {"messages": [user(), model("<|channel>thought\nhm\n<channel|>")]}
    with pytest.raises(DataError, match=r"message 2: the assistant message is empty but for its"):
        encoder("small", dropped_reasoning=policy).encode_text(row, "row 3")


def test_a_template_that_drops_an_answer(tokenizer, make_encoder):
    changed = copy.deepcopy(tokenizer)
    kept = "{{- message.content | trim if message.role == 'user' -}}"
    changed.chat_template = changed.chat_template.replace("{{- message.content | trim -}}", kept)
    assert kept in changed.chat_template
    with pytest.raises(
        DataError, match=r"^row 3: the chat template leaves out the text of message 2"
    ):
        make_encoder(tokenizer=changed).encode_text({"messages": [user(), model()]}, "row 3")


def test_a_template_that_drops_one_of_two_equal_texts(tokenizer, make_encoder):
    changed = copy.deepcopy(tokenizer)
    kept = "{{- part.text | trim if loop.first and part.text | upper != 'NO' -}}"
    changed.chat_template = changed.chat_template.replace("{{- part.text | trim -}}", kept)
    assert kept in changed.chat_template
    row = {"messages": [user([{"type": "text", "text": "yes"}] * 2), model("yes")]}
    with pytest.raises(
        DataError, match=r"^row 3: the chat template leaves out the text of message"
    ):
        make_encoder(tokenizer=changed).encode_text(row, "row 3")


@pytest.mark.parametrize("printed", ["m.content", "m.content | trim", "m.content ~ ''"])
def test_a_template_that_knows_texts_alone(tokenizer, make_encoder, printed):
    """It gets a text where there is one, and does not print a list where there are parts."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|turn>' ~ ('model' if m.role == 'assistant' "
        "else m.role) ~ '\\n' }}{{ " + printed + " }}{{ '<turn|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
    )
    made = make_encoder(tokenizer=changed)
    for content in ("q", [{"type": "text", "text": "q"}]):
        example, _ = made.encode_text({"messages": [user(content), model()]}, "")
        assert tokenizer.decode(example.input_ids) == (
            "<bos><|turn>user\nq<turn|>\n<|turn>model\na<turn|>\n"
        )
    row = {"messages": [user([{"type": "text", "text": "q"}] * 2), model()]}
    with pytest.raises(DataError, match=r"^row 3: .* prints a list as Python would"):
        made.encode_text(row, "row 3")


# data.learn, train and weight


CHAT = [user(), model("a1"), user("q2"), model("a2"), user("q3"), model("a3")]


@pytest.mark.parametrize(
    ("learn", "expected"),
    [("assistant", ["a1<turn|>", "a2<turn|>", "a3<turn|>"]), ("last_assistant", ["a3<turn|>"])],
)
def test_learn(tokenizer, encoder, learn, expected):
    example, _ = encoder("small", learn=learn).encode_text({"messages": CHAT}, "")
    assert runs(tokenizer, example) == expected


def test_learn_all_learns_everything_but_images(tokenizer, make_encoder, chat, png):
    row = chat((None, "q"), "a", images=[png(96, 96)])
    encoder = make_encoder(learn="all")
    example, _ = encoder.encode_text(row, "")
    media = np.isin(
        example.input_ids, tokenizer.convert_tokens_to_ids(["<|image>", "<|image|>", "<image|>"])
    )
    assert media.sum() == 6
    assert ((example.labels == -100) == media).all()
    other, _ = make_encoder().encode_text(row, "")
    assert example.input_ids.tolist() == other.input_ids.tolist()


def test_learn_completion(tokenizer, encoder):
    made = encoder("small", learn="completion")
    example, _ = made.encode_text({"messages": CHAT, "num_prompt_messages": 3}, "")
    assert runs(tokenizer, example) == ["a2<turn|>", "a3<turn|>"]
    with pytest.raises(DataError, match=r"^row 3: data.learn=completion is for rows of 'prompt'"):
        made.encode_text({"messages": CHAT}, "row 3")


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"train": False, "weight": 0.0}])
def test_a_message_that_is_not_to_be_learned(tokenizer, encoder, mark):
    messages = [*CHAT[:3], CHAT[3] | mark, *CHAT[4:]]
    example, _ = encoder("small").encode_text({"messages": messages}, "")
    assert runs(tokenizer, example) == ["a1<turn|>", "a3<turn|>"]
    plain, _ = encoder("small").encode_text({"messages": CHAT}, "")
    assert example.input_ids.tolist() == plain.input_ids.tolist()
    with pytest.raises(DataError, match=r"data.learn=all learns everything"):
        encoder("small", learn="all").encode_text({"messages": messages}, "row 3")


@pytest.mark.parametrize("mark", [{"train": True}, {"weight": 1}, {"weight": 1.0, "train": True}])
def test_marks_that_change_nothing(tokenizer, encoder, mark):
    messages = [*CHAT[:3], CHAT[3] | mark, *CHAT[4:]]
    example, _ = encoder("small").encode_text({"messages": messages}, "")
    assert runs(tokenizer, example) == ["a1<turn|>", "a2<turn|>", "a3<turn|>"]


@pytest.mark.parametrize("weight", [0.5, 2])
def test_a_weight_between_is_refused(encoder, weight):
    row = {"messages": [user(), model(weight=weight)]}
    with pytest.raises(
        DataError, match=r"^row 3: message 2 has a weight of .* only 0 and 1 can be"
    ):
        encoder("small").encode_text(row, "row 3")


def test_nothing_left_to_learn(encoder):
    with pytest.raises(DataError, match=r"^row 3: no token is left to learn\."):
        encoder("small").encode_text({"messages": [user(), model(train=False)]}, "row 3")


@pytest.mark.parametrize("name", [*OWN, *RELEASED])
def test_of_one_turn_with_tools_a_part_is_learned(tokenizer, encoder, name):
    messages = [
        user(), model(None, tool_calls=[call(city="Bern")], train=False), tool(),
        model(None, tool_calls=[call("put", x=1)]), tool("4", "put"), model("done", train=False),
    ]  # fmt: skip
    example, _ = encoder(name).encode_text({"messages": messages, "tools": TOOLS}, "")
    assert runs(tokenizer, example) == ["<|tool_call>call:put{x:1}<tool_call|>"]
    last, _ = encoder(name, learn="last_assistant").encode_text(
        {"messages": [*messages[:-1], model("done")], "tools": TOOLS}, ""
    )
    assert runs(tokenizer, last) == ["done<turn|>"]


# Keys that nothing is made of


def test_a_key_that_is_not_rendered(encoder):
    row = {"messages": [user() | {"id": 7}, model()]}
    with pytest.raises(
        DataError, match=r"message 1 \(user\) has 'id', .* data.ignored_keys=\[id\]"
    ):
        encoder("small").encode_text(row, "row 3")
    encoder("small", ignored_keys=("id",)).encode_text(row, "row 3")
    encoder("small").encode_text({"messages": [user() | {"id": None}, model()]}, "row 3")


@pytest.mark.parametrize(("thinking", "thinks"), [("auto", False), ("on", True), ("off", False)])
def test_thinking(tokenizer, encoder, thinking, thinks):
    example, _ = encoder("large", thinking=thinking).encode_text({"messages": CHAT}, "")
    text = tokenizer.decode(example.input_ids)
    assert ("<|think|>" in text, EMPTY in text) == (thinks, not thinks)


def test_a_system_message_as_text_in_the_template_that_would_print_a_list(tokenizer, encoder):
    for content in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        row = {"messages": [{"role": "system", "content": content}, user(), model()]}
        for name in ("gemma4_v2", "gemma4_v3", "gemma4_v5"):
            example, _ = encoder(name).encode_text(row, "")
            text = tokenizer.decode(example.input_ids)
            assert text.startswith("<bos><|turn>system\nBe brief.<turn|>\n")
