"""Tables of the fields that clients send.

A table is a frozen dataclass, such as SamplingParams. Beside a field's type stands what its values have to
be, as in `Annotated[float, Above(0, 1)]`; its default is what a client gets that leaves it out. From the rows
derive HTTP's bodies, how messages of gRPC and to workers are read and written, and all checks.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Protocol, get_args, get_origin, get_type_hints

from baton.core.errors import InvalidRequest

TokenIds = tuple[int, ...]
TokenSequences = tuple[TokenIds, ...]  # clients write texts
TokenBiases = tuple[tuple[int, float], ...]  # (token id, added to its logit)


class FormatText(str):
    """What an answer has to look like, as JSON text; clients write it as an object."""


ANY_FORMAT = FormatText("")


class RulesText(str):
    """Rules for logits by name, with their arguments, as JSON text; clients write an object."""


NO_RULES = RulesText("")


class PublicName(str):
    """What clients call a field that has another name in the table."""


class AlsoOff(int):
    """Another value that clients may send for the default."""


class Rule(Protocol):
    """What a value has to be."""

    def check(self, name: str, value: Any, table: object = None) -> None:
        """Raises InvalidRequest, which names the field `name`; `table` holds the other fields."""
        ...


@dataclass(frozen=True, slots=True)
class Between:
    """A number from `low` to `high`, which may be the name of another field."""

    low: float
    high: float | str

    def check(self, name: str, value: float, table: object = None) -> None:
        """See Rule."""
        high = getattr(table, self.high) if isinstance(self.high, str) else self.high
        if not self.low <= value <= high:  # false for NaN as well
            raise _out_of_range(name, value, f"between {self.low} and {high}")


@dataclass(frozen=True, slots=True)
class Above:
    """A number that is larger than `low` and at most `high`."""

    low: float
    high: float

    def check(self, name: str, value: float, table: object = None) -> None:
        """See Rule."""
        if not self.low < value <= self.high:
            raise _out_of_range(name, value, f"above {self.low} and at most {self.high}")


@dataclass(frozen=True, slots=True)
class AtMost:
    """So many entries or fewer."""

    length: int

    def check(self, name: str, value: Sized, table: object = None) -> None:
        """See Rule."""
        if len(value) > self.length:
            raise _out_of_range(name, len(value), f"at most {self.length} long")


@dataclass(frozen=True, slots=True)
class AtLeastOne:
    """Not empty."""

    def check(self, name: str, value: Sized, table: object = None) -> None:
        """See Rule."""
        if not value:
            raise InvalidRequest(f"{name} must not be empty.", param=name, code="out_of_range")


@dataclass(frozen=True, slots=True)
class EachBias:
    """Token biases that each keep a rule."""

    rule: Rule

    def check(self, name: str, value: TokenBiases, table: object = None) -> None:
        """See Rule."""
        for _, bias in value:
            self.rule.check(name, bias, table)


@dataclass(frozen=True, slots=True)
class Row:
    """One field of a table."""

    name: str  # in the table, and in the workers' message
    public_name: str  # in errors, and in the messages of clients
    type: Any  # of its values
    rules: tuple[Rule, ...]
    also_off: int | None

    def token_ids(self, value: Any) -> Sequence[int]:
        """The token ids in a value of the field."""
        if self.type == TokenBiases:
            return [token_id for token_id, _ in value]
        return value if self.type in (TokenIds, TokenIds | None) else ()


@cache
def rows(table: type) -> tuple[Row, ...]:
    """The fields of a table, in its order."""
    hints = get_type_hints(table, include_extras=True)
    return tuple(_row(field.name, hints[field.name]) for field in fields(table))


def check_fields(table: object) -> None:
    """Raises InvalidRequest, with the public name in `param`, where a value breaks a rule; None does not."""
    kind: type = type(table)
    for row in rows(kind):
        if (value := getattr(table, row.name)) is not None:
            for rule in row.rules:
                rule.check(row.public_name, value, table)


def _row(name: str, hint: Any) -> Row:
    value_type, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    public_name = next((note for note in notes if isinstance(note, PublicName)), name)
    also_off = next((note for note in notes if isinstance(note, AlsoOff)), None)
    rules = tuple(note for note in notes if not isinstance(note, PublicName | AlsoOff))
    return Row(name, public_name, value_type, rules, also_off)


def _out_of_range(name: str, value: float, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {allowed}, but is {value}.", param=name, code="out_of_range")
