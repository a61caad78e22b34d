"""Runs the parser over pieces of a text and adds up what it says."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton_router.chat_output.formats import REASONING_FORMATS, TOOL_FORMATS
from baton_router.chat_output.parser import ChatOutputParser
from baton_router.chat_output.parts import ChatDelta
from baton_router.chat_output.tools import Tool

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": ["string", "null"]},
            "where": {"$ref": "#/$defs/place"},
            "exact": {"type": "boolean"},
        },
        "required": ["city"],
        "$defs": {"place": {"type": "object"}},
    },
)
NOW = Tool("now", {"type": "object", "properties": {}})
TOOLS = (WEATHER, NOW)


@dataclass
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass
class Sum:
    """All deltas of an answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, delta: ChatDelta) -> None:
        self.content += delta.content
        self.reasoning += delta.reasoning
        for call in delta.tool_calls:
            if call.index == len(self.calls):
                assert call.id is not None
                assert call.name is not None
                self.calls.append(Call(call.id, call.name))
            else:
                assert (call.index, call.id, call.name) == (len(self.calls) - 1, None, None)
            self.calls[-1].arguments += call.arguments

    @property
    def named(self) -> list[tuple[str, str]]:
        return [(call.name, call.arguments) for call in self.calls]


def new_parser(
    tool_format: str | None = None,
    reasoning_format: str | None = None,
    *,
    tools: Sequence[Tool] = TOOLS,
    special_tokens: Sequence[str] = (),
    is_reasoning_open: bool = False,
) -> ChatOutputParser:
    numbers = itertools.count()
    return ChatOutputParser(
        tool_format=None if tool_format is None else TOOL_FORMATS[tool_format],
        reasoning_format=None if reasoning_format is None else REASONING_FORMATS[reasoning_format],
        tools=tools,
        special_tokens=frozenset(special_tokens),
        is_reasoning_open=is_reasoning_open,
        random_text=lambda: f"{next(numbers)}".ljust(24, "x"),
    )


def parse(pieces: Sequence[str] | str, *formats: str | None, **options) -> Sum:
    """The sum over pieces, or over the characters of a text."""
    parser, total = new_parser(*formats, **options), Sum()
    for piece in pieces:
        total.add(parser.push(piece))
    total.add(parser.finish())
    assert parser.has_tool_calls == bool(total.calls)
    return total
