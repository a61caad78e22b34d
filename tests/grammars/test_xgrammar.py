"""The second backend keeps the same formats, but for what it is known not to."""

import json
import random
import sys
from typing import Any

import jsonschema
import pytest

from baton.core.errors import InvalidRequest
from baton.grammars import formats
from baton.grammars.compiler import GrammarCompiler
from baton.grammars.xgrammar import XgrammarCompiler
from baton.tokenizer.backend import TokenizerFiles, read_tokenizer
from tests.e2e.processes import DEMO_MODEL
from tests.grammars.schemas_of_people import INTEGER, SCHEMAS, SHORT, closed
from tests.grammars.test_guidance import CASES, END, VOCABULARY_SIZE, allows, follow

pytest.importorskip("xgrammar")

# Formats that it refuses, and texts that it takes though the format does not.
REFUSED = ("(?i)", "is_compact")
ALSO_TAKEN = {'{"a":  1}', "{\n\n}", "<|assistant|>"}
MAX_TOKENS = 400


@pytest.fixture(scope="module")
def files() -> TokenizerFiles:
    return read_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def compiler(files: TokenizerFiles) -> XgrammarCompiler:
    return XgrammarCompiler(files.backend, VOCABULARY_SIZE, [END])


@pytest.mark.parametrize(("form", "whole", "wrong"), CASES, ids=lambda value: str(value)[:40])
def test_formats(
    compiler: XgrammarCompiler,
    files: TokenizerFiles,
    form: formats.Format,
    whole: list[str],
    wrong: list[str],
) -> None:
    if any(name in str(form) for name in REFUSED):
        with pytest.raises(InvalidRequest):
            compiler.compile(form)
        return
    wrong = [answer for answer in wrong if answer not in ALSO_TAKEN]
    assert {answer: follow(compiler, files, form, answer) for answer in whole} == dict.fromkeys(whole, True)
    assert {answer: follow(compiler, files, form, answer) for answer in wrong} == dict.fromkeys(wrong)


@pytest.mark.parametrize("seed", range(5))
def test_answers_keep_their_schema(compiler: XgrammarCompiler, files: TokenizerFiles, seed: int) -> None:
    numbers = random.Random(seed)
    schema = closed({"n": INTEGER, "s": SHORT, "l": {"type": "array", "items": INTEGER, "maxItems": 2}})
    grammar = compiler.compile(formats.json_schema(schema))
    matcher, output = grammar.matcher(), []
    while len(output) < MAX_TOKENS:
        mask = matcher.allowed(output)
        assert grammar.matcher().allowed(output) == mask
        if allows(mask, END):
            break
        output.append(numbers.choice([i for i in range(VOCABULARY_SIZE) if allows(mask, i)]))
    else:
        pytest.skip("a number of hundreds of digits")
    jsonschema.validate(json.loads(files.backend.decode(output)), schema)
    matcher.allowed([*output, 5])
    assert matcher.failure is not None


def test_it_takes_the_schemas_of_people(compiler: XgrammarCompiler) -> None:
    for schema in SCHEMAS:
        compiler.compile(formats.json_schema(schema))


def test_what_it_refuses_says_why(compiler: XgrammarCompiler) -> None:
    with pytest.raises(InvalidRequest, match="regex"):
        compiler.compile({"type": "regex", "pattern": "("})


def test_a_request_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is missing, the error says what to install."""
    form: dict[str, Any] = {**formats.json_object(), "backend": "xgrammar"}
    grammars = GrammarCompiler(DEMO_MODEL, VOCABULARY_SIZE, [END])
    assert type(grammars.compile(json.dumps(form))).__name__ == "XgrammarGrammar"
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(InvalidRequest, match=r"install baton-serve\[structured-outputs\]"):
        GrammarCompiler(DEMO_MODEL, VOCABULARY_SIZE, [END]).compile(json.dumps(form))
    with pytest.raises(InvalidRequest, match="'other'"):
        grammars.compile(json.dumps({**form, "backend": "other"}))
