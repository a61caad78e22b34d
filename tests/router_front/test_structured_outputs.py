"""What clients say of an answer's form reaches the workers as one format, or is refused with its name."""

import json
from typing import Any

import httpx
import pytest

from baton.grammars import formats
from baton.v1 import inference_pb2 as pb
from baton_router.grpc_front import InferenceServicer
from baton_router.served_model import ServedModel
from baton_router.structured_outputs import FormatChecks
from tests.router_front.fake_backend import FakeBackend

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "hi"},
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
TAG = {"type": "tag", "begin": "<f>", "content": formats.json_schema(SCHEMA), "end": "</f>"}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<f"], "tags": [TAG]}
STRUCTURES = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}

# what a body says, and the format that the workers get; None: none
SAID: list[tuple[dict[str, Any], formats.Format | None]] = [
    ({"response_format": None, "structured_outputs": None}, None),
    ({"response_format": {"type": "text"}, "structured_outputs": {}}, None),
    ({"structured_outputs": {"json": None, "json_object": False, "disable_any_whitespace": False}}, None),
    ({"response_format": {"type": "json_object"}}, formats.json_object()),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, formats.json_schema(SCHEMA)),
    ({"response_format": NAMED}, formats.json_schema(SCHEMA)),
    ({"response_format": {"type": "structural_tag", **STRUCTURES}}, TRIGGERED),
    ({"response_format": {"type": "structural_tag", "format": TAG}}, TAG),
    ({"structured_outputs": {"json": SCHEMA, "disable_fallback": True}}, formats.json_schema(SCHEMA)),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, formats.json_schema(SCHEMA)),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
     {**formats.json_schema(SCHEMA), "is_compact": True}),
    ({"structured_outputs": {"json_object": True, "regex": None}}, formats.json_object()),
    ({"structured_outputs": {"regex": "a+"}}, {"type": "regex", "pattern": "a+"}),
    ({"structured_outputs": {"choice": ["a", "b"]}}, formats.choice(["a", "b"])),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, {"type": "grammar", "grammar": 'start: "a"'}),
    ({"structured_outputs": {"structural_tag": json.dumps(STRUCTURES)}}, TRIGGERED),
    ({"structured_outputs": {"structural_tag": {"format": TRIGGERED}}}, TRIGGERED),
]  # fmt: skip

# what a body says, the param of its error, a word of the message
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": "json"}, "response_format", "an object"),
    ({"response_format": {}}, "response_format.type", "None"),
    ({"response_format": {"type": "json_object", "schema": 5}},
     "response_format.schema.json_schema", "a JSON schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
     "response_format.json_schema", "schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "text"}}}},
     "response_format", "Invalid type: text"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
     "response_format.json_schema.schema.json_schema", "a JSON schema"),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "structures and triggers"),
    ({"response_format": NAMED, "structured_outputs": {"regex": "a"}}, "structured_outputs", "not both"),
    ({"structured_outputs": "json"}, "structured_outputs", "an object"),
    ({"structured_outputs": {"xml": 1}}, "structured_outputs.xml", "no field 'xml'"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "choice, regex"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex.pattern", "a string"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
    ({"structured_outputs": {"regex": r"[^\s\S]"}}, "structured_outputs", "no text matches"),
    ({"response_format": {"type": "json_object", "schema": {"$ref": "#"}}},
     "response_format", "no text matches"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1 to 10000"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice", "not empty"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "true or false"),
    ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs", "Expected"),
    ({"structured_outputs": {"structural_tag": {"format": {"type": "tag"}}}},
     "structured_outputs.structural_tag", "needs begin"),
    ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " "}},
     "structured_outputs.whitespace_pattern", "not supported"),
    ({"guided_json": SCHEMA}, "guided_json", "not support"),
]  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("said", "form"), SAID, ids=lambda value: str(value)[:50])
async def test_what_workers_get(
    client: httpx.AsyncClient, backend: FakeBackend, path: str, said: dict[str, Any], form: Any
) -> None:
    response = await client.post(path, json={**PROMPTS[path], **said})
    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert request.sampling.grammar == ("" if form is None else formats.to_text(form))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("said", "param", "reason"), WRONG, ids=lambda value: str(value)[:50])
async def test_what_is_refused(
    client: httpx.AsyncClient, backend: FakeBackend, path: str, said: dict[str, Any], param: str, reason: str
) -> None:
    response = await client.post(path, json={**PROMPTS[path], **said})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert reason in error["message"]
    assert not backend.requests


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_form_says_where_its_answer_ends(
    client: httpx.AsyncClient, backend: FakeBackend, served: ServedModel, path: str
) -> None:
    """Only end tokens may come after it, so that they stop it whatever `ignore_eos` says."""
    for said in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"regex": "a"}}):
        await client.post(path, json={**PROMPTS[path], "ignore_eos": True, **said})
        assert backend.requests[-1].sampling.stop_token_ids == served.eos_token_ids


async def test_grpc_says_the_same(served: ServedModel) -> None:
    said: list[tuple[pb.StructuredOutputs, formats.Format | None]] = [
        (pb.StructuredOutputs(json=json.dumps(SCHEMA)), formats.json_schema(SCHEMA)),
        (pb.StructuredOutputs(regex="a+"), {"type": "regex", "pattern": "a+"}),
        (pb.StructuredOutputs(choice=pb.Choices(texts=["a", "b"])), formats.choice(["a", "b"])),
        (pb.StructuredOutputs(grammar='start: "a"'), {"type": "grammar", "grammar": 'start: "a"'}),
        (pb.StructuredOutputs(json_object=True), formats.json_object()),
        (pb.StructuredOutputs(structural_tag=json.dumps({"format": TAG})), TAG),
        (pb.StructuredOutputs(), None),
    ]
    for message, form in said:
        sampling = pb.Sampling(structured_outputs=message)
        request = pb.GenerateRequest(text="hi", sampling=sampling)
        built, _ = await InferenceServicer(served)._generation(request)
        assert built.sampling.grammar == ("" if form is None else formats.to_text(form))


async def test_another_backend_is_named_to_the_workers() -> None:
    text = formats.to_text(formats.json_object())
    named = await FormatChecks("xgrammar").checked(text, "response_format")
    assert json.loads(named) == {**formats.json_object(), "backend": "xgrammar"}
    assert await FormatChecks("guidance").checked(text, "response_format") == text
