"""A template traced once gives, for any texts, what it gives when it is run on them."""

import copy
import random

import pytest

from gemtune.data.rendering.leaves import read_shape
from gemtune.data.rendering.plans import filled
from gemtune.data.rendering.probes import Hole, Probe, UntraceableError
from gemtune.data.rendering.template import ChatTemplate
from gemtune.errors import DataError

TEXTS = [
    "a",
    " b ",
    "\n\nc",
    "x y\n",
    "é 日本",
    "0",
    "<b>",
    "model\n",
    "{{ x }}",
    "a|b",
    "\u200bz",
    "<|",
]


def encoder_of(make_encoder, tokenizer, source):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = source
    return make_encoder(tokenizer=changed)


def body(inner):
    """A Gemma template whose texts go through `inner`."""
    return (
        "{{ bos_token }}{% for m in messages %}{{ '<|turn>' ~ "
        "('model' if m.role == 'assistant' else m.role) ~ '\\n' }}"
        "{% set t = m.content if m.content is string else m.content[0].text %}"
        + inner
        + "{{ '<turn|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
    )


def rows():
    chosen = random.Random(0)
    for _ in range(60):
        messages = []
        for _ in range(chosen.randint(1, 3)):
            for role in ("user", "assistant"):
                messages.append({"role": role, "content": chosen.choice(TEXTS)})
        yield {"messages": messages}


FOLLOWED = {
    "as it is": "{{ t }}",
    "trimmed": "{{ t | trim }}",
    "stripped": "{{ t.strip() }}",
    "one side": "{{ t.lstrip() }}|{{ t.rstrip() }}",
    "joined": "{{ ('<' + t + '>') | trim }}",
    "joined by ~": "{{ (' ' ~ t ~ ' ') | trim }}",
    "kept": "{% set x %} {{ t }} {% endset %}{{ x | trim }}",
    "macro": "{% macro f(x) %}{{ x | trim }}{% endmacro %}{{ f(t) }}",
    "asked for": "{% if t and t is string and t | trim | length > 0 %}{{ t }}{% endif %}",
    "default": "{{ t | default('none') }}",
    "thoughts": "{{ t.split('<channel|>')[-1] }}",
    "thoughts looked for": "{% if '<|channel>' in t %}thinks{% endif %}{{ t }}",
    "begins": "{% if t.startswith('<|channel>') %}thinks{% endif %}{{ t }}",
    "its own token": "{% set x = '<|channel>' ~ t %}{{ 'yes' if '<|channel>' in x }}{{ t }}",
    "twice": "{{ t }}{{ t }}",
}
NOT_FOLLOWED = {
    "upper": "{{ t | upper }}",
    "title": "{{ t.title() }}",
    "length": "{{ t | length }}{{ t }}",
    "long": "{{ 'long' if t | length > 3 }}{{ t }}",
    "first": "{{ t[0] }}{{ t }}",
    "slice": "{{ t[:1] }}{{ t }}",
    "letters": "{% for c in t %}{{ c }}{% endfor %}",
    "search": "{{ 'has' if 'a' in t }}{{ t }}",
    "begin": "{{ 'has' if t.startswith('a') }}{{ t }}",
    "compare": "{{ 'same' if t == 'a' }}{{ t }}",
    "order": "{{ 'less' if t < 'b' }}{{ t }}",
    "among": "{{ 'in' if t in ['a', '0'] }}{{ t }}",
    "key": "{{ {'a': 1}[t] | default('') }}{{ t }}",
    "replace": "{{ t | replace('a', 'b') }}",
    "replace method": "{{ t.replace('a', 'b') }}",
    "split": "{{ t.split(' ') | length }}{{ t }}",
    "json": "{{ t | tojson }}",
    "json of a list": "{{ [t] | tojson }}",
    "join": "{{ [t, t] | join(' ') }}",
    "trim of letters": "{{ t.strip('a') }}x",
    "sorted": "{{ ([t, 'b'] | sort)[0] }}{{ t }}",
    "set": "{{ [t, 'a'] | unique | list | length }}{{ t }}",
    "number": "{{ t | int }}{{ t }}",
    "format": "{{ t | string | lower }}",
    "times": "{{ t * 2 }}",
    "mapped": "{{ [t] | map('upper') | first }}",
    "selected": "{{ [t] | select('equalto', 'a') | list | length }}{{ t }}",
}


@pytest.mark.parametrize("inner", [*FOLLOWED.values(), *NOT_FOLLOWED.values()])
def test_rows_are_those_of_transformers(make_encoder, tokenizer, inner):
    """Whether a use of a text can be followed or not, the row comes out the same, or is refused."""
    encoder = encoder_of(make_encoder, tokenizer, body(inner))
    assert encoder._template.is_traceable
    compared = 0
    for row in rows():
        expected = tokenizer.apply_chat_template(
            row["messages"], chat_template=encoder.tokenizer.chat_template, tokenize=False
        )
        try:
            example, _ = encoder.encode_text(row, "row")
        except DataError as error:
            assert "leaves out the text" in str(error)
            continue
        compared += 1
        assert tokenizer.decode(example.input_ids) == expected
    assert encoder._template.is_traceable == (inner in FOLLOWED.values())
    assert compared or inner not in FOLLOWED.values()


def test_a_template_is_run_once_for_a_shape(make_encoder, tokenizer, chat, monkeypatch):
    encoder = make_encoder()
    runs = []
    real = ChatTemplate._generate
    monkeypatch.setattr(ChatTemplate, "_generate", lambda *a: runs.append(1) or real(*a))
    for number in range(50):
        encoder.encode_text(chat(f"q{number}", f"a{number}"), "")
        encoder.encode_text(chat("q", "a", f"q{number}", f" a{number} "), "")
    assert len(runs) == 4  # traced, and compared with a run on the first row, for two shapes


def test_a_trace_that_is_wrong_is_not_used(make_encoder, chat, monkeypatch, tokenizer):
    """The first row of each shape is rendered in full and compared."""
    encoder = make_encoder()
    monkeypatch.setattr(Probe, "strip", lambda self, characters=None: self)
    row = chat(" q ", " a ")
    example, _ = encoder.encode_text(row, "")
    assert not encoder._template.is_traceable
    expected = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert tokenizer.decode(example.input_ids) == expected


def test_white_space_alone_is_part_of_the_shape(make_encoder, chat, tokenizer):
    encoder = make_encoder()
    for parts in ((" ", "a"), ("a", "\n"), ("b", " c ")):
        row = chat(parts, "x")
        example, _ = encoder.encode_text(row, "")
        expected = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert tokenizer.decode(example.input_ids) == expected


def test_probes_refuse_what_they_cannot_follow():
    probe = Probe([Hole(0)], lambda text: text == "<|turn>")
    for use in (
        lambda: probe[0],
        lambda: list(probe),
        lambda: hash(probe),
        lambda: probe == "a",
        lambda: "a" in probe,
        lambda: probe.upper(),
        lambda: probe.split(),
        lambda: probe < "a",
        lambda: f"{probe:>9}",
        lambda: probe * 2,
        lambda: probe + 1,
        lambda: probe.encode(),
    ):
        with pytest.raises(UntraceableError):
            use()
    assert ("<|turn>" in probe, probe == "", bool(probe)) == (False, False, True)
    assert ("<" + probe + "> ").strip().atoms == ("<", Hole(0), ">")
    assert (" " + probe + " ").strip().atoms == (Hole(0, True, True),)


@pytest.mark.parametrize("text", ["a", " a ", "\t\na", "a\u00a0", "\u2003a\x1f"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_holes_trim_as_python_does(text, left, right):
    expected = text.lstrip() if left else text
    expected = expected.rstrip() if right else expected
    assert Hole(0, bool(left), bool(right)).fill(text) == expected
    assert filled(("x", Hole(0, bool(left), bool(right))), [text]) == "x" + expected


def test_shapes_are_told_apart(make_encoder, chat):
    encoder = make_encoder()
    conversations = [
        encoder._read(row, "")
        for row in (
            chat("a", "b"),
            chat("a", "b", system="s"),
            chat("a", "b", "c"),
            chat(("a", "b"), "c"),
            chat((" ", "a"), "b"),
            chat(("a", " "), "b"),
            chat(("a", "  "), "b"),
        )
    ]
    shapes = [repr(read_shape(conversation)[0].structure) for conversation in conversations]
    assert len(set(shapes)) == len(shapes)
