"""The public gRPC service, over the same functions as HTTP. Errors leave through ErrorInterceptor."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from baton.core.errors import InvalidRequest, RequestFailed
from baton.core.fields import FormatText, RulesText, TokenBiases, TokenIds, TokenSequences, rows
from baton.core.logits_rules import from_text, to_text
from baton.core.sampling import SampledToken, SamplingParams
from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc
from baton_router.answer_choice import check_streamed
from baton_router.backend import GenerationRequest, TextOptions
from baton_router.chat import ChatChoice, build_chat_request, render
from baton_router.chat_output.tools import read_tools
from baton_router.grpc_chat import conversation, read_chat
from baton_router.request_checks import build_request
from baton_router.request_ids import chosen_id
from baton_router.served_model import ServedModel
from baton_router.structured_outputs import from_structured_outputs
from baton_router.text.repetition import Repetition
from baton_router.text.stop_strings import StopStrings
from baton_router.text_delta import TextDelta, joined
from baton_router.text_stream import generate_text
from baton_router.token_counts import text_of, tokens_of
from baton_router.truncation import Truncation

WRITE_TIMEOUT_S = 60.0  # a client that reads nothing for so long must not keep its place on the workers

Context = grpc.aio.ServicerContext[Any, Any]


def _format(message: pb.StructuredOutputs) -> FormatText | None:
    form = message.WhichOneof("form")
    if form is None:
        return None
    value: Any = getattr(message, form)
    return from_structured_outputs({form: list(value.texts) if form == "choice" else value})


_FROM_PROTO: dict[Any, Callable[[Any], Any]] = {
    FormatText: _format,
    RulesText: lambda text: to_text(from_text(text)),
    TokenIds: tuple,
    TokenIds | None: lambda message: tuple(message.ids),
    TokenSequences: list,
    TokenBiases: lambda biases: tuple(biases.items()),
}


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """One model over one backend; serve it behind `baton.rpc.errors.ErrorInterceptor`."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    # The names are the service's, so ruff's rule for functions does not apply.
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        """Complete one prompt. A cancelled call closes the generator, which aborts the request."""
        self._served.check_model(request.model)
        generation, choices = await self._generation(request)
        if request.stream:
            check_streamed(generation)
        assemble = _StreamedResponses if request.stream else _WholeResponses
        assembler = assemble(generation, choices, request.continuous_usage_stats)
        async with aclosing(generate_text(self._served, generation)) as deltas:
            async for delta in deltas:
                for response in assembler.push(delta):
                    await _write(context, response)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        """Token ids of a text or of a rendered conversation."""
        self._served.check_model(request.model)
        has_chat = request.WhichOneof("input") == "chat"
        text = self._render(request.chat) if has_chat else request.text
        add_special_tokens = (
            request.add_special_tokens if request.HasField("add_special_tokens") else not has_chat
        )
        token_ids = await tokens_of(
            self._served,
            text,
            add_special_tokens=add_special_tokens,
            name="chat" if has_chat else "text",
            truncation=_truncation(request),
        )
        return pb.TokenizeResponse(token_ids=token_ids, max_model_len=self._served.backend.max_model_len)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:  # noqa: N802
        """Text of token ids, special tokens included."""
        self._served.check_model(request.model)
        text = await text_of(self._served, request.token_ids, name="token_ids")
        return pb.DetokenizeResponse(text=text)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802
        """The model that is served, under each of its names."""
        longest = self._served.backend.max_model_len
        models = [pb.Model(id=name, max_model_len=longest) for name in self._served.names]
        return pb.ListModelsResponse(models=models)

    async def _generation(
        self, request: pb.GenerateRequest
    ) -> tuple[GenerationRequest, Sequence[ChatChoice] | None]:
        """What is to be generated, and of a chat what reads its answers."""
        options: dict[str, Any] = {
            "answer_id": f"gen-{chosen_id(request_id=request.request_id)}",
            "priority": request.priority,
            "cache_salt": request.cache_salt,
            "truncation": _truncation(request),
        }
        fields, text = _sampling_fields(request.sampling), _text_options(request.sampling)
        match request.WhichOneof("prompt"):
            case None:
                raise InvalidRequest("The request has no prompt.", param="prompt", code="empty_prompt")
            case "chat":
                chat = await build_chat_request(
                    self._served, conversation(request.chat), fields, text, **options
                )
                return chat.generation, chat.choices()
            case "token_ids":
                prompt: Any = request.token_ids.ids
                built = build_request(self._served, prompt, fields, text, add_special_tokens=False, **options)
            case _:
                built = build_request(self._served, request.text, fields, text, **options)
        return await built, None

    def _render(self, chat: pb.ChatMessages) -> str:
        said = conversation(chat)
        return render(self._served, said, has_tools=bool(read_tools(said.tools)))


class _StreamedResponses:
    """One message per delta."""

    def __init__(
        self, request: GenerationRequest, choices: Sequence[ChatChoice] | None, usage_always: bool
    ) -> None:
        self._usage_always = usage_always
        self._request = request
        self._choices = choices
        self._usage = pb.Usage(prompt_tokens=len(request.token_ids))
        self._num_running = request.sampling.n

    def push(self, delta: TextDelta) -> list[pb.GenerateResponse]:
        """The messages that this delta makes complete; usage is on the call's last."""
        self._count(delta)
        return [self._response(delta)]

    def _count(self, delta: TextDelta) -> None:
        self._usage.completion_tokens += len(delta.tokens) + delta.num_unseen_tokens
        self._usage.cached_prompt_tokens += delta.num_cached_prompt_tokens
        self._num_running -= delta.finish_reason is not None

    def _response(self, delta: TextDelta) -> pb.GenerateResponse:
        response = pb.GenerateResponse(
            request_id=self._request.answer_id,
            choice=delta.choice,
            text=delta.text,
            token_ids=[token.token_id for token in delta.tokens],
            logprobs=[_logprob(token) for token in delta.tokens if token.logprob is not None],
            finish_reason=delta.finish_reason.value if delta.finish_reason else None,
            usage=self._usage if self._usage_always or not self._num_running else None,
            prompt_logprobs=[_logprob(token) for token in delta.prompt_logprobs],
            **_stop_reason(delta),
        )
        if self._choices is not None:
            read_chat(response, self._choices[delta.choice].push(delta))
        return response


class _WholeResponses(_StreamedResponses):
    """One message per choice."""

    def __init__(
        self, request: GenerationRequest, choices: Sequence[ChatChoice] | None, usage_always: bool
    ) -> None:
        super().__init__(request, choices, usage_always)
        self._deltas: list[list[TextDelta]] = [[] for _ in range(self._num_running)]

    def push(self, delta: TextDelta) -> list[pb.GenerateResponse]:
        """See _StreamedResponses."""
        self._count(delta)
        deltas = self._deltas[delta.choice]
        deltas.append(delta)
        return [] if delta.finish_reason is None else [self._response(joined(deltas))]


async def _write(context: Context, response: pb.GenerateResponse) -> None:
    """Send one message. Raises RequestFailed where the client's flow control holds it for a minute.

    It is raised, not sent with `context.abort`: a status waits behind the message that is stuck, and the
    workers must be free before.
    """
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await context.write(response)
    except TimeoutError as error:
        raise RequestFailed(f"The client has read nothing for {WRITE_TIMEOUT_S:.0f} s.") from error


def _sampling_fields(sampling: pb.Sampling) -> dict[str, Any]:
    """What the client has sent, as `build_request` takes it."""
    fields = {field.name: value for field, value in sampling.ListFields()}
    for row in rows(SamplingParams):
        if row.public_name in fields and row.type in _FROM_PROTO:
            fields[row.public_name] = _FROM_PROTO[row.type](fields[row.public_name])
    return fields


def _truncation(request: pb.GenerateRequest | pb.TokenizeRequest) -> Truncation | None:
    num_tokens = request.truncate_prompt_tokens if request.HasField("truncate_prompt_tokens") else None
    return Truncation.asked(num_tokens, request.truncation_side)


def _text_options(sampling: pb.Sampling) -> TextOptions:
    detection = sampling.repetition_detection
    spaces = sampling.spaces_between_special_tokens or not sampling.HasField("spaces_between_special_tokens")
    return TextOptions(
        StopStrings(sampling.stop),
        skip_special_tokens=sampling.skip_special_tokens or not sampling.HasField("skip_special_tokens"),
        spaces_between_special_tokens=spaces,
        includes_stop=sampling.include_stop_str_in_output,
        repetition=Repetition(detection.max_pattern_size, detection.min_pattern_size, detection.min_count),
    )


def _stop_reason(delta: TextDelta) -> dict[str, Any]:
    if delta.stop_reason is None:
        return {}
    return {"stop_text" if isinstance(delta.stop_reason, str) else "stop_token_id": delta.stop_reason}


def _logprob(token: SampledToken) -> pb.Logprob:
    top = [pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top_logprobs]
    return pb.Logprob(token_id=token.token_id, logprob=token.logprob, top=top)
