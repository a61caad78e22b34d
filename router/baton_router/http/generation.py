"""What the bodies of completions and chat have in common."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainValidator

from baton.core.errors import InvalidRequest
from baton.core.fields import FormatText, rows
from baton.core.sampling import SamplingParams
from baton.grammars.formats import FIELD
from baton_router.backend import TextOptions
from baton_router.http.body import TruncatedBody, WholeNumber, with_fields_of
from baton_router.structured_outputs import from_response_format
from baton_router.text.repetition import Repetition
from baton_router.text.stop_strings import StopStrings

# What `build_request` and `build_chat_request` take beside the table's.
_OTHER_FIELDS = (
    *("ignore_eos", "response_format"),
    *("best_of", "use_beam_search", "length_penalty", "thinking_token_budget"),
)


def _stop(value: Any) -> tuple[str, ...]:
    """None, one string or a list of them."""
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise InvalidRequest("stop must be a string or a list of strings.", param="stop")
    return tuple(strings)


def _response_format(value: Any) -> FormatText | None:
    """None, or OpenAI's object."""
    if value is not None and not isinstance(value, dict):
        raise InvalidRequest("response_format must be an object.", param="response_format")
    return None if value is None else from_response_format(value)


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`, and vLLM's addition; as vLLM's, they ask for usage unless they say no."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = True
    continuous_usage_stats: bool | None = False


class RepetitionDetection(BaseModel):
    """vLLM's `repetition_detection`: what ends an answer that repeats itself."""

    model_config = ConfigDict(strict=True)

    max_pattern_size: WholeNumber = 0
    min_pattern_size: WholeNumber = 0
    min_count: WholeNumber = 0


@with_fields_of(SamplingParams)
class GenerationBody(TruncatedBody):
    """Fields that are not of sampling, and by the decorator those that are."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stop, json_schema_input_type=str | list[str])] = ()
    response_format: Annotated[
        FormatText | None, PlainValidator(_response_format, json_schema_input_type=dict[str, Any] | None)
    ] = None
    ignore_eos: bool | None = False
    best_of: WholeNumber | None = None
    use_beam_search: bool | None = False
    length_penalty: float | None = None
    thinking_token_budget: WholeNumber | None = None
    priority: WholeNumber | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False
    repetition_detection: RepetitionDetection | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False

    def check_stream_options(self) -> None:
        """Raises InvalidRequest where they are given without `stream`."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options need stream: true.", param="stream_options")

    def sampling_fields(self) -> dict[str, Any]:
        """As `build_request` takes them; None: left out."""
        fields = {row.public_name: getattr(self, row.public_name) for row in rows(SamplingParams)}
        if self.response_format is not None and fields[FIELD] is not None:
            raise InvalidRequest(f"A request has response_format or {FIELD}, not both.", param=FIELD)
        return fields | {name: getattr(self, name) for name in _OTHER_FIELDS}

    def text_options(self) -> TextOptions:
        """How tokens become text."""
        detection = self.repetition_detection
        return TextOptions(
            StopStrings(self.stop),
            skip_special_tokens=self.skip_special_tokens is not False,
            spaces_between_special_tokens=self.spaces_between_special_tokens is not False,
            includes_stop=bool(self.include_stop_str_in_output),
            repetition=Repetition() if detection is None else Repetition(**detection.model_dump()),
        )
