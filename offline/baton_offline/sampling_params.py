"""What programs say of sampling: the fields that HTTP has, under the same names."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, create_model

from baton.core.fields import FormatText, RulesText, TokenBiases, TokenIds, TokenSequences, rows
from baton.core.logits_rules import to_text
from baton.core.sampling import SamplingParams as EngineSampling
from baton_router.backend import TextOptions
from baton_router.structured_outputs import from_structured_outputs
from baton_router.text.repetition import Repetition
from baton_router.text.stop_strings import StopStrings

DEFAULT_MAX_TOKENS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """What an answer has to look like: one of them.

    `json` is a JSON schema; `grammar` is in Lark's notation or GBNF.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Mapping[str, Any] | str | None = None
    disable_any_whitespace: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class RepetitionDetectionParams:
    """Ends an answer whose last tokens are a pattern of `min_pattern_size` to `max_pattern_size` tokens,
    `min_count` times in a row; a `max_pattern_size` of 0 ends none."""

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0


def _biases(value: Mapping[int, float]) -> TokenBiases:
    return tuple(sorted(value.items()))


def _format(value: StructuredOutputsParams | Mapping[str, Any]) -> FormatText | None:
    given = value if isinstance(value, Mapping) else dataclasses.asdict(value)
    choice = given.get("choice")
    return from_structured_outputs({**given, "choice": list(choice) if choice else choice})


# How programs write the types of the table, and what becomes of it.
_WRITTEN: dict[Any, tuple[Any, Any]] = {
    TokenIds: (Sequence[int], tuple),
    TokenIds | None: (Sequence[int], tuple),
    TokenSequences: (Sequence[str], list),
    TokenBiases: (Mapping[int, float], _biases),
    FormatText: (StructuredOutputsParams, _format),
    RulesText: (Mapping[str, Mapping[str, Any] | None], to_text),
}
_OTHERS: dict[str, tuple[Any, Any]] = {
    "stop": (str | Sequence[str] | None, None),
    "ignore_eos": (bool, False),
    "best_of": (int | None, None),
    "use_beam_search": (bool, False),
    "length_penalty": (float | None, None),
    "skip_special_tokens": (bool, True),
    "spaces_between_special_tokens": (bool, True),
    "include_stop_str_in_output": (bool, False),
    "truncate_prompt_tokens": (int | None, None),
    "truncation_side": (str | None, None),
    "repetition_detection": (RepetitionDetectionParams | None, None),
}


def _written(row_type: Any) -> Any:
    return _WRITTEN.get(row_type, (row_type,))[0] | None


def _fields() -> dict[str, tuple[Any, Any]]:
    """A field for each row of the table: None is the default that it has for all clients."""
    return {row.public_name: (_written(row.type), None) for row in rows(EngineSampling)} | _OTHERS


if TYPE_CHECKING:
    SamplingParams = Any
else:
    SamplingParams = create_model(
        "SamplingParams",
        __config__=ConfigDict(strict=True, frozen=True, extra="forbid"),
        __module__=__name__,
        **_fields(),
    )
    SamplingParams.__doc__ = """How answers are sampled and when they end; what is left out has its default.

    See docs/api.md for what each field means: they are those of /v1/completions. Raises pydantic's
    ValidationError, a ValueError, for values of the wrong type and unknown fields.
    """


def request_fields(params: SamplingParams) -> dict[str, Any]:
    """As `baton_router.request_checks.build_request` takes them. Raises InvalidRequest."""
    names = ("ignore_eos", "best_of", "use_beam_search", "length_penalty")
    fields: dict[str, Any] = {name: getattr(params, name) for name in names}
    for row in rows(EngineSampling):
        value = getattr(params, row.public_name)
        if value is not None and row.type in _WRITTEN:
            value = _WRITTEN[row.type][1](value)
        fields[row.public_name] = value
    return fields


def text_options(params: SamplingParams) -> TextOptions:
    """How tokens become text.

    Raises InvalidRequest for too many stop strings, and for numbers of a repetition that don't go together.
    """
    stop = params.stop or ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    detection = params.repetition_detection or RepetitionDetectionParams()
    return TextOptions(
        StopStrings(strings),
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
        includes_stop=params.include_stop_str_in_output,
        repetition=Repetition(**dataclasses.asdict(detection)),
    )
