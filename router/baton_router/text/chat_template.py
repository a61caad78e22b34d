"""Renders a conversation into a prompt with the model's own Jinja template.

The environment follows Hugging Face's conventions (block trimming, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`, `break` and `continue`), because templates are written against them.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.core.errors import InvalidRequest, StartupError
from baton_router.text.content_format import content_format
from baton_router.text.final_message import mark_end, up_to_mark
from baton_router.text.messages import Message, message_for_template

MAX_MESSAGES = 4096  # each takes the event loop, which all requests share, some microseconds

# What a template may raise; the last three mean that it computes what is no prompt.
_REFUSALS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, MemoryError, RecursionError),
)


class ChatTemplate:
    """One compiled template and the special tokens that it may name (`bos_token` and so on)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, whose: str = "The model's") -> None:
        """`whose` template it is, errors say. Raises StartupError if it is not valid Jinja."""
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self._format = content_format(environment.parse(source))
        except TemplateSyntaxError as error:
            raise StartupError(f"{whose} chat template is broken in line {error.lineno}: {error}") from error
        except (
            SyntaxError,
            ValueError,
            RecursionError,
            MemoryError,
        ) as error:  # of the code that Jinja makes
            raise StartupError(f"{whose} chat template can't be compiled: {error}") from error
        self._whose = whose
        self._knows_developers = "developer" in source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt of a conversation; `variables` are the client's own additions to the template's.
        With `continue_final_message` it ends where the last message's content does.

        Raises InvalidRequest for what is no message (see messages.py), and where the template refuses the
        messages or trips over them.
        """
        converted = [self._message(index, message) for index, message in enumerate(messages)]
        if continue_final_message:
            mark_end(converted[-1])
        context = {
            # Defined and none, as in transformers: templates ask `tools is not none`, which undefined is not.
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **(variables or {}),
            "messages": converted,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            prompt = self._template.render(context)
        except _REFUSALS as error:
            raise InvalidRequest(
                f"{self._whose} chat template refused the messages: {error}",
                param="messages",
                code="chat_template_error",
            ) from error
        return up_to_mark(prompt) if continue_final_message else prompt

    def _message(self, index: int, message: Message) -> dict[str, Any]:
        return message_for_template(
            message, self._format, where=f"messages[{index}]", knows_developers=self._knows_developers
        )


def require_few_messages(num_messages: int) -> None:
    """Raises InvalidRequest for a conversation of too many messages."""
    if num_messages > MAX_MESSAGES:
        raise InvalidRequest(
            f"A conversation has at most {MAX_MESSAGES} messages, but this has {num_messages}.",
            param="messages",
            code="out_of_range",
        )


class _GenerationBlock(Extension):
    """`{% generation %}` marks what a model wrote, for training; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format_string: str) -> str:
    return datetime.now().strftime(format_string)
