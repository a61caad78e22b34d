"""A model in this process, for scripts and notebooks: prompts in, answers out."""

import asyncio
import atexit
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from baton.core.errors import RequestFailed, first_error
from baton_offline.async_llm import AsyncLLM, Messages, Prompt, text_of
from baton_offline.beam_search import BeamSearchOutput, BeamSearchParams, beam_search_output
from baton_offline.outputs import RequestOutput
from baton_offline.sampling_params import SamplingParams
from baton_router.backend import GenerationRequest

_TOKENS_AT_ONCE = 16  # nobody looks at an answer before it ends
_STOP_TIMEOUT_S = 15.0

T = TypeVar("T")
# A checked request, and its prompt if that was a text.
Ready = tuple[GenerationRequest, str | None]


class LLM:
    """Loads a model and answers lists of prompts.

    The engine runs on threads of this process: a script needs no main guard, and a notebook's own event loop
    is not touched. Ctrl-C ends the call under way. Use it as a context manager, or `close` it, to free the
    engine before the process ends.
    """

    def __init__(self, model: str | None = None, *, seed: int | None = None, **options: Any) -> None:
        """See AsyncLLM."""
        self._llm = AsyncLLM(model, seed=seed, tokens_at_once=_TOKENS_AT_ONCE, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="LLM", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The answers to one or more prompts, in their order; `use_tqdm` shows a progress bar.

        All prompts are checked before the first is computed. Raises InvalidRequest for what can't be served,
        and RequestFailed.
        """
        several = _as_list(prompts)
        settings = _one_each(sampling_params, len(several), "prompts")

        async def ready() -> list[Ready]:
            return [
                (await self._llm.request(prompt, params), text_of(prompt))
                for prompt, params in zip(several, settings, strict=True)
            ]

        return self._run(self._answers(ready, use_tqdm))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """The answers to one or more conversations; `template`: see AsyncLLM.render."""
        conversations: Sequence[Any] = messages
        if messages and not isinstance(messages[0], Sequence):
            conversations = [messages]
        settings = _one_each(sampling_params, len(conversations), "conversations")

        async def ready() -> list[Ready]:
            found: list[Ready] = []
            for conversation, params in zip(conversations, settings, strict=True):
                prompt = self._llm.render(conversation, **template)
                found.append((await self._llm.request(prompt, params, add_special_tokens=False), prompt))
            return found

        return self._run(self._answers(ready, use_tqdm))

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = True
    ) -> list[BeamSearchOutput]:
        """The likeliest answers to each prompt, as transformers' `generate(num_beams=...)` finds them."""
        outputs = self.generate(prompts, params.sampling_params(), use_tqdm=use_tqdm)
        return [beam_search_output(output, params) for output in outputs]

    def get_default_sampling_params(self) -> SamplingParams:
        """See AsyncLLM."""
        return self._llm.get_default_sampling_params()

    def reset_prefix_cache(self) -> None:
        """See AsyncLLM."""
        self._run(self._llm.reset_prefix_cache())

    def close(self) -> None:
        """End the engine and its threads; may be called again."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._run(self._llm.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_STOP_TIMEOUT_S)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _answers(
        self, ready: Callable[[], Coroutine[Any, Any, list[Ready]]], use_tqdm: bool
    ) -> list[RequestOutput]:
        """Of all requests; so many at once that the engine never waits for the next."""
        requests = await ready()
        places = asyncio.Semaphore(2 * self._llm.max_num_seqs)
        with _progress(len(requests), use_tqdm) as advance:

            async def one(request: GenerationRequest, prompt: str | None) -> RequestOutput:
                async with places:
                    last: RequestOutput | None = None
                    async for output in self._llm.answer(request, prompt):
                        last = output
                advance()
                assert last is not None
                return last

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(request, prompt)) for request, prompt in requests]
            except BaseExceptionGroup as errors:
                raise first_error(errors) from None
            return [task.result() for task in tasks]

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine on the LLM's loop; Ctrl-C cancels it."""
        if not self._thread.is_alive():
            call.close()
            raise RequestFailed("This LLM is closed.")
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, which may be a list of token ids, or several. Raises TypeError where it is neither."""
    if not isinstance(prompts, Sequence | Mapping):
        raise TypeError(f"prompts must be a prompt or a list of them, but is {prompts!r}.")
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int, what: str
) -> Sequence[SamplingParams | None]:
    if not isinstance(params, Sequence):
        return [params] * count
    if len(params) != count:
        raise ValueError(
            f"There are {len(params)} sampling params for {count} {what}; give one, or one each."
        )
    return params


@contextmanager
def _progress(total: int, is_shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on standard error, and what moves it on by one."""
    if not is_shown:
        yield lambda: None
        return
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("Answers", total=total)
        yield lambda: bar.advance(task)
