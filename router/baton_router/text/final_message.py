"""Prompts that end with what the last message says, for a model to go on with it.

As transformers does, a mark is put where the message's content ends, and the prompt is cut at it: what the
template makes of the content stays, and whatever it writes after it goes.
"""

from typing import Any

from baton.core.errors import InvalidRequest

# Ends in a space, as templates that trim contents show by dropping it.
_MARK = "END_OF_THE_MESSAGE_TO_CONTINUE "


def mark_end(message: dict[str, Any]) -> None:
    """Mark the end of a converted message's content. Raises InvalidRequest where it has none."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _MARK
    elif content:
        *before, last = content
        message["content"] = [*before, {**last, "text": last["text"] + _MARK}]
    else:
        raise InvalidRequest(
            "continue_final_message is set, but the final message has no content to continue.",
            param="continue_final_message",
        )


def up_to_mark(prompt: str) -> str:
    """The prompt up to the mark. Raises InvalidRequest where the template has left it out."""
    end = prompt.rfind(_MARK.rstrip())
    if end < 0:
        raise InvalidRequest(
            "continue_final_message is set, but the chat template leaves the final message out.",
            param="continue_final_message",
        )
    is_kept_as_it_is = prompt.startswith(_MARK, end)
    return prompt[:end] if is_kept_as_it_is else prompt[:end].rstrip()
