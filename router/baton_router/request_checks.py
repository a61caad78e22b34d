"""From what a client asks for to what the backend is asked for; one function for HTTP and gRPC."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from baton.core.errors import InvalidRequest
from baton.core.fields import Between, TokenSequences, rows
from baton.core.sampling import MAX_SEED, SamplingParams
from baton.grammars.formats import FIELD, says_where_it_ends
from baton_router.answer_choice import read_answer_choice
from baton_router.backend import GenerationRequest, TextOptions
from baton_router.request_ids import unique_id
from baton_router.served_model import ServedModel
from baton_router.text.bad_words import bad_words
from baton_router.text.tokenizer import check_unicode
from baton_router.truncation import Truncation

_MAX_CACHE_SALT_LENGTH = 1024
_PRIORITY = Between(-(2**31), 2**31 - 1)


async def build_request(
    served: ServedModel,
    prompt: str | Sequence[int],
    fields: Mapping[str, Any],
    text: TextOptions,
    *,
    answer_id: str,
    index: int = 0,
    priority: int = 0,
    cache_salt: str = "",
    add_special_tokens: bool = True,
    default_max_tokens: int | None = None,
    truncation: Truncation | None = None,
) -> GenerationRequest:
    """Encode the prompt (text) or check it (token ids), and check everything else.

    `fields` are those of SamplingParams by public name, those of `baton_router.answer_choice`, `ignore_eos`,
    `max_completion_tokens` and `response_format`, as the client sent them; None: left out. `index` is the
    prompt's among those of `answer_id`. `default_max_tokens` holds where the server has none of its own;
    without both the default is what the prompt leaves of the model's length.
    Raises InvalidRequest, with the public name of the field in `param`.
    """
    arrived_s = time.monotonic()
    default_max_tokens = served.defaults.fields.get("max_tokens", default_max_tokens)
    _check_routing(priority, cache_salt)
    if fields.get("thinking_token_budget") is not None:
        raise InvalidRequest(
            "thinking_token_budget is for chats: where a completion's prompt leaves off is not known.",
            param="thinking_token_budget",
            code="unsupported_parameter",
        )
    token_ids = await _prompt_token_ids(served, prompt, add_special_tokens, is_cut=truncation is not None)
    if truncation is not None:
        asked = _asked_max_tokens(fields)[1]
        most = served.backend.max_model_len - (asked or default_max_tokens or 1)
        token_ids = tuple(truncation.kept(token_ids, max(1, most)))
    max_tokens = _max_tokens(fields, len(token_ids), served.backend.max_model_len, default_max_tokens)
    sampling = _sampling(served, fields, max_tokens)
    for field in (FIELD, "response_format"):
        if (form := fields.get(field)) is not None:
            sampling = replace(sampling, grammar=await served.formats.checked(form, field))
    num_candidates, beams = read_answer_choice(fields, sampling, text)
    return GenerationRequest(
        unique_id(answer_id, index),
        token_ids,
        sampling,
        priority,
        cache_salt,
        text,
        arrived_s,
        answer_id,
        num_candidates,
        beams,
        _end_token_ids(served, fields),
    )


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


def _check_routing(priority: int, cache_salt: str) -> None:
    _PRIORITY.check("priority", priority)
    check_unicode("cache_salt", cache_salt)
    if len(cache_salt) > _MAX_CACHE_SALT_LENGTH:
        raise InvalidRequest(
            f"cache_salt has at most {_MAX_CACHE_SALT_LENGTH} characters.",
            param="cache_salt",
            code="out_of_range",
        )


async def _prompt_token_ids(
    served: ServedModel, prompt: str | Sequence[int], add_special_tokens: bool, *, is_cut: bool
) -> tuple[int, ...]:
    if isinstance(prompt, str):
        limit = served.max_counted_tokens if is_cut else served.backend.max_model_len
        encoded = await served.tokenizer.encode(
            prompt, max_tokens=limit, add_special_tokens=add_special_tokens
        )
        token_ids = tuple(encoded)
    else:
        token_ids = tuple(prompt)
    # Of a text too: a tokenizer may know tokens that the model lacks.
    check_token_ids("prompt", token_ids, served.vocab_size)
    if not token_ids:
        raise InvalidRequest("The prompt is empty.", param="prompt", code="empty_prompt")
    return token_ids


def _max_tokens(
    fields: Mapping[str, Any], num_prompt_tokens: int, max_model_len: int, default: int | None
) -> int:
    """What the client asks for, or the default cut to what is left of the model's length."""
    num_left = max_model_len - num_prompt_tokens
    if num_left < 1:
        raise InvalidRequest(
            f"This model's maximum context length is {max_model_len} tokens, prompt and completion together, "
            f"but the prompt alone has {num_prompt_tokens}.",
            param="prompt",
            code="context_length_exceeded",
        )
    name, max_tokens = _asked_max_tokens(fields)
    if max_tokens is None:
        return num_left if default is None else min(default, num_left)
    if max_tokens < 1:
        raise InvalidRequest(
            f"{name} must be at least 1, but is {max_tokens}.", param=name, code="out_of_range"
        )
    if max_tokens > num_left:
        raise InvalidRequest(
            f"This model's maximum context length is {max_model_len} tokens, but the request asks for "
            f"{num_prompt_tokens + max_tokens} ({num_prompt_tokens} in the prompt, {max_tokens} for the "
            f"completion). Shorten the prompt or lower {name}.",
            param=name,
            code="context_length_exceeded",
        )
    return max_tokens


def _asked_max_tokens(fields: Mapping[str, Any]) -> tuple[str, int | None]:
    """By which of its two names, and how many."""
    name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    return name, fields.get(name)


def _sampling(served: ServedModel, fields: Mapping[str, Any], max_tokens: int) -> SamplingParams:
    values: dict[str, Any] = {}
    for row in rows(SamplingParams):
        value = fields.get(row.public_name)
        if value is None:
            value = served.defaults.fields.get(row.public_name)
        if value is not None and value != row.also_off:
            check_token_ids(row.public_name, row.token_ids(value), served.vocab_size)
            values[row.name] = bad_words(served.tokenizer, value) if row.type == TokenSequences else value
    stop_token_ids = (*values.get("stop_token_ids", ()), *_end_token_ids(served, fields))
    values["stop_token_ids"] = tuple(dict.fromkeys(stop_token_ids))
    values["seed"] = values.get("seed", secrets.randbits(64)) & MAX_SEED
    values["max_tokens"] = max_tokens
    for name, public_name in (("num_logprobs", "logprobs"), ("num_prompt_logprobs", "prompt_logprobs")):
        if (num_logprobs := values.get(name)) is not None:
            Between(0, served.front.max_logprobs).check(public_name, num_logprobs)
    return SamplingParams(**values)


def _end_token_ids(served: ServedModel, fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The model's own, where they end this answer."""
    forms = [form for field in (FIELD, "response_format") if (form := fields.get(field)) is not None]
    goes_on = fields.get("ignore_eos") and not any(map(says_where_it_ends, forms))
    return () if goes_on else served.eos_token_ids
