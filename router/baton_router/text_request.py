"""From what a client may ask for to what the backend is asked for; one function for HTTP and gRPC."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.errors import InvalidRequest
from baton.core.sampling import SamplingParams
from baton_router.backend import GenerationRequest
from baton_router.served_model import ServedModel
from baton_router.text.stop_strings import StopStrings
from baton_router.text.tokenizer import check_unicode

_MAX_CACHE_SALT_LENGTH = 1024
_MIN_PRIORITY, _MAX_PRIORITY = -(2**31), 2**31 - 1
_MASK64 = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOptions:
    """The public fields of a request, as the client sent them; None: left out."""

    stop: StopStrings
    temperature: float | None = None
    top_k: int | None = None  # 0 and -1: off
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None  # its low 64 bits count
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None
    n: int | None = None
    priority: int = 0
    cache_salt: str = ""
    skip_special_tokens: bool = True
    default_max_tokens: int | None = None  # None: what the prompt leaves of the model's length
    max_tokens_name: str = "max_tokens"  # as the client spells it, for errors


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One prompt, checked, with what its text needs besides its tokens."""

    generation: GenerationRequest
    stop_strings: StopStrings
    skip_special_tokens: bool
    arrived_s: float  # time.monotonic()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.generation.token_ids)


async def build_request(
    served: ServedModel,
    prompt: str | Sequence[int],
    options: CompletionOptions,
    *,
    request_id: str,
    add_special_tokens: bool = True,
) -> TextRequest:
    """Encode the prompt (text) or check it (token ids), and check every option.

    Raises InvalidRequest, with the public name of the field in `param`.
    """
    arrived_s = time.monotonic()
    _check_routing(options)
    if isinstance(prompt, str):
        encoded = await served.tokenizer.encode(
            prompt, max_tokens=served.backend.max_model_len, add_special_tokens=add_special_tokens
        )
        token_ids = tuple(encoded)
    else:
        token_ids = tuple(prompt)
        check_token_ids("prompt", token_ids, served.vocab_size)
    if not token_ids:
        raise InvalidRequest("The prompt is empty.", param="prompt", code="empty_prompt")
    max_tokens = _max_tokens(options, len(token_ids), served.backend.max_model_len)
    generation = GenerationRequest(
        request_id=request_id,
        token_ids=token_ids,
        sampling=_sampling(served, options, max_tokens),
        priority=options.priority,
        cache_salt=options.cache_salt,
    )
    return TextRequest(generation, options.stop, options.skip_special_tokens, arrived_s)


def check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest if an id of the field `name` is outside the model's vocabulary."""
    if not token_ids:
        return
    smallest, largest = min(token_ids), max(token_ids)
    if smallest < 0 or largest >= vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise InvalidRequest(
            f"{name} holds the token id {wrong}, but the model's ids are 0 to {vocab_size - 1}.",
            param=name,
            code="token_id_out_of_range",
        )


def _check_routing(options: CompletionOptions) -> None:
    if not _MIN_PRIORITY <= options.priority <= _MAX_PRIORITY:
        raise InvalidRequest(
            f"priority must be between {_MIN_PRIORITY} and {_MAX_PRIORITY}, but is {options.priority}.",
            param="priority",
            code="out_of_range",
        )
    check_unicode("cache_salt", options.cache_salt)
    if len(options.cache_salt) > _MAX_CACHE_SALT_LENGTH:
        raise InvalidRequest(
            f"cache_salt has at most {_MAX_CACHE_SALT_LENGTH} characters.",
            param="cache_salt",
            code="out_of_range",
        )


def _max_tokens(options: CompletionOptions, num_prompt_tokens: int, max_model_len: int) -> int:
    """The client's max_tokens, or the default cut to what is left of the model's length."""
    num_left = max_model_len - num_prompt_tokens
    if num_left < 1:
        raise InvalidRequest(
            f"This model's maximum context length is {max_model_len} tokens, prompt and completion together, "
            f"but the prompt alone has {num_prompt_tokens}.",
            param="prompt",
            code="context_length_exceeded",
        )
    if options.max_tokens is None:
        return num_left if options.default_max_tokens is None else min(options.default_max_tokens, num_left)
    if options.max_tokens < 1:
        raise InvalidRequest(
            f"{options.max_tokens_name} must be at least 1, but is {options.max_tokens}.",
            param=options.max_tokens_name,
            code="out_of_range",
        )
    if options.max_tokens > num_left:
        raise InvalidRequest(
            f"This model's maximum context length is {max_model_len} tokens, but the request asks for "
            f"{num_prompt_tokens + options.max_tokens} ({num_prompt_tokens} in the prompt, "
            f"{options.max_tokens} for the completion). Shorten the prompt or lower "
            f"{options.max_tokens_name}.",
            param=options.max_tokens_name,
            code="context_length_exceeded",
        )
    return options.max_tokens


def _sampling(served: ServedModel, options: CompletionOptions, max_tokens: int) -> SamplingParams:
    check_token_ids("stop_token_ids", options.stop_token_ids, served.vocab_size)
    check_token_ids("logit_bias", [token_id for token_id, _ in options.logit_bias], served.vocab_size)
    eos_token_ids = () if options.ignore_eos else served.eos_token_ids
    seed = secrets.randbits(64) if options.seed is None else options.seed & _MASK64
    return SamplingParams(
        temperature=_or_default(options.temperature, 1.0),
        top_k=0 if options.top_k in (None, -1) else options.top_k,
        top_p=_or_default(options.top_p, 1.0),
        min_p=_or_default(options.min_p, 0.0),
        presence_penalty=_or_default(options.presence_penalty, 0.0),
        frequency_penalty=_or_default(options.frequency_penalty, 0.0),
        repetition_penalty=_or_default(options.repetition_penalty, 1.0),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=options.min_tokens or 0,
        stop_token_ids=tuple(dict.fromkeys((*options.stop_token_ids, *eos_token_ids))),
        logit_bias=options.logit_bias,
        num_logprobs=options.num_logprobs,
        n=1 if options.n is None else options.n,
    )


def _or_default(value: float | None, default: float) -> float:
    return default if value is None else value
