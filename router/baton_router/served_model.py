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
    model: str  # the name that clients use
    root: str  # where the model's files came from
    version: str  # Baton's
    created: int  # seconds since the epoch
    vocab_size: int  # the model's; token ids from clients lie below it
    eos_token_ids: tuple[int, ...]
    metrics: FrontMetrics
    formats: FormatChecks
    front: FrontConfig = field(default_factory=FrontConfig)
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    @property
    def max_counted_tokens(self) -> int:
        """Tokens of a text that a client only wants to know: it may have more than a request can."""
        return max(_COUNTED_TOKENS, self.backend.max_model_len)

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFound if the client named another model; no name means the one that is served."""
        if name and name != self.model:
            raise ModelNotFound(name, self.model)

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


def load_served_model(
    model_dir: Path,
    name: str,
    backend: Backend,
    metrics: FrontMetrics,
    structured_outputs: str = "auto",
    front: FrontConfig | None = None,
) -> ServedModel:
    """Read what front doors need of a model's files; its weights are not among it. Raises StartupError."""
    tokenizer, front = Tokenizer.load(model_dir), front or FrontConfig()
    return ServedModel(
        backend=backend,
        tokenizer=tokenizer,
        model=name,
        root=str(model_dir),
        version=__version__,
        created=int(time.time()),
        vocab_size=vocab_size(read_config(model_dir)),
        # Without any, every answer would go on to its greatest length.
        eos_token_ids=eos_token_ids(model_dir) or tokenizer.eos_token_ids,
        metrics=metrics,
        formats=FormatChecks(structured_outputs),
        front=front,
        defaults=generation_defaults(model_dir, front.generation_config, front.overrides),
    )
