"""Hostile templates end with a message, soon and in little memory; those in use run as before."""

import importlib.util
import re
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from gemtune.data.rendering.template import ChatTemplate
from gemtune.errors import DataError

MESSAGES = {"messages": [{"role": "user", "content": "hello"}]}
DOUBLED = "{%% set ns=namespace(x='a'*1000) %%}{%% for i in range(99) %%}%s{%% endfor %%}"
TIME = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "recursion in width": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}"
    "{% endmacro %}{{ m(40) }}",
    "condition of a loop": "{% for i in range(99999) if range(99999)|list|length > 1e9 %}"
    "{% endfor %}",
    "filters in a loop": "{% for i in range(999) %}{{ range(99999)|list|sort|length }}{% endfor %}",
    "letters": "{% for i in range(99999) %}{% for c in 'x'*99999 %}{% endfor %}{% endfor %}",
}
MEMORY = {
    "repeat": "{{ 'a' * 300000000 }}",
    "repeat the other way": "{{ 300000000 * 'a' }}",
    "repeat a list": "{{ [0] * 1000000000 }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "double by ~": DOUBLED % "{% set ns.x = ns.x ~ ns.x %}",
    "double by +": DOUBLED % "{% set ns.x = ns.x + ns.x %}",
    "double by set": DOUBLED % "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}",
    "double by replace": DOUBLED % "{% set ns.x = ns.x.replace('a', 'aa') %}",
    "double by filter": DOUBLED % "{% set ns.x = ns.x | replace('a', 'aa') %}",
    "double by join": DOUBLED % "{% set ns.x = [ns.x, ns.x] | join %}",
    "list of itself": "{% set ns=namespace(x=[1,1]) %}{% for i in range(60) %}"
    "{% set ns.x=[ns.x,ns.x] %}{% endfor %}{{ ns.x }}",
    "dict of itself": "{% set ns=namespace(x=dict(a=1)) %}{% for i in range(60) %}"
    "{% set ns.x=dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x == ns.x|tojson }}",
    "tuple of itself": "{% set ns=namespace(x=(1,1)) %}{% for i in range(60) %}"
    "{% set ns.x=(ns.x,ns.x) %}{% endfor %}{{ ns.x|string }}",
    "sum of lists": "{% set b = range(99999)|list %}{{ [b,b,b,b,b,b,b,b,b]|sum(start=[]) }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "squares": "{% set ns=namespace(x=9) %}{% for i in range(99) %}{% set ns.x=ns.x*ns.x %}"
    "{% endfor %}",
    "wide format": "{{ '%0999999999d' % 1 }}",
    "wide format method": "{{ '{:0999999999d}'.format(1) }}",
    "center": "{{ 'a' | center(999999999) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "zfill": "{{ 'a'.zfill(999999999) }}",
    "expandtabs": "{{ '\t'.expandtabs(999999999) }}",
    "indent": "{{ ('a\n' * 9) | indent(999999999) }}",
    "JSON": "{{ [[1]] | tojson(indent=999999999) }}",
    "join": "{{ range(99999) | join('b' * 99999) }}",
    "bytes": "{{ (1).to_bytes(999999999, 'big') }}",
    "lorem": "{{ lipsum(n=99999) }}",
    "batch": "{{ [1] | batch(999999999, 'x') | list }}",
    "joiner": "{% set j=joiner('a'*8000000) %}{% for i in range(999) %}{{ j() }}{% endfor %}",
    "recursion in depth": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}
# These would not even end when they are told to: they are tried in another process only.
NEVER = {
    "loops that call nothing": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}"
    "{% endfor %}{% endfor %}",
    "compare lists of themselves": "{% set a=namespace(x=[1]) %}{% set b=namespace(x=[1]) %}"
    "{% for i in range(60) %}{% set a.x=[a.x,a.x] %}{% set b.x=[b.x,b.x] %}{% endfor %}"
    "{{ a.x == b.x }}",
    "compare tuples of themselves": "{% set a=namespace(x=(1,)) %}{% set b=namespace(x=(1,)) %}"
    "{% for i in range(60) %}{% set a.x=(a.x,a.x) %}{% set b.x=(b.x,b.x) %}{% endfor %}"
    "{{ a.x < b.x }}",
    "compare dicts of themselves": "{% set a=namespace(x={}) %}{% set b=namespace(x={}) %}"
    "{% for i in range(60) %}{% set a.x={1:a.x,2:a.x} %}{% set b.x={1:b.x,2:b.x} %}{% endfor %}"
    "{{ a.x == b.x }}",
}
OUT = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "filter attr": "{{ '' | attr('__class__') }}",
    "item": "{{ ''['__class__'] }}",
    "format": "{{ '{0.__class__}'.format('a') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 'a'}) }}",
    "map": "{{ [namespace] | map(attribute='__init__.__globals__') | first | items }}",
    "globals": "{{ range.__globals__ }}{{ cycler.__init__.__globals__ }}",
    "globals of namespace": "{{ namespace.__init__.__globals__.sys }}",
    "globals of our function": "{{ raise_exception.__globals__ }}",
    "loop": "{% for i in [1] %}{{ loop._iterator.__class__ }}{% endfor %}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "change a list": "{{ messages.append(1) }}",
    "change a dict": "{{ messages[0].update({'content': 'x'}) }}",
    "guard": "{{ tick.__self__ }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "type": "{{ ({}).__class__ }}",
    "str as a function": "{{ ''.join(['a']) }}",
}


def template(source):
    return ChatTemplate(source, re.compile(re.escape("<|turn>")), {"bos_token": "<bos>"})


SECONDS = 10
"""Of processor time: twenty times the limit, for busy machines; without one it is minutes."""


def refused(source):
    with pytest.raises(DataError) as caught:
        template(source).render(MESSAGES, "row 3")
    return str(caught.value)


@pytest.mark.parametrize("source", TIME.values(), ids=TIME)
def test_a_template_that_would_run_for_ever(source):
    began = time.thread_time()
    assert re.search(r"stopped: it ran for more than 0.5 s", refused(source))
    assert time.thread_time() - began < SECONDS


def test_hostile_templates_take_little_memory():
    """In a process that may not have more: an allocation beyond ends it with another error."""
    code = f"""
    import resource, sys
    sys.path[:0] = {[str(Path(__file__).parents[4] / "src")]!r}
    import test_sandbox as t
    from gemtune.errors import DataError
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = used + (256 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name, source in (t.MEMORY | t.NEVER).items():
        try:
            t.template(source).render(t.MESSAGES, "row 3")
        except DataError as error:
            assert "MemoryError" not in str(error), name
            print(name)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.splitlines() == [*MEMORY, *NEVER], done.stderr[-2000:]


@pytest.mark.parametrize("source", MEMORY.values(), ids=MEMORY)
def test_a_template_that_would_take_all_memory(source):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.thread_time()
    said = refused(source)
    assert "chat template" in said
    assert time.thread_time() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("source", OUT.values(), ids=OUT)
def test_a_template_that_wants_out(source):
    """Refused, or nothing but undefined."""
    try:
        text = template(source).render(MESSAGES, "row 3")
    except DataError as error:
        assert re.search("refuses|fails|cannot be used", str(error))
    else:
        assert text in ("", "[Undefined]")


def test_nothing_of_one_rendering_is_left_for_the_next():
    slow = template(
        "{% for i in range(60000) if messages[0].content == 'slow' %}{% for j in range(30000) %}"
        "{% endfor %}{% endfor %}ok"
    )
    for content in ("fast", "slow", "fast"):
        conversation = {"messages": [{"role": "user", "content": content}]}
        if content == "fast":
            assert slow.render(conversation, "") == "ok"
        else:
            with pytest.raises(DataError, match="it ran for more than"):
                slow.render(conversation, "")


def test_a_long_conversation_has_more_time():
    many = [{"role": "user", "content": "a"}] * 2000
    looks = "{% for m in messages %}{% for n in messages[-150:] %}{% endfor %}{% endfor %}ok"
    assert template(looks).render({"messages": many}, "") == "ok"


def test_a_template_of_a_megabyte_is_not_read():
    with pytest.raises(DataError, match="has 1,000,001 characters"):
        template("a" * 1_000_001)


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ a | unknown }}", "{% if %}", "{{ " + "(" * 9999]
)
def test_what_is_no_template(source):
    with pytest.raises(DataError, match="The chat template cannot be used"):
        template(source)


def test_training_templates_with_generation_marks_run():
    marked = template(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert marked.render(MESSAGES, "") == "hello"


STOCK = ["gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "gemma3", "qwen3", "llama3"]


@pytest.mark.parametrize("name", STOCK)
def test_templates_in_use_give_what_they_give_in_transformers(tokenizer, name):
    found = importlib.util.find_spec("trl")
    if found is None:
        pytest.skip("TRL, which has the templates of released checkpoints, is not installed")
    path = Path(found.origin).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this TRL has no {path.name}")
    source = path.read_text(encoding="utf-8")
    messages = [
        {"role": "user", "content": " a <b> & c \n"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "2\n"},
    ]
    for generate in (False, True):
        expected = tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=generate
        )
        special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        ours = ChatTemplate(source, re.compile("x^"), special)
        assert (
            ours.render({"messages": messages, "add_generation_prompt": generate}, "") == expected
        )
