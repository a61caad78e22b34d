"""What both front doors (HTTP and gRPC) serve: one model over one backend."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from baton import __version__
from baton.core.errors import InvalidRequest, ModelNotFound
from baton.front_config import FrontConfig
from baton.generation_defaults import GenerationDefaults, generation_defaults
from baton.model_files import eos_token_ids, read_config, vocab_size
from baton_router.backend import Backend
from baton_router.chat_output import detect
from baton_router.chat_output.formats import ReasoningFormat, ToolFormat
from baton_router.metrics import FrontMetrics
from baton_router.structured_outputs import FormatChecks
from baton_router.text.messages import Message
from baton_router.text.template_options import TemplateOptions
from baton_router.text.tokenizer import Tokenizer

_COUNTED_TOKENS = 2**20


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Everything that a front door needs, put together once at start."""

    backend: Backend
    tokenizer: Tokenizer
    model: str  # the name that answers bear
    root: str  # where the model's files came from
    version: str  # Baton's
    created: int  # seconds since the epoch
    vocab_size: int  # the model's; token ids from clients lie below it
    eos_token_ids: tuple[int, ...]
    metrics: FrontMetrics
    formats: FormatChecks
    chat: "ChatFormats"
    front: FrontConfig = field(default_factory=FrontConfig)
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    other_names: tuple[str, ...] = ()  # that clients may use as well

    @property
    def names(self) -> tuple[str, ...]:
        """All that clients may call the model."""
        return (self.model, *self.other_names)

    @property
    def max_counted_tokens(self) -> int:
        """Tokens of a text that a client only wants to know: it may have more than a request can."""
        return max(_COUNTED_TOKENS, self.backend.max_model_len)

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFound if the client named another model; no name means the one that is served."""
        if name and name not in self.names:
            raise ModelNotFound(name, self.names)

    def render(self, messages: Sequence[Message], options: TemplateOptions) -> str:
        """The prompt of a conversation. Raises InvalidRequest where it has none."""
        if not messages:
            raise InvalidRequest("messages must hold at least one message.", param="messages")
        if options.chat_template is not None and not self.front.trust_request_chat_template:
            raise InvalidRequest(
                "This server does not take a chat_template from requests; "
                "its option --trust-request-chat-template says so.",
                param="chat_template",
                code="unsupported_parameter",
            )
        return self.tokenizer.render_chat(
            messages,
            add_generation_prompt=options.add_generation_prompt,
            variables=options.variables,
            continue_final_message=options.continue_final_message,
            template=options.chat_template,
        )


@dataclass(frozen=True, slots=True)
class ChatFormats:
    """How the model writes what is no plain text in its answers."""

    tool_format: ToolFormat | None = None  # None: it calls no tools that anybody could read
    reasoning_format: ReasoningFormat | None = None  # None: it does not think

    def text(self) -> str:
        """One line for the log."""
        tools = "none" if self.tool_format is None else self.tool_format.name
        thinking = "none" if self.reasoning_format is None else self.reasoning_format.name
        return f"formats of chats: tool calls {tools}, thinking {thinking}"


def chat_formats(tokenizer: Tokenizer, model_type: str, tool_calls: str, reasoning: str) -> ChatFormats:
    """The formats of these names; `auto`: by the chat template. Raises StartupError for unknown names."""
    template = tokenizer.chat_template_source
    return ChatFormats(
        detect.tool_format(tool_calls, template, model_type),
        detect.reasoning_format(reasoning, template, model_type),
    )


def load_served_model(
    model_dir: Path,
    names: Sequence[str],
    backend: Backend,
    metrics: FrontMetrics,
    *,
    structured_outputs: str = "auto",
    tool_calls: str = detect.AUTO,
    reasoning: str = detect.AUTO,
    front: FrontConfig | None = None,
) -> ServedModel:
    """Read what front doors need of a model's files; its weights are not among it.

    Clients may call the model by each of `names`; the first is its own. Raises StartupError.
    """
    name, *other_names = dict.fromkeys(names)
    front = front or FrontConfig()
    tokenizer, config = Tokenizer.load(model_dir), read_config(model_dir)
    return ServedModel(
        backend=backend,
        tokenizer=tokenizer,
        model=name,
        root=str(model_dir),
        version=__version__,
        created=int(time.time()),
        vocab_size=vocab_size(config),
        # Without any, every answer would go on to its greatest length.
        eos_token_ids=eos_token_ids(model_dir) or tokenizer.eos_token_ids,
        metrics=metrics,
        formats=FormatChecks(structured_outputs),
        chat=chat_formats(tokenizer, str(config.get("model_type", "")), tool_calls, reasoning),
        other_names=tuple(other_names),
        front=front,
        defaults=generation_defaults(model_dir, front.generation_config, front.overrides),
    )
