"""Parameters that would change the answer and that Baton does not have: refused by name, never ignored.

Each is listed with the values that ask for nothing. Every other unknown field is ignored, as servers of this
API do, and the response names it: request_note.py.
"""

from collections.abc import Mapping
from typing import Any

from baton.core.errors import InvalidRequest

_OFF: tuple[Any, ...] = (None, False)
_NONE_OR_EMPTY: tuple[Any, ...] = (None, [], {}, "")

_EVERYWHERE: Mapping[str, tuple[Any, ...]] = {
    "guided_choice": _NONE_OR_EMPTY,
    "guided_grammar": _NONE_OR_EMPTY,
    "guided_json": (None,),
    "guided_regex": _NONE_OR_EMPTY,
    "kv_transfer_params": (None, {}),
    "logits_processors": _NONE_OR_EMPTY,
    "ec_transfer_params": (None, {}),
    "guided_whitespace_pattern": (None,),
    "prompt_embeds": _NONE_OR_EMPTY,
    "vllm_xargs": (None, {}),
}

COMPLETIONS: Mapping[str, tuple[Any, ...]] = {**_EVERYWHERE, "suffix": (None, "")}

CHAT: Mapping[str, tuple[Any, ...]] = {
    **_EVERYWHERE,
    "audio": (None,),
    "echo": _OFF,
    "function_call": (None, "none"),
    "functions": _NONE_OR_EMPTY,
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}

MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "container": _NONE_OR_EMPTY,
    "context_management": (None, {}),
    "mcp_servers": _NONE_OR_EMPTY,
}

_REASONS: Mapping[str, str] = {
    "suffix": "models that fill in the middle are not served",
    "audio": "models that speak are not served",
    "modalities": "answers are text",
    **dict.fromkeys(
        ("guided_choice", "guided_grammar", "guided_json", "guided_regex", "guided_whitespace_pattern"),
        "structured_outputs has it",
    ),
}


def refuse_unsupported(fields: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """Raises InvalidRequest for the first of `fields` that asks for something that is not there.

    Returns the names of those that are ignored.
    """
    for name, neutral in refused.items():
        if name in fields and not any(_is_same(fields[name], value) for value in neutral):
            raise unsupported(name)
    return [name for name in fields if name not in refused]


def unsupported(name: str) -> InvalidRequest:
    """The error for one parameter."""
    reason = f": {_REASONS[name]}" if name in _REASONS else ""
    return InvalidRequest(
        f"This server does not support {name}{reason}.", param=name, code="unsupported_parameter"
    )


def _is_same(value: Any, neutral: Any) -> bool:
    """Equal, where 0 and False, which Python holds equal, are not."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
