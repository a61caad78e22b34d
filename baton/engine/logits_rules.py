"""Rules of the server's owner for logits, found by entry points of the group `baton.logits_rules`.

A rule is a pure function `rule(logits, prompt, output, arguments)`: logits are float32 `[V]` on the engine's
device, finite, and it may change them in place; prompt and output are token ids, and `arguments` what the
request says. It returns logits of the same shape. It sees the model's own logits; what may not come at all,
biases, min_tokens and penalties follow it.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from baton.core.errors import InvalidRequest, StartupError
from baton.core.logits_rules import FIELD, RequestRules, from_text

GROUP = "baton.logits_rules"

Rule = Callable[[Tensor, Sequence[int], Sequence[int], Mapping[str, Any]], Tensor]


class LogitsRules:
    """The rules that this worker was started with."""

    def __init__(self, rules: Mapping[str, Rule] | None = None) -> None:
        """`rules` by name."""
        self._rules = dict(rules or {})

    @classmethod
    def load(cls, names: Sequence[str]) -> "LogitsRules":
        """Import them. Raises StartupError for a name that no installed package has, or that can't be had."""
        return cls({name: _load(name) for name in names})

    @property
    def names(self) -> frozenset[str]:
        """Of all of them."""
        return frozenset(self._rules)

    def of_request(self, text: str) -> RequestRules | None:
        """What a request asks for; None: nothing. Raises InvalidRequest for a rule that is not here."""
        asked = from_text(text)
        for name in asked:
            if name not in self._rules:
                raise InvalidRequest(f"This worker has no logits rule '{name}'.", param=f"{FIELD}.{name}")
        if not asked:
            return None
        return _Applied([(name, self._rules[name], arguments) for name, arguments in asked.items()])


class _Applied:
    """Implements `RequestRules`."""

    def __init__(self, rules: Sequence[tuple[str, Rule, Mapping[str, Any]]]) -> None:
        self.failure: str | None = None
        self._rules = rules

    def apply(
        self, logits: Tensor, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]
    ) -> Tensor:
        """See RequestRules. A rule gets copies, so that it can't change a sequence."""
        prompt, output = tuple(prompt_token_ids), tuple(output_token_ids)
        for name, rule, arguments in self._rules:
            try:
                changed = rule(logits, prompt, output, arguments)
                if not isinstance(changed, Tensor) or changed.shape != logits.shape:
                    raise TypeError(f"it returned {_kind(changed)} and not logits {list(logits.shape)}")
                logits = changed.float().nan_to_num(nan=torch.finfo(torch.float32).min)
            except Exception as error:  # somebody else's code, which is not to cost others their requests
                self.failure = f"The logits rule '{name}' failed: {type(error).__name__}: {error}"
                return logits
        return logits


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _load(name: str) -> Rule:
    found = entry_points(group=GROUP)
    if name not in found.names:
        known = ", ".join(sorted(found.names)) or "none"
        raise StartupError(f"no package has an entry point '{name}' in the group {GROUP}; there are {known}")
    try:
        rule = found[name].load()
    except Exception as error:  # somebody else's code
        raise StartupError(
            f"the logits rule '{name}' can't be had: {type(error).__name__}: {error}"
        ) from error
    if not callable(rule):
        raise StartupError(f"the logits rule '{name}' is no function but {type(rule).__name__}")
    loaded: Rule = rule
    return loaded
