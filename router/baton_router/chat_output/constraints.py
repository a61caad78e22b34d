"""One format for a whole answer: thinking, then tool calls as the model writes them, or what the client asked
for.

- `required`, or a named tool: the answer is calls and nothing else. Their arguments keep to the schemas.
- `auto` with a strict tool, or without parallel calls: any text, in which calls name tools. Arguments of
  strict tools keep to their schemas, those of others are any object.
- `auto` with a response format: either calls, as above, or what the client asked for.

argument_formats.py says how far arguments between tags keep to a schema.
"""

from collections.abc import Sequence

from baton.core.errors import InvalidRequest
from baton.core.fields import Between
from baton.grammars import formats
from baton.grammars.formats import Format
from baton_router.chat_output.argument_formats import keyword_arguments, tagged_arguments
from baton_router.chat_output.formats import (
    HARMONY,
    HarmonyCalls,
    PythonicCalls,
    ReasoningFormat,
    TaggedCalls,
    ToolFormat,
)
from baton_router.chat_output.harmony import CHANNEL, END, MESSAGE, START
from baton_router.chat_output.tools import Tool, ToolChoice, ToolMode

_ANY_TEXT: Format = {"type": "any_text"}
_NOTHING: Format = {"type": "const_string", "value": ""}
_LINE_BREAKS: Format = {"type": "regex", "pattern": r"\n{0,2}"}
_NO_SCHEMA = {"type": "object"}
_THINKING_TOKENS = Between(0, 2**31 - 1)


def answer_format(
    *,
    tool_format: ToolFormat | None,
    reasoning_format: ReasoningFormat | None,
    tools: Sequence[Tool] = (),
    choice: ToolChoice | None = None,
    parallel: bool = True,
    response: Format | None = None,
    is_reasoning_open: bool = False,
) -> Format | None:
    """The format of an answer; None where any text is one.

    `parallel`: several calls may stand in one answer. `response`: what the client asked for, which holds
    behind thinking. `is_reasoning_open`: the prompt ends within thinking. No `tool_format`: no calls.
    """
    chosen = _Tools(tool_format, tools, choice, parallel)
    if reasoning_format is HARMONY or isinstance(tool_format, HarmonyCalls):
        return _harmony_answer(chosen, response)
    body = _body(chosen, response)
    if body is None or reasoning_format is None:
        return body
    return _sequence(_thinking(reasoning_format, is_open=is_reasoning_open), _LINE_BREAKS, body)


def limited_thinking(
    form: ReasoningFormat | None, max_tokens: int, *, is_open: bool, content: Format | None
) -> Format:
    """The format of an answer, `content` or any text, with at most `max_tokens` of thinking.

    Raises InvalidRequest where the model's thinking can't be told from the rest.
    """
    name = "thinking_token_budget"
    if form is None or not form.ends:
        reason = (
            "this model is not known to think; the router's option --reasoning-parser says how it does"
            if form is None
            else f"models that write as {form.name} do have reasoning_effort instead"
        )
        raise InvalidRequest(f"{name} can't be kept: {reason}.", param=name, code="unsupported_parameter")
    _THINKING_TOKENS.check(name, max_tokens)
    return formats.thinking_budget(form.begins, form.ends, max_tokens, is_open=is_open, content=content)


class _Tools:
    """The tools of a request as the model may call them."""

    def __init__(
        self, form: ToolFormat | None, tools: Sequence[Tool], choice: ToolChoice | None, parallel: bool
    ) -> None:
        mode = ToolMode.NONE if choice is None or form is None or not tools else choice.mode
        name = None if choice is None else choice.name
        self.form = form if mode is not ToolMode.NONE else None
        self.is_required = mode is ToolMode.REQUIRED
        self.tools = [
            tool if self.is_required or tool.strict else Tool(tool.name, _NO_SCHEMA)
            for tool in tools
            if name is None or tool.name == name
        ]
        self.only_one = not parallel or name is not None
        self.is_free = not self.is_required and not self.only_one and not any(tool.strict for tool in tools)


def _body(chosen: _Tools, response: Format | None) -> Format | None:
    """What stands behind thinking."""
    form = chosen.form
    if form is None:
        return response
    if chosen.is_required:
        return _calls(form, chosen)
    if response is not None:
        return _either(response, _calls(form, chosen))
    return None if chosen.is_free else _text_with_calls(form, chosen)


def _calls(form: ToolFormat, chosen: _Tools) -> Format:
    """One call or several, and nothing else."""
    written = form.written
    calls: Format = {
        "type": "tags_with_separator",
        "tags": [_tag(form, tool) for tool in chosen.tools],
        "separator": written.separator,
        "at_least_one": True,
        "stop_after_first": chosen.only_one or isinstance(form, HarmonyCalls),
    }
    if not written.section_begin:
        return calls
    return {"type": "tag", "begin": written.section_begin, "content": calls, "end": written.section_end}


def _tag(form: ToolFormat, tool: Tool) -> Format:
    written = form.written
    return {
        "type": "tag",
        "begin": f"{written.before_name}{tool.name}{written.after_name}",
        "content": _arguments(form, tool),
        "end": written.end,
    }


def _arguments(form: ToolFormat, tool: Tool) -> Format:
    if isinstance(form, TaggedCalls):
        return tagged_arguments(form, tool.parameters)
    if isinstance(form, PythonicCalls):
        return keyword_arguments(tool.parameters)
    return formats.json_schema(tool.parameters)


def _text_with_calls(form: ToolFormat, chosen: _Tools) -> Format:
    """Any text with calls in it; in formats without marks, any text or calls."""
    if not form.is_marked:
        signs = sorted({_sign(form, tool) for tool in chosen.tools})
        return _either(_calls(form, chosen), {"type": "any_text", "excludes": signs})
    if form.written.section_begin:
        tags, trigger = [_calls(form, chosen)], form.written.section_begin
    else:
        tags, trigger = [_tag(form, tool) for tool in chosen.tools], form.begins[0]
    return {
        "type": "triggered_tags",
        "triggers": [trigger],
        "tags": tags,
        "stop_after_first": chosen.only_one,
        "excludes": [mark for mark in (*form.begins, *form.ignored) if mark != trigger],
    }


def _sign(form: ToolFormat, tool: Tool) -> str:
    """What free text does not hold, since it may begin a call."""
    return f"[{tool.name}(" if isinstance(form, PythonicCalls) else form.written.before_name.rstrip('": ')


def _thinking(form: ReasoningFormat, *, is_open: bool) -> Format:
    ends = list(form.ends)
    if is_open:
        return {"type": "tag", "begin": "", "content": _ANY_TEXT, "end": ends}
    return _either({"type": "tag", "begin": form.begins[0], "content": _ANY_TEXT, "end": ends}, _NOTHING)


def _harmony_answer(chosen: _Tools, response: Format | None) -> Format | None:
    """Messages of thinking, and of text that goes before a call where there may be text, and then one that
    ends the answer. An end token ends a call, so that an answer has one at most."""
    channels = ("analysis",) if chosen.is_required or response is not None else ("analysis", "commentary")
    if response is None and (chosen.form is None or chosen.is_free):
        return None
    lasts: list[Format] = []
    if not chosen.is_required:
        begin = f"{CHANNEL}final{MESSAGE}"
        lasts.append({"type": "tag", "begin": begin, "content": response or _ANY_TEXT, "end": ""})
    if chosen.form is not None:
        lasts.append(_calls(chosen.form, chosen))
    firsts: Format = {
        "type": "tags_with_separator",
        "tags": [
            {
                "type": "tag",
                "begin": f"{CHANNEL}{channel}{MESSAGE}",
                "content": _ANY_TEXT,
                "end": f"{END}{START}assistant",
            }
            for channel in channels
        ],
        "separator": "",
    }
    return _sequence(firsts, _either(*lasts))


def _sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}


def _either(*elements: Format) -> Format:
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": list(elements)}
