"""The parts of a message, as they come."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from baton_router.chat_output.lexer import Lexer

_NAME = re.compile(r"[\w.:/\-]{1,256}")


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The next piece of one call; its id and name stand in its first piece alone."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """What one piece of text adds to a message; one delta for each call that goes on."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class _Text:
    """A text that comes in pieces, less the white space at marks of the format. Texts that a mark sets off
    from each other stand on lines of their own."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._space = ""  # at the end, until it is known what follows
        self._follows_mark = False
        self._is_new = False
        self._has_text = False

    def add(self, piece: str) -> None:
        if self._is_new:
            piece = piece.lstrip()
        text = piece.rstrip()
        if text:
            self._pieces.append("\n" if self._is_new and self._has_text else self._space)
            self._pieces.append(text)
            self._space = ""
            self._is_new = self._follows_mark = False
            self._has_text = True
        self._space += piece[len(text) :]

    def mark(self, *, is_new: bool = False) -> None:
        """A mark follows the text; it goes on behind it, or a new one begins there."""
        self._space = ""
        self._follows_mark = True
        self._is_new = self._is_new or is_new

    def end(self) -> None:
        if not self._follows_mark:
            self._pieces.append(self._space)
        self._space = ""

    def taken(self) -> str:
        text = "".join(self._pieces)
        self._pieces.clear()
        return text


@dataclass(slots=True)
class _Call:
    """What has come of a call since it was taken last."""

    index: int
    id: str | None = None
    name: str | None = None
    pieces: list[str] = field(default_factory=list)

    def delta(self) -> ToolCallDelta:
        return ToolCallDelta(self.index, self.id, self.name, "".join(self.pieces))


class Parts:
    """Collects what readers find until it is taken."""

    def __init__(
        self,
        lexer: Lexer,
        tools: Mapping[str, Mapping[str, Any]],
        new_id: Callable[[], str],
        *,
        only_known: bool,
    ) -> None:
        """`tools`: the schema of each tool's arguments. `only_known`: other names make no calls."""
        self._lexer = lexer
        self._tools = tools
        self._new_id = new_id
        self._name = ""
        self._only_known = only_known
        self._content = _Text()
        self._reasoning = _Text()
        self._calls: list[_Call] = []
        self.num_calls = 0

    def content(self, text: str) -> None:
        """More of the answer's text."""
        self._content.add(text)

    def reasoning(self, text: str) -> None:
        """More of the thinking."""
        self._reasoning.add(text)

    def mark(self) -> None:
        """A mark of the format; white space around it is the format's, unless text follows."""
        self._content.mark()

    def begin_text(self) -> None:
        """A mark, behind which another text begins: white space on both sides is the format's."""
        self._content.mark(is_new=True)
        self._reasoning.mark(is_new=True)

    def may_call(self, name: str) -> bool:
        """Whether a call of this name is one."""
        return name in self._tools or (not self._only_known and _NAME.fullmatch(name) is not None)

    def is_known(self, name: str) -> bool:
        """Whether the request has a tool of this name."""
        return name in self._tools

    def schema(self) -> Mapping[str, Any]:
        """Of the arguments of the call that began last; empty where there is no such tool."""
        return self._tools.get(self._name, {})

    def begin_call(self, name: str) -> None:
        """The next call. Its text is not given back any more."""
        self._lexer.release()
        self._content.mark()
        self._name = name
        self._calls.append(_Call(self.num_calls, self._new_id(), name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the arguments of the call that began last."""
        index = self.num_calls - 1
        if not self._calls or self._calls[-1].index != index:
            self._calls.append(_Call(index))
        self._calls[-1].pieces.append(text)

    def end(self) -> None:
        """No more comes."""
        self._content.end()
        self._reasoning.end()

    def taken(self) -> ChatDelta:
        """All that has come since the last time."""
        calls = tuple(call.delta() for call in self._calls)
        self._calls.clear()
        return ChatDelta(self._content.taken(), self._reasoning.taken(), calls)
