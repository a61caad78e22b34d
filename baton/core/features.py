"""What a request needs of its workers, and what workers know: by names, so that in a cluster of different
versions none ignores in silence what a client asks for.

A row of the table of sampling fields is a feature of its name. What is not in the table is named here.
"""

from dataclasses import fields

from baton.core.logits_rules import FIELD as RULES
from baton.core.logits_rules import from_text
from baton.core.sampling import SamplingParams

ANSWERED_TOKENS = "answered_token_ids"  # an answer goes on where another worker has left it

KNOWN_FEATURES = frozenset({ANSWERED_TOKENS, *(field.name for field in fields(SamplingParams))})


def rule_feature(name: str) -> str:
    """What a worker knows that has a logits rule of this name."""
    return f"{RULES}.{name}"


def needed_features(sampling: SamplingParams, *, is_answered: bool) -> frozenset[str]:
    """What the workers of a request have to know: `is_answered`, that some of its tokens stand already."""
    asked = {field.name for field in fields(sampling) if getattr(sampling, field.name) != field.default}
    asked |= {rule_feature(name) for name in from_text(sampling.logits_rules)}
    return frozenset(asked | {ANSWERED_TOKENS}) if is_answered else frozenset(asked)
