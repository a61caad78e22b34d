"""Bodies of requests, strict: a value of the wrong type is an error, not a guess."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    create_model,
)

from baton.core.errors import InvalidRequest
from baton.core.fields import FormatText, RulesText, TokenBiases, TokenIds, TokenSequences, rows
from baton.core.logits_rules import to_text
from baton_router.structured_outputs import from_structured_outputs
from baton_router.truncation import Truncation


class Body(BaseModel):
    """What every body has in common."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None

    @property
    def unknown_fields(self) -> dict[str, Any]:
        """Fields that the body has and the schema has not; null is not set."""
        extra = self.model_extra or {}
        return {name: value for name, value in extra.items() if value is not None}


def unchecked(documented: Any) -> PlainValidator:
    """What makes a field that is checked elsewhere; `documented`: the type that the API's document has."""
    return PlainValidator(lambda value: value, json_schema_input_type=documented)


def _whole_number(value: Any) -> Any:
    """3 where JSON says 3.0, as clients do whose language has one kind of number."""
    return int(value) if type(value) is float and value.is_integer() else value


# An integer of a body: strict but for that.
WholeNumber = Annotated[int, BeforeValidator(_whole_number)]


def _token_biases(value: Any, info: ValidationInfo) -> TokenBiases | None:
    """JSON has no integer keys, so token ids come as strings."""
    if value is None:
        return None
    name = info.field_name
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must map token ids to numbers.", param=name)
    pairs = []
    for key, bias in value.items():
        if not key.isascii() or not key.isdigit() or type(bias) not in (int, float):
            raise InvalidRequest(f"{name} must map token ids to numbers.", param=name)
        try:
            pairs.append((int(key), float(bias)))
        except (OverflowError, ValueError):  # Python's limits: numbers of hundreds of digits
            raise InvalidRequest(f"{name} holds a number of too many digits.", param=name) from None
    return tuple(pairs)


class StructuredOutputs(BaseModel):
    """One of them: what the answer has to look like."""

    model_config = ConfigDict(title="StructuredOutputs")

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = None


def _format(value: Any, info: ValidationInfo) -> FormatText | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{info.field_name} must be an object.", param=info.field_name)
    return from_structured_outputs(value)


def _rules(value: Any) -> RulesText | None:
    return None if value is None else to_text(value)


class TruncatedBody(Body):
    """Whose prompt may be cut."""

    truncate_prompt_tokens: WholeNumber | None = None
    truncation_side: str | None = None

    def truncation(self) -> Truncation | None:
        """How. Raises InvalidRequest."""
        return Truncation.asked(self.truncate_prompt_tokens, self.truncation_side)


# The types of a table that JSON spells otherwise.
_JSON_TYPES: dict[Any, Any] = {
    int: WholeNumber,
    int | None: WholeNumber,
    RulesText: Annotated[
        Any, PlainValidator(_rules, json_schema_input_type=dict[str, dict[str, Any] | None])
    ],
    FormatText: Annotated[Any, PlainValidator(_format, json_schema_input_type=StructuredOutputs)],
    TokenIds: Annotated[list[int], AfterValidator(tuple)],
    TokenIds | None: Annotated[list[int], AfterValidator(tuple)],
    TokenSequences: list[str],
    TokenBiases: Annotated[Any, PlainValidator(_token_biases, json_schema_input_type=dict[str, float])],
}
AnyBody = TypeVar("AnyBody", bound=Body)


def with_fields_of(table: type) -> Callable[[type[AnyBody]], type[AnyBody]]:
    """Gives a body the fields of a table too; each may be left out. See baton/core/fields.py."""
    fields: dict[str, Any] = {
        row.public_name: (_JSON_TYPES.get(row.type, row.type) | None, None) for row in rows(table)
    }

    def derive(body: type[AnyBody]) -> type[AnyBody]:
        name, module, doc = body.__name__, body.__module__, body.__doc__
        return create_model(name, __base__=body, __module__=module, __doc__=doc, **fields)

    return derive
