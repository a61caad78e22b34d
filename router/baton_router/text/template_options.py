"""What a request may say of how its conversation becomes a prompt; the same for both doors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.core.errors import InvalidRequest

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """Raises InvalidRequest where they don't go together."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the prompt ends with what the last message says
    chat_template: str | None = None  # the request's own; None: the model's
    documents: Sequence[Mapping[str, Any]] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # variables for the template

    def __post_init__(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "A prompt that continues the final message begins no other one: "
                "continue_final_message needs add_generation_prompt: false.",
                param="continue_final_message",
            )
        if self.reasoning_effort not in (None, *REASONING_EFFORTS):
            raise InvalidRequest(
                f"reasoning_effort is {self.reasoning_effort!r}; there are {', '.join(REASONING_EFFORTS)}.",
                param="reasoning_effort",
            )

    @property
    def variables(self) -> dict[str, Any]:
        """For the template. An effort also says whether a model that can do without thinks at all."""
        variables = dict(self.chat_template_kwargs)
        if self.documents is not None:
            variables["documents"] = self.documents
        if self.reasoning_effort is not None:
            variables["reasoning_effort"] = self.reasoning_effort
            variables.setdefault("enable_thinking", self.reasoning_effort != "none")
        return variables
