"""What the core needs of rules that a server's owner has added: they change logits before a token is drawn.

A rule is a function of prompt, output and its arguments alone, so that it needs no state that would have to
travel: another worker, or the same one after a preemption, goes on where the answer is.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from baton.core.errors import InvalidRequest
from baton.core.fields import RulesText

FIELD = "logits_rules"


class RequestRules(Protocol):
    """The rules of one request, with their arguments."""

    failure: str | None  # why a rule can't be kept; None while all can

    def apply(self, logits: Any, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> Any:
        """One row of logits `[V]` after all rules; where one fails, `failure` is set."""
        ...


def to_text(value: Any) -> RulesText:
    """Rules as clients write them, an object of arguments by name, as requests carry them.

    Raises InvalidRequest.
    """
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{FIELD} must be an object of rules' arguments by name.", param=FIELD)
    for name, arguments in value.items():
        if arguments is not None and not isinstance(arguments, Mapping):
            raise InvalidRequest(f"{FIELD}.{name} must be an object of arguments.", param=f"{FIELD}.{name}")
    try:
        return RulesText(json.dumps({name: dict(arguments or {}) for name, arguments in value.items()}))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{FIELD} can't be written as JSON: {error}.", param=FIELD) from error


def from_text(text: str) -> dict[str, Mapping[str, Any]]:
    """Arguments by name. Raises InvalidRequest."""
    if not text:
        return {}
    try:
        rules = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{FIELD} is not valid JSON: {error}.", param=FIELD) from error
    to_text(rules)
    found: dict[str, Mapping[str, Any]] = rules
    return found
