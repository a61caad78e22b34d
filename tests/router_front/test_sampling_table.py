"""SamplingParams is the one table of sampling fields: what is a row of it is everywhere."""

from dataclasses import dataclass
from typing import Annotated, Any

import httpx
import pytest
from pydantic import ValidationError

from baton.core.errors import InvalidRequest
from baton.core.fields import (
    Above,
    AlsoOff,
    Between,
    FormatText,
    PublicName,
    Row,
    RulesText,
    TokenIds,
    rows,
)
from baton.core.logits_rules import to_text
from baton.core.request import EngineRequest
from baton.core.sampling import SamplingParams
from baton.grammars import formats
from baton.rpc import codec
from baton.v1 import inference_pb2, worker_pb2
from baton_router.grpc_front import InferenceServicer
from baton_router.http.body import Body, with_fields_of
from baton_router.http.chat import ChatBody
from baton_router.http.completions import CompletionBody
from baton_router.served_model import ServedModel
from tests.router_front.fake_backend import FakeBackend

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "hi"},
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
}


@dataclass(frozen=True, slots=True)
class Example:
    """A value that is not the default, the same as HTTP sends it, and one that is refused."""

    value: Any
    http: Any
    refused: Any

    def grpc(self) -> Any:
        if self.value is WORD:
            return self.http
        if self is EXAMPLES["allowed_token_ids"]:
            return inference_pb2.TokenIds(ids=self.value)
        if isinstance(self.value, RulesText):
            return str(self.value)
        if isinstance(self.value, FormatText):
            return inference_pb2.StructuredOutputs(choice=inference_pb2.Choices(texts=self.http["choice"]))
        return dict(self.value) if isinstance(self.http, dict) else self.value


WORD = ((285, 276),)
CHOICE = formats.to_text(formats.choice(["yes", "no"]))
RULES = to_text({"mine": {"k": 5}})
EXAMPLES = {
    "temperature": Example(0.5, 0.5, 100.5),
    "top_k": Example(7, 7, -2),
    "top_p": Example(0.75, 0.75, 1.5),
    "min_p": Example(0.25, 0.25, 1.5),
    "presence_penalty": Example(1.5, 1.5, -2.5),
    "frequency_penalty": Example(-1.5, -1.5, 2.5),
    "repetition_penalty": Example(1.25, 1.25, 0),
    "seed": Example(5, 5, "x"),  # of any number the low 64 bits count
    "max_tokens": Example(9, 9, 0),
    "min_tokens": Example(3, 3, 10**6),
    "stop_token_ids": Example((5, 6), [5, 6], list(range(129))),
    "logit_bias": Example(((5, -1.5),), {"5": -1.5}, {"5": 101}),
    "num_logprobs": Example(3, 3, 21),
    "n": Example(2, 2, 0),
    "num_prompt_logprobs": Example(3, 3, 21),
    "allowed_token_ids": Example((5, 6), [5, 6], []),
    "bad_words": Example(WORD, ["quick"], [""]),
    "logprob_token_ids": Example((5, 6), [5, 6], [5] * 129),
    "logits_rules": Example(RULES, {"mine": {"k": 5}}, "mine"),
    "grammar": Example(CHOICE, {"choice": ["yes", "no"]}, {"regex": "("}),
}
ROWS = rows(SamplingParams)
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def missing(table: type) -> set[tuple[str, str]]:
    """(message, field) of each row that a message of a client or a worker lacks."""
    public_names = {row.public_name for row in rows(table)}
    names = {row.name for row in rows(table)}
    lacking = {
        "CompletionBody": public_names - set(CompletionBody.model_fields),
        "ChatBody": public_names - set(ChatBody.model_fields),
        "Sampling": public_names - set(inference_pb2.Sampling.DESCRIPTOR.fields_by_name),
        "WorkerSampling": names - set(worker_pb2.WorkerSampling.DESCRIPTOR.fields_by_name),
    }
    return {(message, field) for message, fields in lacking.items() for field in fields}


def fields_of(path: str, row: Row, value: Any) -> dict[str, Any]:
    if path == CHAT and row.public_name == "logprobs":
        return {"logprobs": True, "top_logprobs": value}
    if row.name == "logprob_token_ids":
        return {"logprobs": True if path == CHAT else 1, row.public_name: value}
    return {row.public_name: value}


async def post(client: httpx.AsyncClient, path: str, fields: dict[str, Any]) -> httpx.Response:
    return await client.post(path, json={**PROMPTS[path], "ignore_eos": True, **fields})


def through_a_worker(params: SamplingParams) -> SamplingParams:
    request = EngineRequest("id", (1,), b"", (), params)
    wire = codec.work_to_proto(1, request).SerializeToString()
    return codec.work_from_proto(worker_pb2.Work.FromString(wire), block_size=4).sampling


def test_every_message_has_every_row():
    assert missing(SamplingParams) == set()
    assert {row.name for row in ROWS} == set(EXAMPLES)


def test_no_message_of_workers_has_more():
    assert set(worker_pb2.WorkerSampling.DESCRIPTOR.fields_by_name) == {row.name for row in ROWS}


@each_row
def test_what_workers_are_not_told_is_the_default(row: Row):
    field = worker_pb2.WorkerSampling.DESCRIPTOR.fields_by_name[row.name]
    assert field.has_presence or not getattr(SamplingParams(), row.name)
    empty = codec.work_from_proto(worker_pb2.Work(token_ids=b"\0" * 4), block_size=4)
    assert getattr(empty.sampling, row.name) == getattr(SamplingParams(), row.name)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@each_row
async def test_http_reaches_the_workers(client: httpx.AsyncClient, backend: FakeBackend, path: str, row: Row):
    example = EXAMPLES[row.name]
    assert example.value != getattr(SamplingParams(), row.name)
    response = await post(client, path, fields_of(path, row, example.http))
    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert getattr(request.sampling, row.name) == example.value
    assert through_a_worker(request.sampling) == request.sampling


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_whole_numbers_may_have_a_point(client: httpx.AsyncClient, backend: FakeBackend, path: str):
    """As from languages that have one kind of number; OpenAI takes them."""
    integers = [row for row in ROWS if row.type in (int, int | None)]
    fields: dict[str, Any] = {}
    for row in integers:
        value = EXAMPLES[row.name].http
        fields |= fields_of(path, row, float(value) if type(value) is int and value < 2**53 else value)
    response = await post(client, path, {**fields, "max_tokens": 16.0, "priority": -3.0})
    assert response.status_code == 200, response.text
    [request] = backend.requests
    assert (request.priority, request.sampling.max_tokens) == (-3, 16)
    assert all(type(getattr(request.sampling, row.name)) is int for row in integers)
    refused = await post(client, path, {"max_tokens": 16.5})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


@each_row
async def test_grpc_reaches_the_workers(served: ServedModel, backend: FakeBackend, row: Row):
    fields = {"max_tokens": 8, "ignore_eos": True, row.public_name: EXAMPLES[row.name].grpc()}
    if row.name == "logprob_token_ids":
        fields["logprobs"] = 0
    request = inference_pb2.GenerateRequest(text="hi", sampling=inference_pb2.Sampling(**fields))
    built, _ = await InferenceServicer(served)._generation(request)
    assert getattr(built.sampling, row.name) == EXAMPLES[row.name].value
    assert through_a_worker(built.sampling) == built.sampling


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@each_row
async def test_http_refuses_what_is_out_of_range_by_its_public_name(
    client: httpx.AsyncClient, path: str, row: Row
):
    fields = fields_of(path, row, EXAMPLES[row.name].refused)
    response = await post(client, path, fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == list(fields)[-1]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@each_row
async def test_null_is_as_good_as_left_out(
    client: httpx.AsyncClient, backend: FakeBackend, path: str, row: Row
):
    for fields in ({}, {row.public_name: None}):
        assert (await post(client, path, {"seed": 1} | fields)).status_code == 200
    left_out, null = (request.sampling for request in backend.requests)
    assert row.name == "seed" or left_out == null


@each_row
async def test_openapi_says_that_each_may_be_left_out(client: httpx.AsyncClient, row: Row):
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for body in ("CompletionBody", "ChatBody"):
        kinds = schemas[body]["properties"][row.public_name]["anyOf"]
        assert len(kinds) == 2
        assert {"type": "null"} in kinds
        assert row.public_name not in schemas[body]["required"]


@dataclass(frozen=True, slots=True)
class LongerTable(SamplingParams):
    """With rows of each kind more."""

    typical_p: Annotated[float, Above(0, 1)] = 1.0
    num_beams: Annotated[int | None, PublicName("beams"), Between(1, 8), AlsoOff(-1)] = None
    allowed_token_ids: TokenIds = ()
    is_loud: bool = False


@with_fields_of(LongerTable)
class LongerBody(Body):
    """A body with a field of its own."""

    own: int = 0


def test_a_new_row_is_in_the_body():
    body = LongerBody.model_validate({"typical_p": 0.5, "allowed_token_ids": [1, 2], "is_loud": True})
    values = {row.public_name: getattr(body, row.public_name) for row in rows(LongerTable)}
    given = {name: value for name, value in values.items() if value is not None}
    assert given == {"typical_p": 0.5, "allowed_token_ids": (1, 2), "is_loud": True}
    assert body.unknown_fields == {}
    properties = LongerBody.model_json_schema()["properties"]
    assert properties["beams"]["anyOf"] == [{"type": "integer"}, {"type": "null"}]
    assert (LongerBody.__name__, LongerBody.__doc__) == ("LongerBody", "A body with a field of its own.")


@pytest.mark.parametrize(
    "fields", [{"typical_p": "x"}, {"beams": 1.5}, {"allowed_token_ids": ["a"]}, {"is_loud": 1}]
)
def test_a_new_row_has_its_type_checked(fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        LongerBody.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"typical_p": 0.0}, "typical_p"), ({"num_beams": 9}, "beams"), ({"top_p": 2.0}, "top_p")],
)
def test_a_new_row_has_its_range_checked(fields: dict[str, Any], param: str):
    assert LongerTable(typical_p=0.5, num_beams=8).num_beams == 8
    with pytest.raises(InvalidRequest) as refused:
        LongerTable(**fields)
    assert (refused.value.param, refused.value.code) == (param, "out_of_range")


def test_a_new_row_that_a_message_lacks_is_found():
    added = {("Sampling", "beams"), ("WorkerSampling", "num_beams"), ("ChatBody", "beams")}
    assert added <= missing(LongerTable)
