"""Formats as grammars of llguidance: what they take, what errors say, what masks depend on."""

import random
from typing import Any

import pytest

from baton.core.errors import InvalidRequest
from baton.grammars import formats, guidance
from baton.grammars.compiler import Compiler, GrammarCompiler
from baton.grammars.guidance import GuidanceCompiler
from baton.tokenizer.backend import TokenizerFiles, read_tokenizer
from tests.e2e.processes import DEMO_MODEL

VOCABULARY_SIZE, END = 4096, 1


def text(value: str) -> formats.Format:
    return {"type": "const_string", "value": value}


def tag(begin: str, content: formats.Format, end: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


ANY: formats.Format = {"type": "any_text"}
NUMBERED = formats.json_schema(
    {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
)
F, G = tag("<f>", NUMBERED, "</f>"), tag("<g>", ANY, ["</g>", "</end>"])
TRIGGERED = {"type": "triggered_tags", "triggers": ["<f", "<g"], "tags": [F, G]}
SPECIAL = {
    "type": "triggered_tags",
    "triggers": ["<|user|>"],
    "tags": [tag("<|user|>", NUMBERED, "<|assistant|>")],
}
SEPARATED = {"type": "tags_with_separator", "tags": [F, G], "separator": ", "}

# format, texts that are whole answers, texts that can't become any
CASES: list[tuple[formats.Format, list[str], list[str]]] = [
    (formats.choice(["yes", 'a"b\n/\\', "no"]), ["yes", 'a"b\n/\\'], ["maybe", "yess"]),
    ({"type": "regex", "pattern": r"^\d{2}/[a-z]+$"}, ["12/ab"], ["1x", "12/A"]),
    ({"type": "regex", "pattern": "(?i)ok|日本"}, ["OK", "日本"], ["x"]),
    (formats.json_object(), ['{"a": [1, {"b": null}]}', "{\n  }"], ["[1]", '{"a":  1}', "{\n\n}"]),
    ({**formats.json_object(), "is_compact": True}, ['{"a":1}'], ['{"a": 1}']),
    ({"type": "grammar", "grammar": 'start: "a" b\nb: "c"+'}, ["acc"], ["ab"]),
    ({"type": "grammar", "grammar": 'root ::= "a" b\nb ::= "c"+'}, ["acc"], ["ab"]),
    ({"type": "sequence", "elements": [text("x"), {"type": "grammar", "grammar": 'start: "a"+'}]},
     ["xaa"], ["a"]),
    ({"type": "sequence", "elements": [tag("<think>", ANY, "</think>"), NUMBERED]},
     ['<think>{"x"</think>{"x":1}'], ["<think></think>x", "x"]),
    ({"type": "sequence", "elements": [tag("", ANY, "<|user|>"), NUMBERED]},
     ['th<ink<|user|>{"x":1}'], ["a<|user|>b"]),
    (TRIGGERED, ["no tag", '<f>{"x":1}</f> and <g>any</end>', "<"], ['<f>{"y"', "<g>any</g><h<f>{1", "<fx"]),
    ({**TRIGGERED, "at_least_one": True}, ['<f>{"x":1}</f> u <g>v</g>'], ["<f>1", "t", "t <f>"]),
    ({**TRIGGERED, "at_least_one": True, "stop_after_first": True}, ["<g>u</g>"], ["t", "<g>u</g>t"]),
    ({**TRIGGERED, "stop_after_first": True}, ["t", "t <g>u</g>"], ["<g>u</g>t"]),
    (SPECIAL, ["t", 't<|user|>{"x":1}<|assistant|>t'], ["<|user|>t", "<|assistant|>"]),
    ({**SEPARATED, "at_least_one": True}, ['<f>{"x":1}</f>, <g>t</g>'], ["t", '<f>{"x":1}</f>,t']),
    (SEPARATED, ["", "<g>t</g>"], ["t"]),
    ({**SEPARATED, "stop_after_first": True}, ["<g>t</g>"], ["<g>t</g>, "]),
    ({"type": "any_text", "excludes": ["foo", "a/b"]}, ["fo", "a b"], ["a foo", "xa/b"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def files() -> TokenizerFiles:
    return read_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def compiler(files: TokenizerFiles) -> GuidanceCompiler:
    return GuidanceCompiler(files.backend, VOCABULARY_SIZE, [END])


def allows(mask: bytes, token_id: int) -> bool:
    return bool(mask[token_id // 8] >> token_id % 8 & 1)


def follow(compiler: Compiler, files: TokenizerFiles, form: formats.Format, answer: str) -> bool | None:
    """Whether the answer may end there; None: it can't come to that."""
    matcher = compiler.compile(formats.from_text(formats.to_text(form))).matcher()
    token_ids = files.backend.encode(answer, add_special_tokens=False).ids
    for count, token_id in enumerate(token_ids):
        if not allows(matcher.allowed(token_ids[:count]), token_id):
            return None
    return allows(matcher.allowed(token_ids), END)


@pytest.mark.parametrize(("form", "whole", "wrong"), CASES, ids=lambda value: str(value)[:40])
def test_formats(
    compiler: GuidanceCompiler,
    files: TokenizerFiles,
    form: formats.Format,
    whole: list[str],
    wrong: list[str],
) -> None:
    assert {answer: follow(compiler, files, form, answer) for answer in whole} == dict.fromkeys(whole, True)
    assert {answer: follow(compiler, files, form, answer) for answer in wrong} == dict.fromkeys(wrong)
    guidance.check(form)


DEEP: Any = {"type": "integer"}
for _ in range(formats.MAX_DEPTH):
    DEEP = {"type": "array", "items": DEEP}

# what is wrong, where the error says it is, what it says
WRONG: list[tuple[Any, str | None, str]] = [
    ("text", "structured_outputs", "an object"),
    ({"type": "yaml"}, "structured_outputs", "'yaml'"),
    ({"type": ["regex"]}, "structured_outputs", "type"),
    ({"type": "regex"}, "structured_outputs", "needs pattern"),
    ({"type": "regex", "pattern": 1}, "structured_outputs.pattern", "a string"),
    ({"type": "sequence", "elements": [ANY, {"type": "x"}]}, "structured_outputs.elements[1]", "'x'"),
    ({"type": "or", "elements": []}, "structured_outputs.elements", "not empty"),
    ({"type": "any_text", "excludes": [""]}, "structured_outputs.excludes", "not empty"),
    ({**TRIGGERED, "tags": [ANY]}, "structured_outputs.tags[0]", "'tag'"),
    ({**TRIGGERED, "triggers": ["<f"]}, "structured_outputs.tags[1].begin", "none of the triggers"),
    ({**TRIGGERED, "at_least_one": 1}, "structured_outputs.at_least_one", "true or false"),
    (tag("<f>", ANY, []), "structured_outputs.end", "a string or a list"),
    (formats.json_schema(DEEP), "structured_outputs", "levels deep"),
    ({"type": "regex", "pattern": "a" * 1_000_000}, "structured_outputs", "characters"),
]


@pytest.mark.parametrize(("form", "param", "reason"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_no_format(form: Any, param: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refused:
        formats.to_text(form)
    assert refused.value.param == param


NESTED = {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, {"items": {"type": "text"}}]}}}
# a schema, what the error says of the place, and of the reason
FAULTS: list[tuple[Any, str, str]] = [
    ({"type": "text"}, "In the JSON schema: ", "Invalid type: text"),
    (NESTED, "At properties['a'].anyOf[1].items of the JSON schema", '{"type": "text"}'),
    ({"$defs": {"d": {"if": {}}}, "items": {"$ref": "#/$defs/d"}}, "At $defs['d']", "if"),
    ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "At properties['a']", "does not exist"),
    ({"items": {"type": "string", "pattern": "(?=a)b"}}, "At items", "look-around"),
    ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "At properties['a']", "not"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "In the JSON schema", "oneOf"),
    ({"minimum": 5, "maximum": 1, "type": "integer"}, "In the JSON schema", "minimum"),
]


@pytest.mark.parametrize(("schema", "where", "reason"), FAULTS, ids=lambda value: str(value)[:40])
def test_errors_say_where_in_the_schema(
    compiler: GuidanceCompiler, schema: Any, where: str, reason: str
) -> None:
    for build in (guidance.check, compiler.compile):
        with pytest.raises(InvalidRequest) as refused:
            build({"type": "sequence", "elements": [ANY, formats.json_schema(schema)]})
        assert where in str(refused.value)
        assert reason in str(refused.value)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "grammar", "grammar": "start: start"},
        {"type": "grammar", "grammar": "start: a\na: b\nb: a"},
        {"type": "regex", "pattern": r"[^\s\S]"},
        formats.json_schema({"$ref": "#"}),
    ],
    ids=str,
)
def test_what_no_text_matches_is_refused(compiler: GuidanceCompiler, form: formats.Format) -> None:
    """Only the first mask shows it, which for such a grammar is that of a complete answer."""
    for refuse in (compiler.compile, guidance.check):
        with pytest.raises(InvalidRequest, match="no text matches it"):
            refuse(form)


def test_formats_that_say_nothing_are_left_out(compiler: GuidanceCompiler, files: TokenizerFiles) -> None:
    """Of a property that has the name of a keyword nothing is left out."""
    schema = {"properties": {"format": {"type": "string", "format": "color"}}, "required": ["format"]}
    form = formats.json_schema({"type": "object", **schema})
    assert follow(compiler, files, form, '{"format": "x"}')
    assert follow(compiler, files, form, "{}") is None


def test_masks_are_a_function_of_the_output(compiler: GuidanceCompiler) -> None:
    """Whether a matcher has followed it token by token or takes it all at once, as after a failover."""
    schema = {"type": "array", "items": {"type": "string", "minLength": 9}, "minItems": 40}
    grammar = compiler.compile(formats.json_schema(schema))
    followed, output = grammar.matcher(), []
    numbers = random.Random(5)
    for _ in range(60):
        mask = followed.allowed(output)
        assert grammar.matcher().allowed(output) == mask == followed.allowed(output)
        choices = [token_id for token_id in range(VOCABULARY_SIZE) if allows(mask, token_id)]
        output.append(numbers.choice(choices))


def test_an_output_that_was_never_allowed_is_told(compiler: GuidanceCompiler) -> None:
    matcher = compiler.compile(formats.json_object()).matcher()
    assert matcher.failure is None
    assert matcher.allowed([END, END]) == b"\xff" * (VOCABULARY_SIZE // 8)
    assert matcher.failure is not None
    assert "after 2 tokens" in matcher.failure


def test_a_grammar_is_compiled_once() -> None:
    grammars = GrammarCompiler(DEMO_MODEL, VOCABULARY_SIZE, [END])
    form = formats.to_text(formats.json_object())
    assert grammars.known(form) is None
    assert grammars.compile(form) is grammars.compile(form) is grammars.known(form)
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        grammars.compile("{")
