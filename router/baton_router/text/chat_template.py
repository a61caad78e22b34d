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
from baton_router.text.messages import Message, message_for_template

MAX_MESSAGES = 4096  # each takes the event loop, which all requests share, some microseconds


class ChatTemplate:
    """One compiled template and the special tokens that it may name (`bos_token` and so on)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises StartupError if the template is not valid Jinja."""
        environment = _environment()
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise StartupError(
                f"The model's chat template is broken in line {error.lineno}: {error}"
            ) from error
        self._format = content_format(environment.parse(source))
        self._knows_developers = "developer" in source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation; `variables` are the client's own additions to the template's.

        Raises InvalidRequest for what is no message (see messages.py), and where the template refuses the
        messages or trips over them.
        """
        context = {
            # Defined and none, as in transformers: templates ask `tools is not none`, which undefined is not.
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **(variables or {}),
            "messages": [self._message(index, message) for index, message in enumerate(messages)],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(context)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise InvalidRequest(
                f"The model's chat template refused the messages: {error}",
                param="messages",
                code="chat_template_error",
            ) from error

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
