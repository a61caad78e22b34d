"""Tables of how models write tool calls and thinking.

Sources: the models' chat templates and https://github.com/vllm-project/vllm, whose names the formats have.
Each class is a kind of notation with a reader of its own; its rows differ in their marks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Thinking that stands between marks, at the start of an answer."""

    name: str
    begins: tuple[str, ...]  # the first one is what is written
    ends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """How calls are written: a name stands between `before_name` and `after_name`, arguments between that and
    `end`."""

    before_name: str
    after_name: str
    end: str
    separator: str = ""
    section_begin: str = ""
    section_end: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """What all notations have."""

    name: str
    written: Written
    begins: tuple[str, ...]  # each may begin a call
    ends: tuple[str, ...] = ()  # each ends a call, or belongs to its end
    ignored: tuple[str, ...] = ()  # marks around calls
    is_marked: bool = (
        True  # false: what begins a call may be text too, so that only names of tools make calls
    )
    id_length: int | None = None  # of ids that are letters and digits alone


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonCalls(ToolFormat):
    """An object with name and arguments, or parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedCalls(ToolFormat):
    """A name, a mark and the arguments' object; or after the same mark a list of objects as in JsonCalls."""

    before_name: str = ""  # may stand there
    name_ends: tuple[str, ...] = ()
    before_arguments: tuple[str, ...] = ()  # may stand there, after white space
    after_arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedCalls(ToolFormat):
    """A name, and each argument between tags: text as it is, and other values in JSON."""

    before_name: str = ""  # stands there, if the call did not begin with it
    name_ends: tuple[str, ...] = ()
    key_begin: str
    key_end: str
    value_begin: str = ""
    line: str = ""  # a line break on each side of a value
    value_ends: tuple[str, ...]
    after_value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonicCalls(ToolFormat):
    """A list of Python's calls with named arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarmonyCalls(ToolFormat):
    """Messages with headers, which name a channel and, of calls, a recipient."""


def _deepseek(mark: str) -> str:
    return f"<\uff5c{mark}\uff5c>"


_CALL_BEGIN, _CALL_END = _deepseek("tool▁call▁begin"), _deepseek("tool▁call▁end")
_CALLS_BEGIN, _CALLS_END = _deepseek("tool▁calls▁begin"), _deepseek("tool▁calls▁end")
_SEPARATOR = _deepseek("tool▁sep")

_TOOL_ROWS: tuple[ToolFormat, ...] = (
    JsonCalls(
        name="hermes",
        begins=("<tool_call>",),
        ends=("</tool_call>",),
        written=Written('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n"),
    ),
    JsonCalls(
        name="llama3_json",
        begins=("<|python_tag|>", "{"),
        is_marked=False,
        written=Written('{"name": "', '", "parameters": ', "}", "; "),
    ),
    JsonCalls(
        name="llama4_json",
        begins=("<|python_start|>", "{"),
        ignored=("<|python_end|>",),
        is_marked=False,
        written=Written('{"name": "', '", "parameters": ', "}", "; "),
    ),
    PythonicCalls(
        name="pythonic", begins=("[",), is_marked=False, written=Written("", "(", ")", ", ", "[", "]")
    ),
    PythonicCalls(
        name="llama4_pythonic",
        begins=("<|python_start|>", "["),
        ignored=("<|python_end|>",),
        is_marked=False,
        written=Written("", "(", ")", ", ", "[", "]"),
    ),
    NamedCalls(
        name="mistral",  # from version 11 of Mistral's tokenizers on
        begins=("[TOOL_CALLS]",),
        name_ends=("[CALL_ID]", "[ARGS]", "{"),
        id_length=9,
        written=Written("[TOOL_CALLS]", "[ARGS]", ""),
    ),
    NamedCalls(
        name="mistral_v3",  # before that
        begins=("[TOOL_CALLS]",),
        name_ends=("[CALL_ID]", "[ARGS]", "{"),
        id_length=9,
        written=Written('{"name": "', '", "arguments": ', "}", ", ", "[TOOL_CALLS] [", "]"),
    ),
    NamedCalls(
        name="deepseek_v3",
        begins=(_CALL_BEGIN,),
        ends=(_CALL_END,),
        ignored=(_CALLS_BEGIN, _CALLS_END),
        before_name=f"function{_SEPARATOR}",
        name_ends=("\n",),
        before_arguments=("```json",),
        after_arguments=("```",),
        written=Written(
            f"{_CALL_BEGIN}function{_SEPARATOR}",
            "\n```json\n",
            f"\n```{_CALL_END}",
            "\n",
            _CALLS_BEGIN,
            _CALLS_END,
        ),
    ),
    NamedCalls(
        name="deepseek_v31",
        begins=(_CALL_BEGIN,),
        ends=(_CALL_END,),
        ignored=(_CALLS_BEGIN, _CALLS_END),
        name_ends=(_SEPARATOR,),
        written=Written(
            _CALL_BEGIN,
            _SEPARATOR,
            _CALL_END,
            "",
            _CALLS_BEGIN,
            _CALLS_END,
        ),
    ),
    TaggedCalls(
        name="qwen3_coder",
        begins=("<tool_call>", "<function="),  # the models leave the first one out at times
        ends=("</function>", "</tool_call>"),
        before_name="<function=",
        name_ends=(">",),
        key_begin="<parameter=",
        key_end=">",
        line="\n",
        value_ends=("\n</parameter>", "</parameter>", "\n<parameter=", "\n</function>"),
        after_value="\n",
        written=Written("<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", "\n"),
    ),
    TaggedCalls(
        name="glm4",
        begins=("<tool_call>",),
        ends=("</tool_call>",),
        name_ends=("\n", "<arg_key>", "</tool_call>"),
        key_begin="<arg_key>",
        key_end="</arg_key>",
        value_begin="<arg_value>",
        value_ends=("</arg_value>",),
        after_value="\n",
        written=Written("<tool_call>", "\n", "</tool_call>", "\n"),
    ),
    HarmonyCalls(
        name="harmony",
        begins=(),
        written=Written("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", ""),
    ),
)

_THINK = ("<think>",), ("</think>",)
_REASONING_ROWS = (
    ReasoningFormat("deepseek_r1", *_THINK),
    ReasoningFormat("qwen3", *_THINK),
    ReasoningFormat("glm45", *_THINK),
    ReasoningFormat("mistral", ("[THINK]",), ("[/THINK]",)),
    ReasoningFormat("seed_oss", ("<seed:think>",), ("</seed:think>",)),
    ReasoningFormat(
        "granite",
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
    ),
    ReasoningFormat("harmony", (), ()),
)

# Other names that people know them by.
_TOOL_NAMES = {"glm45": "glm4", "openai": "harmony", "gpt_oss": "harmony", "qwen3_xml": "qwen3_coder"}
_REASONING_NAMES = {"openai_gptoss": "harmony", "gpt_oss": "harmony", "deepseek_v3": "deepseek_r1"}

_TOOL_FORMATS = {row.name: row for row in _TOOL_ROWS}
_REASONING_FORMATS = {row.name: row for row in _REASONING_ROWS}

TOOL_FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    _TOOL_FORMATS | {other: _TOOL_FORMATS[name] for other, name in _TOOL_NAMES.items()}
)
REASONING_FORMATS: Mapping[str, ReasoningFormat] = MappingProxyType(
    _REASONING_FORMATS | {other: _REASONING_FORMATS[name] for other, name in _REASONING_NAMES.items()}
)
HARMONY = REASONING_FORMATS["harmony"]
