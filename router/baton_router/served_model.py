"""What both front doors (HTTP and gRPC) serve: one model over one backend."""

from dataclasses import dataclass

from baton.core.errors import ModelNotFound
from baton_router.backend import Backend
from baton_router.metrics import FrontMetrics
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
