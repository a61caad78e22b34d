"""The kinds of values that options take: how each is written, and what is refused."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from baton.core.errors import StartupError
from baton.core.reservation import TransferDeadlines

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", re.IGNORECASE)
_TOKENS = re.compile(r"(\d+)([kKmM]?)|(\d+\.\d+)([km])")
_THOUSANDS = {"": 1, "k": 1000, "m": 1000**2, "K": 1024, "M": 1024**2}
_SIZE_EXPONENTS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class Values:
    """One kind of values; if nothing else is said, all of the field's type, written as they are."""

    check: Callable[[str, Any], None] | None = None  # of an option's name and a value; raises StartupError
    written_as: type | None = None  # a list: each by itself; None: the field's own type
    read: Callable[[Any], Any] = lambda as_it_is: as_it_is  # from what is written; raises StartupError
    write: Callable[[Any], Any] = lambda as_it_is: as_it_is  # the inverse of `read`
    metavar: str | None = None  # what --help calls one; None: by its type
    ends: tuple[int, int] | None = None  # the least and the greatest, both included, where --help shows them


def choice(what: str, *names: str) -> Values:
    """Some names; `what` they are is for the error's text."""
    return aliased_choice(what, {name: name for name in names})


def aliased_choice(what: str, spellings: Mapping[str, str]) -> Values:
    """Some names, each of which may be written in several ways: its `spellings`."""

    def read(written: str) -> str:
        return spellings.get(written, written)

    def check(name: str, value: str) -> None:
        if value not in spellings.values():
            raise StartupError(f"unknown {what} '{value}': use {', '.join(spellings)}")

    return Values(check, str, read, metavar="NAME")


def between(least: int, greatest: int) -> Values:
    """Whole numbers from the one to the other, both included."""

    def check(name: str, value: int) -> None:
        if not least <= value <= greatest:
            raise StartupError(f"{name} must be from {least} to {greatest}, but is {value}")

    return Values(check, ends=(least, greatest))


def parse_size(text: str) -> int:
    """Bytes of '1GiB', '512MiB', '2G', '1.5g' or '1048576'; units are powers of 1024, as memory comes.

    Raises StartupError on anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match is not None:
        number, unit, _ = match.groups()
        size = int(float(number) * 1024 ** _SIZE_EXPONENTS[unit.lower()])
    if size < 1:
        raise StartupError(f"'{text}' is not a size: write it like 1GiB, 512MiB or 1073741824")
    return size


def parse_tokens(text: str) -> int:
    """Tokens of '8192', '8K' (of 1,024), '8k' (of 1,000) or '25.6k'; M and m likewise, as vLLM has them.

    Raises StartupError on anything else.
    """
    match = _TOKENS.fullmatch(text.strip())
    if match is None:
        raise StartupError(
            f"'{text}' is no number of tokens: write it like 8192, 8K (8,192) or 8k (8,000), or leave it out"
        )
    whole, unit, decimal, decimal_unit = match.groups()
    if whole is not None:
        return int(whole) * _THOUSANDS[unit]
    return round(float(decimal) * _THOUSANDS[decimal_unit])


def _require_names(name: str, value: tuple[str, ...]) -> None:
    if not value or not all(value):
        raise StartupError(f"{name} is empty: give a name, or leave the option out")


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise StartupError(f"{name} must be at least 1, but is {value}")


def _require_share(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise StartupError(f"{name} must be above 0 and at most 1, but is {value}")


def _require_seconds(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise StartupError(f"{name} must be a number of seconds above 0, but is {value}")


def _require_deadlines(name: str, deadlines: TransferDeadlines) -> None:
    _require_seconds(name, deadlines.receiving_s)


def _json_object(name: str, value: str) -> None:
    try:
        is_one = isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        is_one = False
    if not is_one:
        raise StartupError(f"{name} must be a JSON object, but is '{value}'")


def _json_strings(written: str) -> tuple[str, ...]:
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise StartupError(f"'{written}' is not a JSON list of strings: write it like [\"*\"]")
    return tuple(value)


ANY = Values()
TEXT = Values(written_as=str)  # of which the command still makes the field's value
ADDRESS = Values(metavar="ADDRESS")
RULE_NAMES = Values(written_as=list[str], read=tuple, write=list, metavar="NAME")
ADDRESSES = Values(written_as=list[str], read=tuple, write=list, metavar="ADDRESS")
NAMES = Values(_require_names, list[str], tuple, list, metavar="NAME")
FILE = Values(metavar="FILE")
POSITIVE = Values(_require_positive)
TOKENS = Values(_require_positive, str, parse_tokens, str, metavar="TOKENS")
SHARE = Values(_require_share, metavar="SHARE")
SECONDS = Values(_require_seconds, metavar="SECONDS")
JSON_OBJECT = Values(_json_object, metavar="JSON")
JSON_STRINGS = Values(
    written_as=str, read=_json_strings, write=lambda values: json.dumps(list(values)), metavar="JSON"
)
SIZE = Values(_require_positive, str, parse_size)
DEADLINES = Values(
    _require_deadlines, float, TransferDeadlines.at_most, attrgetter("receiving_s"), metavar="SECONDS"
)
