"""Answers of every format, right and broken, become the same message however they are cut."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton_router.chat_output.formats import HARMONY, REASONING_FORMATS, TOOL_FORMATS, HarmonyCalls
from baton_router.chat_output.lexer import MAX_HELD
from tests.router_front.chat_output.sums import Sum, new_parser, parse

BAR = "\uff5c"
DS_BEGIN, DS_SEP, DS_END = (f"<{BAR}tool▁{word}{BAR}>" for word in ("call▁begin", "sep", "call▁end"))
DS_ALL, DS_DONE = (f"<{BAR}tool▁calls▁{word}{BAR}>" for word in ("begin", "end"))

# One call of get_weather with city "Par\"is" and days 3, as each format writes it, and one of now.
WRITTEN = {
    "hermes": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par\\"is", "days": 3}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    "llama3_json": (
        '{"name": "get_weather", "parameters": {"city": "Par\\"is", "days": 3}}',
        '{"type": "function", "name": "now", "parameters": {}}',
    ),
    "llama4_json": (
        '<|python_start|>{"name": "get_weather", "parameters": {"city": "Par\\"is", "days": 3}}'
        "<|python_end|>",
        '<|python_start|>{"name": "now", "parameters": {}}<|python_end|>',
    ),
    "pythonic": ("[get_weather(city='Par\"is', days=3)]", "[now()]"),
    "llama4_pythonic": ("<|python_start|>[get_weather(city='Par\"is', days=3)]<|python_end|>", "[now()]"),
    "mistral": (
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Par\\"is", "days": 3}',
        "[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}",
    ),
    "mistral_v3": (
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Par\\"is", "days": 3}}]',
        '[TOOL_CALLS][{"name": "now", "arguments": {}}]',
    ),
    "deepseek_v3": (
        f'{DS_BEGIN}function{DS_SEP}get_weather\n```json\n{{"city": "Par\\"is", "days": 3}}\n```{DS_END}',
        f"{DS_BEGIN}function{DS_SEP}now\n```json\n{{}}\n```{DS_END}",
    ),
    "deepseek_v31": (
        f'{DS_BEGIN}get_weather{DS_SEP}{{"city": "Par\\"is", "days": 3}}{DS_END}',
        f"{DS_BEGIN}now{DS_SEP}{{}}{DS_END}",
    ),
    "qwen3_coder": (
        '<tool_call>\n<function=get_weather>\n<parameter=city>\nPar"is\n</parameter>\n'
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "<function=now>\n</function>\n</tool_call>",
    ),
    "glm4": (
        '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Par"is</arg_value>\n'
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        "<tool_call>now\n</tool_call>",
    ),
    "harmony": (
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Par\\"is", "days": 3}<|call|>',
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
    ),
}
TWO_CALLS = [("get_weather", {"city": 'Par"is', "days": 3}), ("now", {})]
FORMATS = sorted(WRITTEN)


def test_every_format_is_tried():
    assert {form.name for form in TOOL_FORMATS.values()} == set(FORMATS)


@pytest.mark.parametrize("form", FORMATS)
def test_two_calls_between_texts(form: str):
    first, second = WRITTEN[form]
    before, after = ("Let me see.\n\n", "\nDone.\n")
    if form == "harmony":
        before, after = (
            f"<|channel|>commentary<|message|>{before}<|end|>",
            f"<|start|>assistant<|channel|>final<|message|>{after}",
        )
    found = parse(before + first + "\n" * (form != "harmony") + second + after, form)
    assert [(name, json.loads(arguments)) for name, arguments in found.named] == TWO_CALLS
    assert found.content.split() == ["Let", "me", "see.", "Done."]


@pytest.mark.parametrize("form", FORMATS)
def test_calls_alone_leave_no_content(form: str):
    first, second = WRITTEN[form]
    found = parse(first + ("" if form == "harmony" else "\n") + second + "\n" * (form != "harmony"), form)
    assert len(found.calls) == 2
    assert found.content == ""
    assert found.calls[0].id != found.calls[1].id


def test_ids():
    assert parse(WRITTEN["hermes"][0], "hermes").calls[0].id == "call_0xxxxxxxxxxxxxxxxxxxxxxx"
    assert parse(WRITTEN["mistral"][0], "mistral").calls[0].id == "0xxxxxxxx"


# Of each format, what may stand around, within and instead of calls.
FRAGMENTS = [
    "text",
    " ",
    "\n",
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    "\\",
    ",",
    ":",
    "(",
    ")",
    "=",
    "1",
    "<",
    ">",
    "é",
]
FRAGMENTS += [
    "name",
    "get_weather",
    "now",
    '{"name": "now"',
    '"arguments": ',
    '{"a": 1}',
    "city",
    "to=functions.now",
]
MARKS = sorted(
    {
        mark
        for form in TOOL_FORMATS.values()
        for mark in (*form.begins, *form.ends, *form.ignored, form.written.after_name, form.written.separator)
        if mark
    }
    | {
        *("<think>", "</think>", "<function=", "<parameter=city>", "<parameter=days>", "</parameter>"),
        *("<arg_key>city</arg_key>", "<arg_value>", "</arg_value>", "[ARGS]", "[CALL_ID]", DS_SEP, "```json"),
        *("<|start|>", "<|channel|>analysis", "<|channel|>final", "<|message|>", "<|end|>", "<|special|>"),
    }
)
REASONING = st.sampled_from([None, *sorted({form.name for form in REASONING_FORMATS.values()} - {"harmony"})])


@pytest.mark.parametrize("form", FORMATS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_sum_is_the_same_under_every_cut(form: str, data: st.DataObject):
    choices = st.sampled_from(
        [*FRAGMENTS, *MARKS, *WRITTEN[form]] + [mark for mark in MARKS if mark in "".join(WRITTEN[form])] * 3
    )
    text = "".join(data.draw(st.lists(choices, max_size=14)))
    reasoning = data.draw(REASONING)
    options = {"special_tokens": ["<|special|>", "[ARGS]"], "is_reasoning_open": data.draw(st.booleans())}
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=10)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse([text], form, reasoning, **options)
    assert parse(pieces, form, reasoning, **options) == whole
    assert parse(text, form, reasoning, **options) == whole


@pytest.mark.parametrize("form", FORMATS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_word_is_lost(form: str, data: st.DataObject):
    """Words stand anywhere but within a mark or a call's object."""
    marks = [mark for mark in (*MARKS, "{", "}", "[", "]", "(", ",", "\n") if "|" not in mark]
    if form == "harmony":  # its headers are marks from end to end
        marks = [
            "<|channel|>final<|message|>",
            "<|channel|>analysis<|message|>",
            "<|end|>",
            "<|start|>assistant<|message|>",
        ]
    parts = data.draw(st.lists(st.sampled_from([*marks, *WRITTEN[form], "word"]), max_size=12))
    words = [f"word{index}x" for index, part in enumerate(parts) if part == "word"]
    text = "".join(f" word{index}x " if part == "word" else part for index, part in enumerate(parts))
    found = parse([text], form, None if form == "harmony" else "qwen3")
    said = " ".join([found.content, found.reasoning, *(f"{name} {args}" for name, args in found.named)])
    assert [word for word in words if word not in said] == []


@given(text=st.text(max_size=50))
@settings(max_examples=50, deadline=None)
def test_without_formats_text_stays_as_it_is(text: str):
    assert parse(text) == Sum(content=text)


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        # What never becomes a call is content, with its marks.
        ("hermes", "The tag <tool_call> begins one.", "The tag <tool_call> begins one.", []),
        ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
        ("hermes", '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
        ("hermes", '<tool_call>{"name": "a b"}</tool_call>', '<tool_call>{"name": "a b"}</tool_call>', []),
        ("hermes", '<tool_call>{"name": "\\ud800"}', '<tool_call>{"name": "\\ud800"}', []),
        ("hermes", "a </tool_call> b", "a </tool_call> b", []),
        ("hermes", '<tool_call> <tool_call>{"name": "now"}</tool_call>', "<tool_call>", [("now", "{}")]),
        ("llama3_json", "if (x) { return {}; }", "if (x) { return {}; }", []),
        ("llama3_json", '{"name": "x", "parameters": {}}', '{"name": "x", "parameters": {}}', []),
        ("llama3_json", '{"name": "now"}', '{"name": "now"}', []),
        ("llama3_json", '{"name": "now", "age": {"a": 1}}', '{"name": "now", "age": {"a": 1}}', []),
        ("llama3_json", '{"parameters": {}, "name": "now"}', '{"parameters": {}, "name": "now"}', []),
        ("pythonic", "[1, 2] and [now] and [x(a=1)]", "[1, 2] and [now] and [x(a=1)]", []),
        ("pythonic", "[now(1)]", "[now(1)]", []),
        ("llama4_pythonic", "<|python_start|>print(1)", "<|python_start|>print(1)", []),
        ("mistral", "[TOOL_CALLS] is a mark", "[TOOL_CALLS] is a mark", []),
        ("qwen3_coder", "<tool_call>\n<fun", "<tool_call>\n<fun", []),
        ("qwen3_coder", "<function=a b>", "<function=a b>", []),
        ("glm4", "<tool_call> is a mark\n", "<tool_call> is a mark\n", []),
        # Marks say that it is a call, whether or not the tool is known.
        ("hermes", '<tool_call>{"name": "x", "arguments": {}}</tool_call>', "", [("x", "{}")]),
        ("mistral", "[TOOL_CALLS]x[ARGS]{}", "", [("x", "{}")]),
        # Arguments in front of the name, as text, or none.
        (
            "hermes",
            '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>',
            "",
            [("now", '{"a": 1}')],
        ),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}', "", [("now", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}', "", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "now", "id": [1]}', "", [("now", "{}")]),
        # Broken or cut off after its name: a call with what there is; the rest is content.
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "b', "", [("now", '{"a": "b')]),
        ("hermes", '<tool_call>{"name": "now", "ar', "", [("now", "")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{}"; c', "; c", [("now", "{}")]),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{}', "", [("now", '"{}')]),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "now"; c', "; c", [("now", '{"a": 1}')]),
        ("llama3_json", '{"name": "now", "parameters": "{}"; c', '{"name": "now", "parameters": "{}"; c', []),
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": {"a"; 1}}</tool_call>c',
            "c",
            [("now", '{"a"; 1}}')],
        ),
        ("hermes", '<tool_call>{"name": "now", "arguments": {}}}</tool_call> c', "} c", [("now", "{}")]),
        (
            "hermes",
            '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>"}}',
            "",
            [("now", '{"a": "</tool_call>"}')],
        ),
        (
            "mistral",
            '[TOOL_CALLS]now[ARGS]{"a"; [TOOL_CALLS]now[ARGS]{}',
            "",
            [("now", '{"a"; '), ("now", "{}")],
        ),
        ("mistral", '[TOOL_CALLS] [{"name": "now"}, 5] c', ", 5] c", [("now", "{}")]),
        ("pythonic", "[now(a=1, b=f(2))] c", "(2))] c", [("now", '{"a": 1, "b": "f"')]),
        ("pythonic", "[now(a='b", "", [("now", '{"a": ')]),
        ("qwen3_coder", "<function=now>\n<parameter=a>\nb\n", "", [("now", '{"a": b\n')]),
        (
            "qwen3_coder",
            "<function=get_weather>\n<parameter=city>\nb\n",
            "",
            [("get_weather", '{"city": "b\\n')],
        ),
        (
            "glm4",
            "<tool_call>now<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>",
            "",
            [("now", '{"a": 1}')],
        ),
        # An end that was left out.
        (
            "qwen3_coder",
            "<function=get_weather>\n<parameter=city>\nb\n<parameter=days>\n1\n</function>\nc",
            "\nc",
            [("get_weather", '{"city": "b", "days": 1}')],
        ),
        ("deepseek_v31", f"{DS_ALL}{DS_BEGIN}now{DS_SEP}{{}}{DS_END}{DS_DONE}", "", [("now", "{}")]),
        ("deepseek_v3", f"{DS_ALL}{DS_BEGIN}function{DS_SEP}now\n{{}}", "", [("now", "{}")]),
    ],
)
def test_calls_and_content(form: str, text: str, content: str, calls: list[tuple[str, str]]):
    found = parse(text, form)
    assert (found.content, found.named) == (content, calls)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "5", "5"),
        ("city", "null", "null"),
        ("city", ' "a" ', ' "a" '),
        ("days", " 5 ", 5),
        ("days", "5.0", 5),
        ("days", "five", "five"),
        ("days", "05", "05"),
        ("days", "None", None),
        ("unit", "None", None),
        ("unit", "none of them", "none of them"),
        ("exact", "True", True),
        ("where", '{"a": "</parameter></arg_value>"}', {"a": "</parameter></arg_value>"}),
        ("where", "{'a': [True, None, 'it\\'s']}", {"a": [True, None, "it's"]}),
        ("where", "[1", "[1"),
        ("unknown", "5", 5),
        ("unknown", "NaN", "NaN"),
        ("unknown", "[" * 5000, "[" * 5000),
        ("unknown", "a\nb", "a\nb"),
    ],
)
def test_values_between_tags_have_the_types_of_the_schema(key: str, text: str, value: object):
    qwen = f"<function=get_weather>\n<parameter={key}>\n{text}\n</parameter>\n</function>"
    glm = f"<tool_call>get_weather\n<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    for form, written in (("qwen3_coder", qwen), ("glm4", glm)):
        [call] = parse([written], form).calls
        assert json.loads(call.arguments) == {key: value}


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("'a\\'b'", "a'b"),
        ('"a\\"\\u00e9\\x41\\101\\n"', 'a"éAA\n'),
        ("'\\ud83d\\ude00 \\ud800'", "😀 �"),
        ('"""a "quoted" word"""', 'a "quoted" word'),
        ("''", ""),
        ("-1.5e3", -1500.0),
        ("(1, [2, {}],)", [1, [2, {}]]),
        ("{'a': {1: None}, 'b': true,}", {"a": {"1": None}, "b": True}),
        ("[{}, {'a': []}, 'b']", [{}, {"a": []}, "b"]),
        ("Paris", "Paris"),
        ("[" * 3000 + "]" * 3000, ...),
    ],
)
def test_literals_of_python(literal: str, value: object):
    [call] = parse([f"[now(a={literal}, )]"], "pythonic").calls
    if value is ...:
        assert call.arguments == f'{{"a": {literal}}}'
    else:
        assert json.loads(call.arguments) == {"a": value}


@pytest.mark.parametrize(
    "literal",
    ["{'a'}", "{'a': }", "{1, 2}", "{(1,): 2}", "[1 2]", "[1: 2]", "[,]", "f(1)", "'a' 'b'", "", ":"],
)
def test_what_is_no_literal_breaks_its_call_off(literal: str):
    found = parse(f"[now(a={literal})] after", "pythonic")
    assert found.named[0][0] == "now"
    assert found.content.endswith(")] after")
    with pytest.raises(ValueError, match=r"\w"):
        json.loads(found.calls[0].arguments)


@pytest.mark.parametrize(
    ("form", "text", "is_open", "reasoning", "content"),
    [
        ("qwen3", "<think>\nI see.\n</think>\n\nYes.", False, "I see.", "Yes."),
        ("qwen3", "\n<think></think>Yes.", False, "", "Yes."),
        ("qwen3", "Yes.", False, "", "Yes."),
        ("qwen3", "\n Yes <think> no", False, "", "\n Yes <think> no"),
        ("qwen3", "Yes</think>", False, "", "Yes</think>"),
        ("deepseek_r1", "I see.\n</think>\n\nYes.", True, "I see.", "Yes."),
        ("deepseek_r1", "<think>\nI see.\n</think>Yes.", True, "I see.", "Yes."),
        ("deepseek_r1", "I see <th", True, "I see <th", ""),
        ("mistral", "[THINK]I see.[/THINK]Yes.", False, "I see.", "Yes."),
        (
            "granite",
            "Here is my thought process:\nI see.\nHere is my response: Yes.",
            False,
            "I see.",
            "Yes.",
        ),
        (
            "harmony",
            "<|channel|>analysis<|message|>I see.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
            False,
            "I see.",
            "Yes.",
        ),
        ("harmony", "Yes.", False, "", "Yes."),
        ("harmony", "<|channel|>analysis<|message|>I see.<|end|>Yes.", False, "I see.", "Yes."),
        ("harmony", "<|channel|>commentary to=functions.now<|message|>{}<|call|>", False, "", "{}"),
        ("harmony", "<|channel|>analysis to=python<|message|>1+1<|call|>", False, "1+1", ""),
    ],
)
def test_reasoning(form: str, text: str, is_open: bool, reasoning: str, content: str):
    found = parse(text, None, form, is_reasoning_open=is_open)
    assert (found.reasoning, found.content, found.calls) == (reasoning, content, [])


def test_thinking_then_a_call():
    text = f"<think>Should I <tool_call>? Yes.</think>\n\n{WRITTEN['hermes'][1]}"
    found = parse(text, "hermes", "qwen3")
    assert (found.reasoning, found.content, found.named) == (
        "Should I <tool_call>? Yes.",
        "",
        [("now", "{}")],
    )


def test_special_tokens_are_dropped_from_texts():
    found = parse("<think>a<|x|>b</think>c<|x|>d<|y|", None, "qwen3", special_tokens=["<|x|>", "<|y|>"])
    assert (found.reasoning, found.content) == ("ab", "cd<|y|")
    found = parse(f"{WRITTEN['llama3_json'][0]}<|eom_id|>", "llama3_json", special_tokens=["<|eom_id|>"])
    assert (len(found.calls), found.content) == (1, "")


@pytest.mark.parametrize("form", sorted(set(FORMATS) - {"pythonic", "llama4_pythonic"}))
def test_arguments_stream(form: str):
    """Each character of a long text is passed on by the time that some more have come."""
    begin, _, rest = WRITTEN[form][0].partition("Par")
    parser, total = new_parser(form), Sum()
    total.add(parser.push(begin))
    assert [call.name for call in total.calls] == ["get_weather"]
    for size in range(1, 200):
        total.add(parser.push("x"))
        assert total.calls[0].arguments.count("x") >= size - 1
    total.add(parser.push(rest))
    total.add(parser.finish())
    assert json.loads(total.calls[0].arguments)["city"].startswith("x" * 199)


def test_content_streams():
    parser = new_parser("hermes", "qwen3")
    assert [parser.push(piece).content for piece in ("One", " <b>", " two", " <tool_", "call> three")] == [
        *("One", " <b>", " two", ""),
        " <tool_call> three",
    ]


def test_much_in_front_of_a_name_is_content():
    long = '<tool_call>{"arguments": {"a": "%s"}, "name": "now"}</tool_call>'
    for length, is_call in ((MAX_HELD // 2, True), (MAX_HELD, False)):
        text = long % ("x" * length)
        for size in (7, 4096, len(text)):
            found = parse([text[at : at + size] for at in range(0, len(text), size)], "hermes")
            assert bool(found.calls) is is_call
            assert found.content == ("" if is_call else text)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "unit",
    ['{"a":', '{"name":"now","id":{', "[", "[now(a=", '<tool_call>{"a":', "[TOOL_CALLS]{", "<function="],
)
def test_hostile_text_costs_little(form: str, unit: str):
    """What begins over and over is looked at a bounded number of times: quadratic, this takes minutes."""
    text = unit * (100_000 // len(unit))
    parse([text[at : at + 1000] for at in range(0, len(text), 1000)], form)


def test_harmony_needs_no_reasoning_format():
    assert HARMONY.begins == ()
    assert isinstance(TOOL_FORMATS["openai"], HarmonyCalls)
    found = parse("<|channel|>analysis<|message|>a<|end|>" + WRITTEN["harmony"][0], "harmony")
    assert (found.reasoning, len(found.calls)) == ("a", 1)
