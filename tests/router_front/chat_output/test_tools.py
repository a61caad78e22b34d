"""Tools of a request, right and wrong."""

import pytest

from baton.core.errors import InvalidRequest
from baton.grammars.formats import MAX_DEPTH
from baton_router.chat_output.tools import (
    MAX_TOOLS,
    Tool,
    ToolChoice,
    ToolMode,
    read_tool_choice,
    read_tools,
)


def function(**fields) -> dict:
    return {"type": "function", "function": {"name": "f", **fields}}


def deep(levels: int) -> dict:
    schema: dict = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def test_tools_as_openai_writes_them():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert read_tools([function(description="Does it.", parameters=schema, strict=True)]) == (
        Tool("f", schema, strict=True),
    )
    assert read_tools(None) == read_tools([]) == ()


def test_a_tool_without_parameters_takes_none():
    [tool] = read_tools([function(parameters=None, strict=None)])
    assert tool.parameters == {"type": "object", "properties": {}}


def test_parameters_are_an_object_even_where_they_do_not_say_so():
    [tool] = read_tools([function(parameters={"properties": {}})])
    assert tool.parameters["type"] == "object"


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("f", "tools"),
        ({"type": "function"}, "tools"),
        ([function()] * (MAX_TOOLS + 1), "tools"),
        ([function(), function()], "tools[1].function.name"),
        (["f"], "tools[0]"),
        ([{"type": "retrieval"}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        ([function(name="")], "tools[0].function.name"),
        ([function(name="a b")], "tools[0].function.name"),
        ([function(name="é")], "tools[0].function.name"),
        ([function(name="f\n")], "tools[0].function.name"),
        ([function(name="x" * 65)], "tools[0].function.name"),
        ([function(name=5)], "tools[0].function.name"),
        ([function(description=5)], "tools[0].function.description"),
        ([function(strict="yes")], "tools[0].function.strict"),
        ([function(parameters="{}")], "tools[0].function.parameters"),
        ([function(parameters=True)], "tools[0].function.parameters"),
        ([function(parameters={"type": "string"})], "tools[0].function.parameters.type"),
        ([function(parameters=deep(MAX_DEPTH + 1))], "tools[0].function.parameters"),
    ],
)
def test_wrong_tools_are_refused_by_name(value: object, param: str):
    with pytest.raises(InvalidRequest) as caught:
        read_tools(value)
    assert caught.value.param == param
    assert str(caught.value)


TOOLS = (Tool("f", {}), Tool("g", {}))


@pytest.mark.parametrize(
    ("value", "tools", "choice"),
    [
        (None, (), ToolChoice(ToolMode.NONE)),
        (None, TOOLS, ToolChoice(ToolMode.AUTO)),
        ("none", (), ToolChoice(ToolMode.NONE)),
        ("none", TOOLS, ToolChoice(ToolMode.NONE)),
        ("auto", TOOLS, ToolChoice(ToolMode.AUTO)),
        ("required", TOOLS, ToolChoice(ToolMode.REQUIRED)),
        ({"type": "function", "function": {"name": "g"}}, TOOLS, ToolChoice(ToolMode.REQUIRED, "g")),
    ],
)
def test_choices(value: object, tools: tuple[Tool, ...], choice: ToolChoice):
    assert read_tool_choice(value, tools) == choice


@pytest.mark.parametrize(
    ("value", "tools", "param"),
    [
        ("auto", (), "tool_choice"),
        ("required", (), "tool_choice"),
        ({"type": "function", "function": {"name": "f"}}, (), "tool_choice"),
        ("any", TOOLS, "tool_choice"),
        (["auto"], TOOLS, "tool_choice"),
        ({"type": "allowed_tools"}, TOOLS, "tool_choice"),
        ({"type": "function"}, TOOLS, "tool_choice.function.name"),
        ({"type": "function", "function": {"name": "h"}}, TOOLS, "tool_choice.function.name"),
        ({"type": "function", "function": {"name": ["f"]}}, TOOLS, "tool_choice.function.name"),
    ],
)
def test_wrong_choices_are_refused_by_name(value: object, tools: tuple[Tool, ...], param: str):
    with pytest.raises(InvalidRequest) as caught:
        read_tool_choice(value, tools)
    assert caught.value.param == param
