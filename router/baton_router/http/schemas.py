"""Bodies of requests, strict: a value of the wrong type is an error, not a guess."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainValidator

from baton.core.errors import InvalidRequest
from baton_router.text.chat_template import require_few_messages
from baton_router.text.stop_strings import StopStrings
from baton_router.text_request import CompletionOptions

MAX_PROMPTS = 1024

Prompt = str | list[int]


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)


def _prompts(value: Any) -> list[Prompt]:
    """One text, one list of token ids, or a list of either, as a list."""
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


def _stop(value: Any) -> tuple[str, ...]:
    """None, one string or a list of them."""
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise InvalidRequest("stop must be a string or a list of strings.", param="stop")
    return tuple(strings)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """JSON has no integer keys, so token ids come as strings."""
    if not isinstance(value, dict | None):
        raise InvalidRequest("logit_bias must map token ids to numbers.", param="logit_bias")
    pairs = []
    for key, bias in (value or {}).items():
        if not key.isascii() or not key.isdigit() or type(bias) not in (int, float):
            raise InvalidRequest("logit_bias must map token ids to numbers.", param="logit_bias")
        try:
            pairs.append((int(key), float(bias)))
        except (OverflowError, ValueError):  # Python's limits: numbers of hundreds of digits
            raise InvalidRequest(
                "logit_bias holds a number of too many digits.", param="logit_bias"
            ) from None
    return tuple(pairs)


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`, and vLLM's addition."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None

    @property
    def unknown_fields(self) -> dict[str, Any]:
        """Fields that the body has and the schema has not."""
        return self.model_extra or {}


class GenerationBody(_Body):
    """What completions and chat have in common."""

    n: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stop, json_schema_input_type=str | list[str])] = ()
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False
    logit_bias: Annotated[
        tuple[tuple[int, float], ...],
        PlainValidator(_logit_bias, json_schema_input_type=dict[str, float]),
    ] = ()
    priority: int | None = None
    cache_salt: str | None = None
    skip_special_tokens: bool | None = True
    return_token_ids: bool | None = False

    def check_stream_options(self) -> None:
        """Raises InvalidRequest where they are given without `stream`."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options need stream: true.", param="stream_options")

    def options(
        self,
        *,
        num_logprobs: int | None,
        max_tokens: int | None,
        max_tokens_name: str = "max_tokens",
        default_max_tokens: int | None = None,
    ) -> CompletionOptions:
        """The fields that both doors know."""
        return CompletionOptions(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=StopStrings(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logit_bias=self.logit_bias,
            num_logprobs=num_logprobs,
            n=self.n,
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
            skip_special_tokens=self.skip_special_tokens is not False,
            default_max_tokens=default_max_tokens,
            max_tokens_name=max_tokens_name,
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[
        list[Prompt],
        PlainValidator(_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
    ]
    logprobs: int | None = None
    echo: bool | None = False
    best_of: int | None = None
    add_special_tokens: bool | None = True


class ContentPart(BaseModel):
    """A part of a message's content; only text is served."""

    model_config = ConfigDict(strict=True)

    type: str
    text: str | None = None


def _content(value: Any) -> str:
    """A string, or text parts, joined by line breaks; null is the empty string."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise InvalidRequest("content must be a string or a list of text parts.", param="messages")
    return "\n".join(_part_text(part) for part in value)


def _part_text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise InvalidRequest(
            f"Content parts of type {kind!r} are not supported, only 'text'.",
            param="messages",
            code="unsupported_content",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest("A text part must have a string as its text.", param="messages")
    return text


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: Annotated[
        str, PlainValidator(_content, json_schema_input_type=str | list[ContentPart] | None)
    ] = ""
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As templates know messages. Raises InvalidRequest for what belongs to tools."""
        extra = self.model_extra or {}
        if self.role in ("tool", "function") or extra.get("tool_calls") or extra.get("function_call"):
            raise InvalidRequest(
                "Messages of tools are not supported by this server.",
                param="messages",
                code="unsupported_parameter",
            )
        named = {"name": self.name} if self.name is not None else {}
        return {"role": self.role, "content": self.content, **named}


def _few_messages(value: Any) -> Any:
    """The list as it is; counted before its messages are checked one by one, which is the work."""
    if isinstance(value, list):
        require_few_messages(len(value))
    return value


Messages = Annotated[list[ChatMessage], BeforeValidator(_few_messages)]


class ConversationBody(_Body):
    """A conversation and how it becomes a prompt."""

    messages: Messages
    add_generation_prompt: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = False


class ChatBody(GenerationBody, ConversationBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None


class TokenizeBody(_Body):
    """POST /tokenize: a prompt or a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False


class DetokenizeBody(_Body):
    """POST /detokenize."""

    tokens: list[int]
