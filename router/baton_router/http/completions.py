"""POST /v1/completions."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import PlainValidator

from baton.core.errors import InvalidRequest
from baton.core.sampling import SampledToken
from baton_router.backend import GenerationRequest
from baton_router.http.answer import Answer
from baton_router.http.answer_models import Completion, described
from baton_router.http.generation import GenerationBody
from baton_router.http.logprobs import CompletionLogprobs, prompt_logprobs
from baton_router.http.request_note import note_of
from baton_router.http.unsupported import COMPLETIONS, refuse_unsupported
from baton_router.prompt_runs import answer_nothing, answer_prompts_alone, run_prompts
from baton_router.request_checks import build_request
from baton_router.served_model import ServedModel
from baton_router.text_delta import TextDelta

MAX_PROMPTS = 1024
_DEFAULT_MAX_TOKENS = 16  # OpenAI's

Prompt = str | list[int]


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)


def _prompts(value: Any) -> list[Prompt]:
    """One text, one list of token ids, or a list of either, as a list; null is the empty text."""
    if value is None:
        return [""]
    if isinstance(value, str) or (value and _is_token_ids(value)):
        return [value]
    if not isinstance(value, list):
        raise InvalidRequest("prompt must be a text, token ids, or a list of either.", param="prompt")
    if not value:
        raise InvalidRequest("The prompt is empty.", param="prompt", code="empty_prompt")
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(
            f"A request has at most {MAX_PROMPTS} prompts, but this has {len(value)}.", param="prompt"
        )
    for index, prompt in enumerate(value):
        if not isinstance(prompt, str) and not _is_token_ids(prompt):
            raise InvalidRequest(
                f"prompt[{index}] is neither a text nor a list of token ids.", param="prompt"
            )
    return value


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[
        list[Prompt],
        PlainValidator(_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]] | None),
    ]
    echo: bool | None = False
    add_special_tokens: bool | None = True

    @property
    def is_echo_alone(self) -> bool:
        """Whether the prompt is all that is asked for, and nothing is generated."""
        return bool(self.echo) and self.sampling_fields()["max_tokens"] == 0


def completion_routes(served: ServedModel) -> APIRouter:
    """The routes of text completions."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None, responses=described(Completion, Completion))
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        served.check_model(body.model)
        _check(body)
        note = note_of(request)
        note.ignore(refuse_unsupported(body.unknown_fields, COMPLETIONS))
        answer_id = f"cmpl-{note.choose_id(body.request_id)}"
        requests = await _requests(served, body, answer_id)
        shape = _CompletionShape(served, body, requests)
        run = run_prompts
        if body.is_echo_alone:
            run = answer_nothing if requests[0].sampling.num_prompt_logprobs is None else answer_prompts_alone
        return Answer(served, body, requests, answer_id, shape, run).response()

    return router


def _check(body: CompletionBody) -> None:
    """Raises InvalidRequest for what can't be served."""
    body.check_stream_options()
    fields = body.sampling_fields()
    if body.is_echo_alone and fields["min_tokens"]:
        raise InvalidRequest(
            f"min_tokens is {fields['min_tokens']}, but max_tokens is 0.",
            param="min_tokens",
            code="out_of_range",
        )


async def _requests(served: ServedModel, body: CompletionBody, answer_id: str) -> list[GenerationRequest]:
    fields, text = body.sampling_fields(), body.text_options()
    if body.echo and fields["prompt_logprobs"] is None:
        fields["prompt_logprobs"] = fields["logprobs"]
    if body.is_echo_alone:  # checked as a request for one token
        fields["max_tokens"] = 1
    requests = []
    for index, prompt in enumerate(body.prompt):
        requests.append(
            await build_request(
                served,
                prompt,
                fields,
                text,
                answer_id=answer_id,
                index=index,
                priority=body.priority or 0,
                cache_salt=body.cache_salt or "",
                add_special_tokens=body.add_special_tokens is not False,
                default_max_tokens=_DEFAULT_MAX_TOKENS,
                truncation=body.truncation(),
            )
        )
        if len(body.prompt) > 1:  # many short prompts are as much work for the event loop as a long one
            await asyncio.sleep(0)
    return requests


class _CompletionShape:
    """See baton_router.http.answer.Shape."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, served: ServedModel, body: CompletionBody, requests: list[GenerationRequest]) -> None:
        self._served = served
        self._body = body
        self._requests = requests
        self._num_choices_each = requests[0].sampling.n
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._begun: set[int] = set()

    def opening(self, num_choices: int) -> list[dict[str, Any]]:
        """Nothing comes before the text."""
        return []

    def top_level(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def whole_choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """A whole choice is its only chunk."""
        return self.chunk_choice(index, delta)

    def chunk_choice(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """See Shape; the first of a choice also holds what belongs to its prompt."""
        is_first = index not in self._begun
        self._begun.add(index)
        prompt_index = index // self._num_choices_each
        text = self._prompt_text(prompt_index) if is_first and self._body.echo else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": text + delta.text,
            "logprobs": self._choice_logprobs(index, delta, is_first),
            "finish_reason": delta.finish_reason.value if delta.finish_reason else None,
            "stop_reason": delta.stop_reason,
        }
        if is_first and self._body.sampling_fields()["prompt_logprobs"] is not None:
            prompt = self._requests[prompt_index].token_ids
            choice["prompt_logprobs"] = prompt_logprobs(self._served.tokenizer, prompt, delta.prompt_logprobs)
        if self._body.return_token_ids:
            choice["token_ids"] = [token.token_id for token in delta.tokens]
            if is_first:
                choice["prompt_token_ids"] = list(self._requests[prompt_index].token_ids)
        return choice

    def _prompt_text(self, index: int) -> str:
        """As the client wrote it, or of the tokens that it gave or that are left of it."""
        prompt = self._body.prompt[index]
        if isinstance(prompt, str) and self._body.truncate_prompt_tokens is None:
            return prompt
        skip = self._body.skip_special_tokens is not False
        return self._served.tokenizer.decode(self._requests[index].token_ids, skip_special_tokens=skip)

    def _choice_logprobs(self, index: int, delta: TextDelta, is_first: bool) -> dict[str, Any] | None:
        if self._requests[0].sampling.num_logprobs is None:
            return None
        request, tokens = self._requests[index // self._num_choices_each], delta.tokens
        if is_first:
            is_echoed = bool(self._body.echo)
            self._logprobs[index] = CompletionLogprobs(
                self._served.tokenizer,
                request,
                is_echoed=is_echoed,
                names_ids=bool(self._body.return_tokens_as_token_ids),
            )
            if is_echoed:
                tokens = (SampledToken(request.token_ids[0]), *delta.prompt_logprobs, *tokens)
        return self._logprobs[index].push(tokens)
