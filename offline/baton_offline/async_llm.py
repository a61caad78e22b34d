"""A model in this process, for programs with an event loop."""

import asyncio
import itertools
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields
from typing import Any

from prometheus_client import CollectorRegistry

from baton.config import EngineConfig, available_cores
from baton.core.errors import InvalidRequest, RequestFailed
from baton.core.sampling import MAX_SEED, choice_seed
from baton.engine.async_engine import AsyncEngine
from baton.engine.factory import load_engine
from baton.front_config import FrontConfig
from baton.generation_defaults import generation_defaults
from baton.option import make_config
from baton_launch.model_source import find_model
from baton_offline.engine_backend import EngineBackend
from baton_offline.outputs import CompletionOutput, RequestOutput
from baton_offline.sampling_params import DEFAULT_MAX_TOKENS, SamplingParams, request_fields, text_options
from baton_router.backend import GenerationRequest
from baton_router.chat import Conversation, render
from baton_router.chat_output.tools import read_tools
from baton_router.metrics import FrontMetrics
from baton_router.request_checks import build_request
from baton_router.served_model import load_served_model
from baton_router.text.template_options import TemplateOptions
from baton_router.text_stream import generate_text
from baton_router.truncation import Truncation

# A text, token ids, or vLLM's objects {"prompt": ...} and {"prompt_token_ids": ...}.
Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]

# What vLLM's programs say that is so here anyway, with the values for which it is.
_ALREADY_SO: Mapping[str, tuple[Any, ...]] = {
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "enable_prefix_caching": (None, True),
    "enable_chunked_prefill": (None, True),
    "trust_remote_code": (False, True),  # no code of a checkpoint is ever run
    "disable_log_stats": (False, True),
}


class AsyncLLM:
    """Loads a model and answers prompts on the running event loop, many at once.

    Make it anywhere, use it on one event loop, and `close` it there.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        seed: int | None = None,
        tokens_at_once: int = 1,
        generation_config: str = "auto",
        override_generation_config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Load a model: a directory, a hub id, or the shipped model for None.

        `generation_config` and `override_generation_config` say what `get_default_sampling_params` has, as
        the router's options of these names do. `seed` makes requests without one of their own repeatable.
        `options` are the fields of `baton.config.EngineConfig`, such as dtype, max_model_len or max_num_seqs.
        `tokens_at_once`: an answer is passed on when it has so many new tokens, or ends. Raises StartupError,
        and TypeError for an unknown option.
        """
        config = _engine_config(options)
        source = find_model(model)
        self._engine = AsyncEngine(config, load_engine(source.directory, config))
        self._backend = EngineBackend(self._engine, tokens_at_once)
        self._served = load_served_model(
            source.directory,
            (source.name,),
            self._backend,
            FrontMetrics(CollectorRegistry()),
            # Templates come from the program itself, and settings that it makes are complete, as vLLM's are.
            front=FrontConfig(trust_request_chat_template=True, generation_config="baton"),
        )
        self._defaults = generation_defaults(
            source.directory, generation_config, override_generation_config or {}
        )
        self.max_num_seqs = config.max_num_seqs
        self._seed = seed
        self._numbers = itertools.count()
        self._watcher: asyncio.Task[None] | None = None  # None: not started

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput]:
        """Yield the same object, longer each time; ending the loop early ends the request.

        Raises InvalidRequest before the first, RequestFailed at any time.
        """
        request = await self.request(prompt, sampling_params, request_id)
        async with aclosing(self.answer(request, text_of(prompt))) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **template: Any,
    ) -> AsyncGenerator[RequestOutput]:
        """Answer a conversation; `template`: see `render`."""
        prompt = self.render(messages, **template)
        request = await self.request(prompt, sampling_params, request_id, add_special_tokens=False)
        async with aclosing(self.answer(request, prompt)) as outputs:
            async for output in outputs:
                yield output

    def get_default_sampling_params(self) -> SamplingParams:
        """The settings of a call without any: what the model's generation_config.json recommends."""
        return SamplingParams(**self._defaults.fields)

    async def reset_prefix_cache(self) -> None:
        """Prompts that come find nothing of what was computed before."""
        self._start()
        self._backend.reset_prefix_cache()

    async def close(self) -> None:
        """End the engine, and with RequestFailed what it is still computing; its memory is free when nobody
        holds this object."""
        self._backend.end_all(RequestFailed("This LLM is closed."))
        if self._watcher is not None:
            self._watcher.cancel()
            await self._engine.stop()

    def render(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, by `chat_template` or the model's. Raises InvalidRequest.

        `tools` are OpenAI's objects; calls are in the text of the answer, as the model writes them.
        """
        read_tools(tools)
        options = TemplateOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            documents=documents,
            reasoning_effort=reasoning_effort,
            chat_template_kwargs=chat_template_kwargs or {},
        )
        return render(self._served, Conversation(messages, tools, template=options), has_tools=bool(tools))

    async def request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> GenerationRequest:
        """A prompt and its settings, checked. Raises InvalidRequest."""
        params = sampling_params if sampling_params is not None else self.get_default_sampling_params()
        asked = request_fields(params)
        number = next(self._numbers)
        if asked["seed"] is None and self._seed is not None:
            asked["seed"] = choice_seed(self._seed & MAX_SEED, number)
        text = text_of(prompt)
        return await build_request(
            self._served,
            _token_ids_of(prompt) if text is None else text,
            asked,
            text_options(params),
            answer_id=request_id or f"{number}-{uuid.uuid4().hex[:8]}",
            add_special_tokens=add_special_tokens,
            default_max_tokens=DEFAULT_MAX_TOKENS,
            truncation=Truncation.asked(params.truncate_prompt_tokens, params.truncation_side),
        )

    async def answer(self, request: GenerationRequest, prompt: str | None) -> AsyncGenerator[RequestOutput]:
        """Yield the answers of a checked request as they grow. `prompt`: its text, if it was one."""
        self._start()
        output = RequestOutput(
            request.answer_id,
            prompt,
            list(request.token_ids),
            [CompletionOutput(index) for index in range(request.sampling.n)],
        )
        async with aclosing(generate_text(self._served, request)) as deltas:
            async for delta in deltas:
                output.add(delta, self._served.tokenizer)
                yield output

    def _start(self) -> None:
        if self._watcher is None:
            self._engine.start(self._backend.on_output)
            self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """Until the engine crashes, which then is what every request hears."""
        try:
            await self._engine.watch()
        except RequestFailed as error:
            self._backend.end_all(error)


def _engine_config(options: Mapping[str, Any]) -> EngineConfig:
    known = {field.name for field in fields(EngineConfig)}
    chosen: dict[str, Any] = {"num_threads": available_cores()}
    for name, value in options.items():
        if name in _ALREADY_SO and value in _ALREADY_SO[name]:
            continue
        if name in _ALREADY_SO:
            raise TypeError(f"{name}={value!r} is not supported.")
        if name not in known:
            raise TypeError(f"There is no option '{name}'; there are {', '.join(sorted(known))}.")
        chosen[name] = value
    return make_config(EngineConfig, chosen)


def text_of(prompt: Prompt) -> str | None:
    """The text of a prompt; None where it is token ids."""
    if isinstance(prompt, Mapping):
        return prompt.get("prompt")
    return prompt if isinstance(prompt, str) else None


def _token_ids_of(prompt: Prompt) -> Sequence[int]:
    token_ids: Any = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else prompt
    if isinstance(token_ids, str) or not isinstance(token_ids, Sequence):
        raise InvalidRequest(
            "A prompt is a text, a list of token ids, or an object with 'prompt' or 'prompt_token_ids'.",
            param="prompt",
        )
    if not all(type(token_id) is int for token_id in token_ids):
        raise InvalidRequest("Token ids must be whole numbers.", param="prompt")
    return list(token_ids)
