"""The text of one choice becomes the parts of a message, while it comes.

What is a call and what is text:

- A call is announced as soon as its name is certain and, in formats without marks (`is_marked`), a tool of
  that name exists and arguments follow. Its arguments stream from there on.
- What was announced stays a call. Its arguments are what the model wrote, broken or cut off as they may be.
- What was not announced is content, its mark too, unless that is a special token. So is what stands behind a
  call. Formats with marks call tools of any name, since clients answer a model that calls what is not there.
- White space at marks is the format's, and so is what a call's object holds beside its name and arguments.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from baton_router.chat_output.formats import (
    HARMONY,
    HarmonyCalls,
    JsonCalls,
    NamedCalls,
    PythonicCalls,
    ReasoningFormat,
    TaggedCalls,
    ToolFormat,
)
from baton_router.chat_output.harmony import read_harmony
from baton_router.chat_output.json_calls import read_json_call
from baton_router.chat_output.lexer import Lexer, Steps, TooLong, stops
from baton_router.chat_output.named_calls import read_named_call
from baton_router.chat_output.parts import ChatDelta, Parts
from baton_router.chat_output.pythonic_calls import read_pythonic_calls
from baton_router.chat_output.tagged_calls import read_tagged_call
from baton_router.chat_output.tools import Tool


class ChatOutputParser:
    """Follows one choice. The deltas' sum does not depend on how its text was cut into pieces."""

    def __init__(
        self,
        *,
        tool_format: ToolFormat | None = None,
        reasoning_format: ReasoningFormat | None = None,
        tools: Sequence[Tool] = (),
        special_tokens: frozenset[str] = frozenset(),
        is_reasoning_open: bool = False,
        random_text: Callable[[], str],
    ) -> None:
        """No format: text stays as it is. `special_tokens`: texts that are dropped where they are no marks.
        `is_reasoning_open`: the prompt ends within thinking (detect.py). `random_text`: 24 letters and digits
        or more, for the id of a call.
        """
        self._tool_format = tool_format
        self._reasoning_format = reasoning_format
        self._special_tokens = special_tokens
        self._is_reasoning_open = is_reasoning_open
        self._random_text = random_text
        self._lexer = Lexer()
        self._parts = Parts(
            self._lexer,
            {tool.name: tool.parameters for tool in tools},
            self._new_id,
            only_known=tool_format is not None and not tool_format.is_marked,
        )
        self._steps = self._answer()

    @property
    def has_tool_calls(self) -> bool:
        """Whether a call has begun."""
        return self._parts.num_calls > 0

    def push(self, text: str) -> ChatDelta:
        """What is certain now that the text goes on."""
        self._lexer.push(text)
        next(self._steps, None)
        return self._parts.taken()

    def finish(self) -> ChatDelta:
        """The rest, when no more text comes."""
        self._lexer.end()
        next(self._steps, None)
        self._parts.end()
        return self._parts.taken()

    def _new_id(self) -> str:
        length = None if self._tool_format is None else self._tool_format.id_length
        return self._random_text()[:length] if length else f"call_{self._random_text()}"

    def _answer(self) -> Steps[None]:
        if self._reasoning_format is HARMONY or isinstance(self._tool_format, HarmonyCalls):
            has_tools = isinstance(self._tool_format, HarmonyCalls)
            yield from read_harmony(self._lexer, self._parts, self._special_tokens, has_tools=has_tools)
            return
        if self._reasoning_format is not None:
            yield from self._read_reasoning(self._reasoning_format)
        yield from self._read_content(self._tool_format)

    def _read_reasoning(self, form: ReasoningFormat) -> Steps[None]:
        """Thinking stands at the start, or there is none."""
        self._lexer.hold()
        yield from self._lexer.white_space()
        begin = yield from self._lexer.any_of(*form.begins)
        if not begin and not self._is_reasoning_open:
            self._lexer.rewind()
            return
        self._lexer.release()
        self._parts.begin_text()
        found, end = stops(*form.ends, of=self._special_tokens), None
        while end not in (*form.ends, ""):
            end = yield from self._lexer.text_until(found, self._parts.reasoning)
        if end:
            self._parts.begin_text()

    def _read_content(self, form: ToolFormat | None) -> Steps[None]:
        begins, ends, ignored = (form.begins, form.ends, form.ignored) if form is not None else ((), (), ())
        found = stops(*begins, *ends, *ignored, of=self._special_tokens)
        is_in_call = False
        while stop := (yield from self._lexer.text_until(found, self._parts.content)):
            if stop in begins and form is not None:
                if (yield from self._read_call(form, stop)):
                    is_in_call = True
                    continue
            elif (stop in ends and is_in_call) or stop in ignored:
                self._parts.mark()
                continue
            if stop not in self._special_tokens:
                self._parts.content(stop)

    def _read_call(self, form: ToolFormat, begin: str) -> Steps[bool]:
        """Reads what follows a mark; false, and all of it given back, if it is no call."""
        num_calls = self._parts.num_calls
        self._lexer.hold()
        with suppress(TooLong):
            yield from _READERS[type(form)](self._lexer, self._parts, form, begin)
        self._lexer.rewind()
        return self._parts.num_calls > num_calls


_READERS: Mapping[type[ToolFormat], Callable[..., Steps[None]]] = {
    JsonCalls: read_json_call,
    NamedCalls: read_named_call,
    PythonicCalls: read_pythonic_calls,
    TaggedCalls: read_tagged_call,
}
