"""Which formats a model has, by the source of its chat template.

The marks that it writes into a conversation are those that the model writes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from baton.core.errors import StartupError
from baton_router.chat_output.formats import REASONING_FORMATS, TOOL_FORMATS, ReasoningFormat, ToolFormat

AUTO, NONE = "auto", "none"

_DEEPSEEK = "tool▁call▁begin"
_ANY_LLAMA = ("<|start_header_id|>", "<|python_tag|>")


@dataclass(frozen=True, slots=True)
class _Signs:
    """A format, and what a template has to hold for it: all of some texts, and one of others."""

    name: str
    all_of: tuple[str, ...]
    one_of: tuple[str, ...] = ("",)

    def are_in(self, template: str) -> bool:
        return all(sign in template for sign in self.all_of) and any(sign in template for sign in self.one_of)


# The first that fits holds.
_TOOLS = (
    _Signs("harmony", ("<|channel|>", "<|message|>")),
    _Signs("deepseek_v3", (_DEEPSEEK, "```json")),
    _Signs("deepseek_v31", (_DEEPSEEK,)),
    _Signs("mistral", ("[TOOL_CALLS]", "[ARGS]")),
    _Signs("mistral_v3", ("[TOOL_CALLS]",)),
    _Signs("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    _Signs("glm4", ("<tool_call>", "<arg_key>")),
    _Signs("hermes", ("<tool_call>",)),
    _Signs("llama4_pythonic", ("[func_name1(", "<|header_start|>")),
    _Signs("pythonic", ("[func_name1(",)),
    _Signs("llama4_json", ('"parameters": ', "<|header_start|>")),
    _Signs("llama3_json", ('"parameters": ',), _ANY_LLAMA),
)
_REASONING = (
    _Signs("harmony", ("<|channel|>", "<|message|>")),
    _Signs("mistral", ("[THINK]",)),
    _Signs("seed_oss", ("<seed:think>",)),
    _Signs("granite", ("Here is my thought process:",)),
    _Signs("deepseek_r1", ("</think>",), (_DEEPSEEK, "\uff5cAssistant\uff5c")),
    _Signs("glm45", ("</think>", "<arg_key>")),
    _Signs("qwen3", (), ("<think>", "</think>")),
)
_HARMONY_MODEL_TYPES = ("gpt_oss",)


def tool_format(name: str, template: str | None, model_type: str = "") -> ToolFormat | None:
    """The format of a name, which may be `auto` or `none`. Raises StartupError for a name that is none."""
    if name == NONE:
        return None
    if name in (AUTO, "mistral"):  # vLLM has one name for both of Mistral's
        found = _found(_TOOLS, template or "", model_type)
        if name == AUTO:
            return None if found is None else TOOL_FORMATS[found]
        return TOOL_FORMATS["mistral_v3" if found == "mistral_v3" else "mistral"]
    if name not in TOOL_FORMATS:
        raise StartupError(f"There is no format '{name}' of tool calls; there are {_names(TOOL_FORMATS)}.")
    return TOOL_FORMATS[name]


def reasoning_format(name: str, template: str | None, model_type: str = "") -> ReasoningFormat | None:
    """The format of a name, which may be `auto` or `none`. Raises StartupError for a name that is none."""
    if name == NONE:
        return None
    if name == AUTO:
        found = _found(_REASONING, template or "", model_type)
        return None if found is None else REASONING_FORMATS[found]
    if name not in REASONING_FORMATS:
        raise StartupError(f"There is no format '{name}' of thinking; there are {_names(REASONING_FORMATS)}.")
    return REASONING_FORMATS[name]


def opens_reasoning(prompt: str, form: ReasoningFormat | None) -> bool:
    """Whether a prompt ends with the mark after which the model thinks."""
    return form is not None and bool(form.begins) and prompt.rstrip().endswith(form.begins)


def _found(signs: tuple[_Signs, ...], template: str, model_type: str) -> str | None:
    if model_type in _HARMONY_MODEL_TYPES:
        return "harmony"
    return next((entry.name for entry in signs if entry.are_in(template)), None)


def _names(formats: Iterable[str]) -> str:
    return ", ".join((AUTO, NONE, *sorted(formats)))
