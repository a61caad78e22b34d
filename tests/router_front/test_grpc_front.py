"""The gRPC door and its error interceptor, over a real grpc.aio server."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest

from baton.core.errors import (
    InvalidRequest,
    Overloaded,
    RequestFailed,
    TransferRefused,
    Unavailable,
    WorkerLost,
)
from baton.rpc.errors import ErrorInterceptor
from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc
from baton_router import grpc_front, served_model
from baton_router.grpc_front import InferenceServicer
from baton_router.served_model import ServedModel
from tests.router_front.fake_backend import MODEL, NUM_CACHED, FakeBackend

DEADLINE_S = 10
CODE = grpc.StatusCode


@pytest.fixture
async def channel(served: ServedModel) -> AsyncGenerator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(served), server)
    server.add_generic_rpc_handlers((raising_handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as made:
        yield made
    await server.stop(None)


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> inference_pb2_grpc.InferenceStub:
    return inference_pb2_grpc.InferenceStub(channel)


def request(**fields: Any) -> pb.GenerateRequest:
    sampling = {"max_tokens": 4} | fields.pop("sampling", {})
    return pb.GenerateRequest(**({"text": "hi"} | fields), sampling=pb.Sampling(**sampling))


async def generate(stub: Any, **fields: Any) -> list[pb.GenerateResponse]:
    return [response async for response in stub.Generate(request(**fields), timeout=DEADLINE_S)]


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_whole_answer_is_one_message_a_choice(stub: Any, backend: FakeBackend, served: ServedModel):
    first, last = await generate(stub, sampling={"n": 2, "logprobs": 2})
    assert (first.choice, last.choice) == (0, 1)
    assert first.text == last.text == served.tokenizer.decode(backend.reply[:4])
    assert first.token_ids == backend.reply[:4]
    assert [len(logprob.top) for logprob in first.logprobs] == [2] * 4
    assert first.finish_reason == "length"
    assert not first.HasField("usage")
    assert last.usage == pb.Usage(prompt_tokens=2, completion_tokens=8, cached_prompt_tokens=NUM_CACHED)


async def test_stream_is_the_whole_answer_in_pieces(stub: Any):
    [whole] = await generate(stub, model=MODEL, sampling={"max_tokens": 60, "stop": ["fox"]})
    responses = await generate(stub, sampling={"max_tokens": 60, "stop": ["fox"]}, stream=True)
    assert "".join(response.text for response in responses) == whole.text
    assert whole.text.endswith("brown ")
    assert [response.finish_reason for response in responses] == [""] * (len(responses) - 1) + ["stop"]
    assert responses[-1].usage == whole.usage
    assert {response.request_id for response in responses} == {responses[0].request_id}


async def test_usage_so_far(stub: Any):
    responses = await generate(stub, stream=True, continuous_usage_stats=True)
    assert [response.usage.completion_tokens for response in responses] == [1, 2, 3, 4]


async def test_how_answers_end_and_what_they_are_called(stub: Any, backend: FakeBackend):
    stopped = {"max_tokens": 60, "stop": ["fox"], "include_stop_str_in_output": True}
    [by_text] = await generate(stub, request_id="mine", sampling=stopped)
    assert (by_text.request_id, by_text.text[-3:]) == ("gen-mine", "fox")
    assert (by_text.WhichOneof("stop_reason"), by_text.stop_text) == ("stop_text", "fox")
    third = backend.reply[2]
    [by_token] = await generate(stub, sampling={"max_tokens": 60, "stop_token_ids": [third]})
    assert (by_token.WhichOneof("stop_reason"), by_token.stop_token_id) == ("stop_token_id", third)
    [at_length] = await generate(stub)
    assert at_length.WhichOneof("stop_reason") is None


async def test_special_token_as_stop_string(stub: Any, backend: FakeBackend, served: ServedModel):
    backend.reply = served.tokenizer.encode_now("hello<|im_start|>world")
    for stream in (False, True):
        sampling = {"max_tokens": 60, "stop": ["<|im_start|>"]}
        responses = await generate(stub, sampling=sampling, stream=stream)
        assert "".join(response.text for response in responses) == "hello"
        assert responses[-1].finish_reason == "stop"


async def test_prompts_of_every_form(stub: Any, backend: FakeBackend, served: ServedModel):
    await generate(stub, text=None, token_ids=pb.TokenIds(ids=[5, 6]))
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    await generate(stub, text=None, chat=chat, priority=-2, cache_salt="s")
    developer = pb.ChatMessages(messages=[pb.ChatMessage(role="developer", content="hi")])
    await generate(stub, text=None, chat=developer)
    text = served.tokenizer.decode(backend.requests[2].token_ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nhi")
    assert backend.requests[0].token_ids == (5, 6)
    text = served.tokenizer.decode(backend.requests[1].token_ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert (backend.requests[1].priority, backend.requests[1].cache_salt) == (-2, "s")


async def test_defaults_are_what_is_left(stub: Any, backend: FakeBackend):
    async for _ in stub.Generate(pb.GenerateRequest(text="hi"), timeout=DEADLINE_S):
        pass
    assert backend.requests[0].sampling.max_tokens == backend.max_model_len - 2


async def test_counted_tokens_are_bounded(stub: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served_model, "_COUNTED_TOKENS", 300)
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="<tool call>" * 301)])
    for call, param in (
        (stub.Tokenize(pb.TokenizeRequest(text="<tool call>" * 301)), "text"),
        (stub.Tokenize(pb.TokenizeRequest(chat=chat)), "chat"),
        (stub.Detokenize(pb.DetokenizeRequest(token_ids=[5] * 301)), "token_ids"),
    ):
        error = await failure(call)
        assert error.code() is CODE.INVALID_ARGUMENT
        assert f"{param} has" in str(error.details())
    assert len((await stub.Tokenize(pb.TokenizeRequest(text="<tool call>" * 300))).token_ids) == 300


async def test_tokens_and_models(stub: Any, served: ServedModel):
    tokens = await stub.Tokenize(pb.TokenizeRequest(text="hi 🎉"))
    assert list(tokens.token_ids) == served.tokenizer.encode_now("hi 🎉")
    assert tokens.max_model_len == 256
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))).text == "hi 🎉"
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    assert len((await stub.Tokenize(pb.TokenizeRequest(chat=chat))).token_ids) > 4
    models = await stub.ListModels(pb.ListModelsRequest())
    assert [(model.id, model.max_model_len) for model in models.models] == [(MODEL, 256)]


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("prompt", {"text": None}),
        ("prompt", {"text": ""}),
        ("prompt", {"text": None, "token_ids": pb.TokenIds(ids=[10**6])}),
        ("messages", {"text": None, "chat": pb.ChatMessages()}),
        ("messages", {"text": None, "chat": pb.ChatMessages(messages=[pb.ChatMessage()] * 4097)}),
        (
            "messages[0].role",
            {"text": None, "chat": pb.ChatMessages(messages=[pb.ChatMessage(role="model", content="x")])},
        ),
        ("max_tokens", {"sampling": {"max_tokens": 300}}),
        ("temperature", {"sampling": {"temperature": -1}}),
        ("stop", {"sampling": {"stop": [""]}}),
    ],
)
async def test_bad_requests(stub: Any, param: str, fields: dict[str, Any]):
    error = await failure(generate(stub, **fields))
    assert error.code() is CODE.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())["error-param"] == param


async def test_same_words_as_http(stub: Any, client: Any):
    error = await failure(generate(stub, sampling={"max_tokens": 300}))
    response = await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 300})
    assert error.details() == response.json()["error"]["message"]


async def test_unknown_model(stub: Any):
    for call in (
        generate(stub, model="x"),
        stub.Tokenize(pb.TokenizeRequest(model="x")),
        stub.Detokenize(pb.DetokenizeRequest(model="x")),
    ):
        assert (await failure(call)).code() is CODE.NOT_FOUND


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error_after", [0, 2])
async def test_lost_worker(stub: Any, backend: FakeBackend, stream: bool, error_after: int):
    backend.error, backend.error_after = WorkerLost("The worker left.", retry_after_s=3), error_after
    error = await failure(generate(stub, stream=stream))
    assert (error.code(), error.details()) == (CODE.UNAVAILABLE, "The worker left.")
    assert dict(error.trailing_metadata())["retry-after"] == "3"
    assert backend.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hang_after", [0, 2])
async def test_cancel_closes_the_backend(stub: Any, backend: FakeBackend, stream: bool, hang_after: int):
    backend.hang_after = hang_after
    call = stub.Generate(request(stream=stream))
    async with asyncio.timeout(DEADLINE_S):
        if stream and hang_after:
            await call.read()
        else:
            reading = asyncio.create_task(failure(call.read()))
        await backend.is_hanging.wait()
        call.cancel()
        await backend.is_closed.wait()
    if not (stream and hang_after):
        reading.cancel()


async def test_client_that_reads_nothing_loses_its_place(
    stub: Any, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grpc_front, "WRITE_TIMEOUT_S", 0.2)
    backend.max_model_len = 10**7
    call = stub.Generate(request(stream=True, sampling={"max_tokens": 10**6, "n": 100, "logprobs": 20}))
    async with asyncio.timeout(DEADLINE_S):
        await call.read()
        await backend.is_closed.wait()
    call.cancel()


ERRORS = {
    "invalid": (InvalidRequest("bad", param="p", code="c"), CODE.INVALID_ARGUMENT, "bad"),
    "overloaded": (Overloaded("full", retry_after_s=9), CODE.RESOURCE_EXHAUSTED, "full"),
    "unavailable": (Unavailable("none"), CODE.UNAVAILABLE, "none"),
    "failed": (RequestFailed("gave up"), CODE.INTERNAL, "gave up"),
    "refused": (TransferRefused("crc", "wrong checksum"), CODE.FAILED_PRECONDITION, "wrong checksum"),
    "unknown": (KeyError("secret"), CODE.INTERNAL, "Internal error; the server's log has it."),
}


def raising_handlers() -> grpc.GenericRpcHandler:
    """Six handlers: the four kinds, and both spellings of those that stream."""

    async def unary(request: Any, context: Any) -> bytes:
        message = request if isinstance(request, bytes) else await anext(request)
        if message == b"own":
            await context.abort(CODE.ALREADY_EXISTS, "own words")
        raise ERRORS[message.decode()][0]

    async def stream(request: Any, context: Any) -> AsyncGenerator[bytes]:
        yield b"one"
        yield await unary(request, context)

    handlers = {
        "UnaryUnary": grpc.unary_unary_rpc_method_handler(unary),
        "UnaryStream": grpc.unary_stream_rpc_method_handler(stream),
        "UnaryWrite": grpc.unary_stream_rpc_method_handler(unary),
        "StreamUnary": grpc.stream_unary_rpc_method_handler(unary),
        "StreamStream": grpc.stream_stream_rpc_method_handler(stream),
        "StreamWrite": grpc.stream_stream_rpc_method_handler(unary),
    }
    return grpc.method_handlers_generic_handler("test.Raising", handlers)


async def call_raising(channel: grpc.aio.Channel, name: str, message: bytes) -> None:
    path = f"/test.Raising/{name}"
    streams_in, streams_out = name.startswith("Stream"), not name.endswith("Unary")
    kind = f"{'stream' if streams_in else 'unary'}_{'stream' if streams_out else 'unary'}"

    async def messages() -> AsyncGenerator[bytes]:
        yield message

    call = getattr(channel, kind)(path)(messages() if streams_in else message, timeout=DEADLINE_S)
    if streams_out:
        async for _ in call:
            pass
    else:
        await call


@pytest.mark.parametrize("error_name", ERRORS)
@pytest.mark.parametrize(
    "name", ["UnaryUnary", "UnaryStream", "UnaryWrite", "StreamUnary", "StreamStream", "StreamWrite"]
)
async def test_every_error_in_every_kind_of_handler(
    channel: grpc.aio.Channel, name: str, error_name: str, caplog: pytest.LogCaptureFixture
):
    raised, code, details = ERRORS[error_name]
    error = await failure(call_raising(channel, name, error_name.encode()))
    assert (error.code(), error.details()) == (code, details)
    trailers = dict(error.trailing_metadata())
    if isinstance(raised, Overloaded | Unavailable):
        assert trailers["retry-after"] == str(raised.retry_after_s)
    if isinstance(raised, InvalidRequest):
        assert (trailers["error-param"], trailers["error-code"]) == ("p", "c")
    assert (code is CODE.INTERNAL) == ("Traceback" in caplog.text)


@pytest.mark.parametrize("name", ["UnaryUnary", "StreamStream"])
async def test_a_handlers_own_abort_is_left_alone(channel: grpc.aio.Channel, name: str):
    error = await failure(call_raising(channel, name, b"own"))
    assert (error.code(), error.details()) == (CODE.ALREADY_EXISTS, "own words")


async def test_unknown_method_is_unimplemented(channel: grpc.aio.Channel):
    error = await failure(call_raising(channel, "NoSuchUnary", b"x"))
    assert error.code() is CODE.UNIMPLEMENTED
