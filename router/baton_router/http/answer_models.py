"""What answers look like, for the API's document alone: they are made by hand, since each token is one.

A test holds answers of each endpoint against these.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    """What went wrong; `param` names the field that did."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer):
    """OpenAI's error."""

    error: ErrorDetail


class PromptTokensDetails(_Answer):
    """Of the prompt's tokens, those that a prefix cache had."""

    cached_tokens: int


class Usage(_Answer):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(_Answer):
    """One token in the place of a prompt's."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(_Answer):
    """A list each, of one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Answer):
    """One choice, or in a stream its next piece."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(_Answer):
    """An answer of /v1/completions, or a chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(_Answer):
    """A token as it is spelled."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenTokenLogprob(TokenLogprob):
    """The token that came, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Answer):
    """Of the message's tokens."""

    content: list[ChosenTokenLogprob]
    refusal: None


class FunctionCall(_Answer):
    """A call of a tool; in a stream the name stands in its first piece alone."""

    name: str | None = None
    arguments: str


class ToolCall(_Answer):
    """A call, or in a stream its next piece, which says of which call it is."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class Message(_Answer):
    """The answer's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class MessageDelta(_Answer):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class _ChatChoice(_Answer):
    index: int
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class ChatChoice(_ChatChoice):
    """One choice."""

    message: Message


class ChatChunkChoice(_ChatChoice):
    """The next piece of a choice."""

    delta: MessageDelta


class _Chat(_Answer):
    id: str
    created: int
    model: str
    prompt_token_ids: list[int] | None = None
    usage: Usage | None = None


class ChatCompletion(_Chat):
    """An answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatCompletionChunk(_Chat):
    """A chunk of its stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class Model(_Answer):
    """A name that the model is served under."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class Models(_Answer):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Tokens(_Answer):
    """A text's tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Answer):
    """The text of tokens."""

    prompt: str


class Version(_Answer):
    """Baton's version."""

    version: str


class Load(_Answer):
    """How many requests are under way."""

    server_load: int


class AnthropicUsage(_Answer):
    """Tokens; those that a prefix cache had are not among `input_tokens`."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(_Answer):
    """Anthropic's message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: AnthropicUsage


class CountedTokens(_Answer):
    """Of a prompt."""

    input_tokens: int


class AnthropicErrorDetail(_Answer):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(_Answer):
    """Anthropic's error."""

    type: Literal["error"]
    error: AnthropicErrorDetail


def described_events(answer: Any) -> dict[int | str, dict[str, Any]]:
    """A route's `responses` where a stream's events have names, and each its own fields beside `type`."""
    text = "The answer; with `stream` named events, `message_start` first and `message_stop` last"
    event = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
    content = {"text/event-stream": {"schema": event}}
    return {200: {"model": answer, "description": text, "content": content}}


def described(answer: Any, chunk: Any = None) -> dict[int | str, dict[str, Any]]:
    """A route's `responses`: its answer, and the events of its stream, errors among them, if it has one."""
    found: dict[str, Any] = {"model": answer, "description": "The answer"}
    if chunk is not None:
        found["description"] = "The answer; with `stream` an event for each chunk, and at last `data: [DONE]`"
        events = [{"$ref": f"#/components/schemas/{event.__name__}"} for event in (chunk, ErrorBody)]
        found["content"] = {"text/event-stream": {"schema": {"anyOf": events}}}
    return {200: found}
