"""Every composed format compiles, and what it lets a model write is read as the calls that it stands for."""

import functools
import json
import random
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken

import baton
from baton.grammars import formats
from baton.grammars.guidance import GuidanceCompiler
from baton.tokenizer.backend import read_tokenizer
from baton_router.chat_output.constraints import answer_format
from baton_router.chat_output.formats import REASONING_FORMATS, TOOL_FORMATS
from baton_router.chat_output.tools import Tool, ToolChoice, ToolMode
from tests.router_front.chat_output.sums import Sum, parse

DEEPSEEK = TOOL_FORMATS["deepseek_v3"]
FORMATS = sorted({form.name for form in TOOL_FORMATS.values()})
REQUIRED, AUTO, NONE = (ToolChoice(mode) for mode in (ToolMode.REQUIRED, ToolMode.AUTO, ToolMode.NONE))
ANY_OBJECT = {"type": "object"}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
TOOLS = (
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
                "exact": {"type": "boolean"},
                "hours": {"type": "array", "items": {"enum": [6, 12, 18]}, "maxItems": 3},
                "place": {"$ref": "#/$defs/place"},
                "note": {"type": ["string", "null"]},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {
                "place": {
                    "type": "object",
                    "properties": {"street": {"type": "string"}},
                    "required": ["street"],
                    "additionalProperties": False,
                }
            },
        },
        strict=True,
    ),
    Tool("now", {"type": "object", "properties": {}, "additionalProperties": False}),
    Tool("log.it", {"type": "object", "properties": {"level": {"enum": [1, 2]}, "text": {"type": "string"}}}),
)
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}
# What ends strings, objects, values and thinking: a walk that only chose at random would not end.
ENDS = [
    '"',
    '"}',
    "}",
    "]",
    "</think>",
    "[/THINK]",
    "Here is my response:",
    "\n</parameter>\n",
    "</arg_value>",
]
ENDS += [
    "<|end|>",
    "<|channel|>final<|message|>",
    "<|channel|>commentary to=functions.now",
    ")",
    "</function>\n</tool_call>",
    "</tool_call>",
]
WALKS = 12


def tokenizer_with(special_tokens: list[str]) -> tokenizers.Tokenizer:
    """The shipped model's, with more special tokens."""
    backend = read_tokenizer(Path(baton.__file__).parent / "demo_model").backend
    backend.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    return backend


class Walks:
    """Writes texts that a format allows."""

    def __init__(self, special_tokens: list[str]) -> None:
        self._backend = tokenizer_with(special_tokens)
        self._size = self._backend.get_vocab_size(with_added_tokens=True)
        eos = self._backend.token_to_id("</s>")
        assert eos is not None
        self._eos = eos
        self._compiler = GuidanceCompiler(self._backend, self._size, [self._eos])

    def compile(self, form: formats.Format | None):
        assert form is not None
        return self._compiler.compile(formats.from_text(formats.to_text(form)))

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def walk(self, grammar, seed: int) -> str | None:
        """A text, or None if it has not come to its end within some hundred tokens."""
        chance = random.Random(seed)
        matcher, ids = grammar.matcher(), []
        planned: list[int] = []
        for step in range(500):
            mask = matcher.allowed(ids)
            assert matcher.failure is None
            bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
            allowed = bits[: self._size].nonzero()[0].tolist()
            if self._eos in allowed and (len(allowed) == 1 or chance.random() < 0.4):
                return self._backend.decode(ids, skip_special_tokens=False)
            if not planned and chance.random() < (0.4 if step < 100 else 0.95):
                planned = self.encode(chance.choice(ENDS))
            if planned and planned[0] in allowed:
                ids.append(planned.pop(0))
            else:
                planned = []
                ids.append(chance.choice([i for i in allowed if i != self._eos]))
        return None


def special_tokens_of(name: str) -> list[str]:
    return {
        "harmony": [
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|channel|>",
            "<|constrain|>",
            "<|call|>",
            "<|return|>",
        ],
        "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"],
        "mistral_v3": ["[TOOL_CALLS]"],
        "llama3_json": ["<|python_tag|>", "<|eom_id|>"],
        "deepseek_v3": [*DEEPSEEK.begins, *DEEPSEEK.ends, *DEEPSEEK.ignored],
    }.get(name, [])


@functools.cache
def kit_of(name: str, *, are_special: bool = False) -> Walks:
    """Marks are text, as in most models, or special tokens, as harmony's always are."""
    return Walks(special_tokens_of(name) if are_special or name == "harmony" else [])


def check_calls(found: Sum, schemas=SCHEMAS) -> None:
    for name, arguments in found.named:
        jsonschema.validate(json.loads(arguments), schemas[name])


def walks(kit: Walks, form: formats.Format | None, count: int = WALKS) -> list[str]:
    grammar = kit.compile(form)
    texts = [text for seed in range(count) if (text := kit.walk(grammar, seed)) is not None]
    assert len(texts) >= count // 2, "too few walks come to an end"
    return texts


def reasoning_of(name: str) -> str:
    return {"harmony": "harmony", "mistral": "mistral"}.get(name, "qwen3")


@pytest.mark.parametrize(
    ("name", "are_special"),
    [(name, False) for name in FORMATS] + [(name, True) for name in FORMATS if special_tokens_of(name)],
)
def test_required_calls_are_calls(name: str, are_special: bool):
    form = answer_format(tool_format=TOOL_FORMATS[name], reasoning_format=None, tools=TOOLS, choice=REQUIRED)
    for text in walks(kit_of(name, are_special=are_special), form):
        found = parse([text], name, tools=TOOLS)
        assert found.calls, text
        assert (found.content, {call.name for call in found.calls} - SCHEMAS.keys()) == ("", set()), text
        check_calls(found)


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_tool_is_called_once(name: str):
    for tool in TOOLS:
        choice = ToolChoice(ToolMode.REQUIRED, tool.name)
        form = answer_format(
            tool_format=TOOL_FORMATS[name], reasoning_format=None, tools=TOOLS, choice=choice
        )
        for text in walks(kit_of(name), form, 4):
            found = parse([text], name, tools=TOOLS)
            assert ([call.name for call in found.calls], found.content) == ([tool.name], ""), text
            check_calls(found)


@pytest.mark.parametrize(
    ("name", "is_open"),
    [
        (name, is_open)
        for name in FORMATS
        for is_open in (False, True)
        if (name, is_open) != ("harmony", True)
    ],
)
def test_thinking_comes_first(name: str, is_open: bool):
    reasoning = reasoning_of(name)
    form = answer_format(
        tool_format=TOOL_FORMATS[name],
        reasoning_format=REASONING_FORMATS[reasoning],
        tools=TOOLS,
        choice=REQUIRED,
        parallel=False,
        is_reasoning_open=is_open,
    )
    thought = 0
    for text in walks(kit_of(name), form):
        found = parse([text], name, reasoning, tools=TOOLS, is_reasoning_open=is_open)
        assert len(found.calls) == 1, text
        thought += bool(found.reasoning)
        check_calls(found)
    assert thought


@pytest.mark.parametrize("name", FORMATS)
def test_auto_is_free_unless_a_tool_is_strict(name: str):
    fields: dict = {
        "tool_format": TOOL_FORMATS[name],
        "reasoning_format": REASONING_FORMATS[reasoning_of(name)],
    }
    assert answer_format(**fields, tools=TOOLS[1:], choice=AUTO) is None
    assert answer_format(**fields, tools=TOOLS, choice=NONE) is None
    assert answer_format(**fields) is None
    assert answer_format(**fields, tools=TOOLS[1:], choice=AUTO, parallel=False) is not None
    form = answer_format(**fields, tools=TOOLS, choice=AUTO)
    for text in walks(kit_of(name), form):
        found = parse([text], name, reasoning_of(name), tools=TOOLS)
        check_calls(found, dict.fromkeys(SCHEMAS, ANY_OBJECT) | {"get_weather": SCHEMAS["get_weather"]})


@pytest.mark.parametrize("name", FORMATS)
def test_text_may_stand_around_calls_of_strict_tools(name: str):
    """In formats with marks; what breaks the schema can't be written."""
    form = answer_format(tool_format=TOOL_FORMATS[name], reasoning_format=None, tools=TOOLS[:1], choice=AUTO)
    grammar = kit_of(name).compile(form)
    written = TOOL_FORMATS[name].written
    begin = f"{written.section_begin}{written.before_name}get_weather{written.after_name}"
    text = "<|channel|>final<|message|>Some text." if name == "harmony" else "Some text."
    wrong = '{"' if not hasattr(TOOL_FORMATS[name], "key_begin") else "<"
    for output, is_fine in (
        (text, True),
        (begin + wrong + "town", False),
        (begin.replace("get_weather", "x"), name.endswith("pythonic")),
    ):
        ids = kit_of(name).encode(output)
        matcher = grammar.matcher()
        for count in range(len(ids)):
            mask = matcher.allowed(ids[:count])
            if not mask[ids[count] // 8] >> (ids[count] % 8) & 1:
                break
        else:
            count = len(ids)
        assert (count == len(ids)) is is_fine, output


@pytest.mark.parametrize("name", FORMATS)
def test_a_response_format_holds_behind_thinking_or_there_are_calls(name: str):
    reasoning = reasoning_of(name)
    fields: dict = {"tool_format": TOOL_FORMATS[name], "reasoning_format": REASONING_FORMATS[reasoning]}
    for choice in (AUTO, NONE):
        form = answer_format(**fields, tools=TOOLS[1:], choice=choice, response=formats.json_schema(PERSON))
        for text in walks(kit_of(name), form, 8):
            found = parse([text], name if choice is AUTO else None, reasoning, tools=TOOLS)
            if not found.calls:
                jsonschema.validate(json.loads(found.content), PERSON)
            check_calls(found, dict.fromkeys(SCHEMAS, ANY_OBJECT))


def test_a_response_format_without_tools_or_thinking_is_itself():
    response = formats.json_schema(PERSON)
    assert answer_format(tool_format=None, reasoning_format=None, response=response) is response
    assert answer_format(tool_format=None, reasoning_format=REASONING_FORMATS["qwen3"]) is None


@pytest.mark.parametrize("name", ["qwen3_coder", "glm4", "pythonic"])
def test_schemas_that_tags_cannot_say_keep_the_names_alone(name: str):
    tools = (
        Tool("f", {"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}),
        Tool("g", {"type": "object", "properties": {"a <b>": {"type": "string"}}}),
        Tool("h", {"type": "object"}),
    )
    form = answer_format(tool_format=TOOL_FORMATS[name], reasoning_format=None, tools=tools, choice=REQUIRED)
    for text in walks(kit_of(name), form):
        found = parse([text], name, tools=tools)
        assert found.calls
        assert found.content == ""
        check_calls(found, dict.fromkeys("fgh", ANY_OBJECT))


@pytest.mark.parametrize("reasoning", sorted({form.name for form in REASONING_FORMATS.values()}))
def test_every_thinking_compiles(reasoning: str):
    form = answer_format(
        tool_format=None, reasoning_format=REASONING_FORMATS[reasoning], response=formats.json_object()
    )
    for text in walks(kit_of(reasoning), form, 4):
        assert isinstance(json.loads(parse([text], None, reasoning).content), dict)


@pytest.mark.parametrize("name", FORMATS)
def test_many_tools_compile(name: str):
    tools = [Tool(f"tool_{index}", TOOLS[0].parameters, strict=True) for index in range(60)]
    for choice in (REQUIRED, AUTO):
        form = answer_format(
            tool_format=TOOL_FORMATS[name], reasoning_format=None, tools=tools, choice=choice
        )
        kit_of(name).compile(form)
