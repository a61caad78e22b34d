"""The answer of a chat as Anthropic's content blocks: events that make them, and a whole message of these.

The blocks of a message stand one after the other: each is started, grows and is stopped before the next.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from baton_router.chat import MessageDelta
from baton_router.chat_output.parts import ToolCallDelta

Event = dict[str, Any]

STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "repetition": "end_turn",
}


class BlockEvents:
    """Makes the events of one message's blocks."""

    def __init__(self, *, shows_thinking: bool) -> None:
        self._shows_thinking = shows_thinking
        self._index = -1
        self._kind = ""  # of the block that is open; empty: none
        self._call: int | None = None  # whose block is open
        self._space = ""  # that no block of text has been started for

    def push(self, delta: MessageDelta) -> Iterator[Event]:
        """What the next piece of the message adds."""
        if delta.reasoning and self._shows_thinking:
            yield from self._grow("thinking", {"thinking": "", "signature": ""}, "thinking", delta.reasoning)
        if delta.content:
            yield from self._text(delta.content)
        for call in delta.tool_calls:
            yield from self._tool_use(call)

    def end(self) -> Iterator[Event]:
        """The message is complete."""
        yield from self._stop()

    def _text(self, text: str) -> Iterator[Event]:
        if self._kind != "text":
            text, self._space = self._space + text, ""
            if not text.strip():  # between other blocks, say; clients can't send a block of white space back
                self._space = text
                return
        yield from self._grow("text", {"text": ""}, "text", text)

    def _tool_use(self, call: ToolCallDelta) -> Iterator[Event]:
        if self._kind != "tool_use" or self._call != call.index:
            self._call = call.index
            block: dict[str, Any] = {
                "type": "tool_use",
                "id": _call_id(call.id),
                "name": call.name,
                "input": {},
            }
            yield from self._start("tool_use", block)
        if call.arguments:
            yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def _grow(self, kind: str, empty: dict[str, Any], field: str, text: str) -> Iterator[Event]:
        if self._kind != kind:
            yield from self._start(kind, {"type": kind, **empty})
        yield self._delta({"type": f"{kind}_delta", field: text})

    def _start(self, kind: str, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._stop()
        self._kind, self._space = kind, ""
        self._index += 1
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _stop(self) -> Iterator[Event]:
        if self._kind:
            self._kind = ""
            yield {"type": "content_block_stop", "index": self._index}


def blocks_of(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The blocks that the events make."""
    blocks: list[dict[str, Any]] = []
    arguments = ""
    for event in events:
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
            arguments = ""
        elif event["type"] == "content_block_stop":
            if blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = _input(arguments)
        else:
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                arguments += delta["partial_json"]
            else:
                field = delta["type"].removesuffix("_delta")
                blocks[-1][field] += delta[field]
    return blocks


def _call_id(chat_id: str | None) -> str:
    return f"toolu_{(chat_id or '').removeprefix('call_')}"


def _input(arguments: str) -> dict[str, Any]:
    """The object that a model wrote; what is none, as Anthropic has it: under a name that says so."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": arguments}
