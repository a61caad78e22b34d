"""Reads the messages of gpt-oss: each with a header, which says whom it is for.

https://cookbook.openai.com/articles/openai-harmony. The prompt ends within a header, so that an answer begins
there.
"""

import re

from baton_router.chat_output.lexer import Lexer, Steps, Take, stops
from baton_router.chat_output.parts import Parts

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
_HEADER_BEGINS = (START, CHANNEL, CONSTRAIN, MESSAGE, " to=")
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL = re.compile(rf"{re.escape(CHANNEL)}\s*(\w+)")
_FUNCTIONS = "functions."


def read_harmony(
    lexer: Lexer, parts: Parts, special_tokens: frozenset[str], *, has_tools: bool
) -> Steps[None]:
    """Reads a whole answer. Without tools, what is meant for one is content."""
    ends = stops(START, CHANNEL, END, CALL, RETURN, of=special_tokens)
    while True:
        take: Take | None = parts.content
        if begin := (yield from lexer.any_of(*_HEADER_BEGINS)):
            lexer.back(begin)
            take = yield from _read_header(lexer, parts, has_tools=has_tools)
        end = "?"
        while take is not None and end not in (START, CHANNEL, END, CALL, RETURN, ""):
            end = yield from lexer.text_until(ends, take)
        if not end:
            return
        if end in (START, CHANNEL):
            lexer.back(end)


def _read_header(lexer: Lexer, parts: Parts, *, has_tools: bool) -> Steps[Take | None]:
    """What takes the text of a message; None if it has none."""
    header: list[str] = []
    end = yield from lexer.text_until(stops(MESSAGE, END, CALL, RETURN), header.append)
    if end != MESSAGE:
        return None
    parts.begin_text()
    text = "".join(header)
    if has_tools and (recipient := _RECIPIENT.search(text)) is not None:
        name = recipient[1].removeprefix(_FUNCTIONS)
        if parts.may_call(name) and (name != recipient[1] or parts.is_known(name)):
            parts.begin_call(name)
            return parts.arguments
    channel = _CHANNEL.search(text)
    return parts.reasoning if channel is not None and channel[1] == "analysis" else parts.content
