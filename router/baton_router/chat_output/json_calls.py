"""Reads calls whose name and arguments stand in a JSON object."""

from baton_router.chat_output.formats import JsonCalls, ToolFormat
from baton_router.chat_output.json_text import json_value, string_value, text_of
from baton_router.chat_output.lexer import Lexer, Steps, stops
from baton_router.chat_output.parts import Parts

_ARGUMENTS = ("arguments", "parameters")


def read_json_call(lexer: Lexer, parts: Parts, form: JsonCalls, begin: str) -> Steps[None]:
    """Reads what follows the mark `begin`."""
    if begin != "{":
        yield from lexer.white_space()
        if not (yield from lexer.any_of("{")):
            return
    if (yield from read_object(lexer, parts, form)) and not form.is_marked:
        lexer.hold()
        yield from lexer.white_space()
        if (yield from lexer.any_of(form.written.separator.strip())):
            lexer.release()


def read_list(lexer: Lexer, parts: Parts, form: ToolFormat) -> Steps[None]:
    """Reads objects after their list's opening bracket."""
    while True:
        yield from lexer.white_space()
        if not (yield from lexer.any_of("{")) or not (yield from read_object(lexer, parts, form)):
            return
        yield from lexer.white_space()
        lexer.hold()
        if (yield from lexer.any_of(",", "]")) != ",":
            lexer.release()
            return


def read_object(lexer: Lexer, parts: Parts, form: ToolFormat) -> Steps[bool]:
    """Reads one object after its opening brace; false if it is no call."""
    call = _Object(lexer, parts, form)
    while True:
        yield from lexer.white_space()
        key = yield from string_value(lexer)
        yield from lexer.white_space()
        if key is None or not (yield from lexer.any_of(":")) or not (yield from call.read_value(key)):
            return call.is_begun
        yield from lexer.white_space()
        separator = yield from lexer.any_of(",", "}")
        if separator == "}":
            return call.end()
        if not separator:
            return call.is_begun


class _Object:
    """What is known of one object."""

    def __init__(self, lexer: Lexer, parts: Parts, form: ToolFormat) -> None:
        self._lexer = lexer
        self._parts = parts
        self._form = form
        # Only an object between marks may have much in front of its name: of any other JSON all would be
        # held, and again for each object within.
        self._may_wait = form.is_marked and isinstance(form, JsonCalls)
        self._name: str | None = None
        self._early: str | None = None  # arguments that could not be passed on as they came
        self._has_arguments = False
        self.is_begun = False

    def read_value(self, key: str) -> Steps[bool]:
        """False if the object goes wrong here, or is none of a call."""
        if key == "name" and self._name is None:
            self._name = yield from string_value(self._lexer)
            if self._name is None or not self._parts.may_call(self._name):
                return False
            if self._form.is_marked:
                self._begin()
            return True
        is_nested = (yield from self._lexer.white_space()) in ("{", "[")
        is_streamed = self.is_begun or (self._name is not None and key in _ARGUMENTS)
        if is_nested and not is_streamed and not self._may_wait:
            return False
        if key in _ARGUMENTS and not self._has_arguments and self._early is None:
            return (yield from self._read_arguments())
        return (yield from json_value(self._lexer, _nothing))

    def end(self) -> bool:
        """The object is complete; false if it is no call."""
        if self._name is None or not (self._form.is_marked or self._has_arguments or self._early is not None):
            return False
        self._begin()
        if not self._has_arguments:
            self._parts.arguments("{}")
        return True

    def _begin(self) -> None:
        if not self.is_begun and self._name is not None:
            self.is_begun = True
            self._parts.begin_call(self._name)
        if self._early is not None and not self._has_arguments:
            self._has_arguments = True
            self._parts.arguments(self._early)

    def _read_arguments(self) -> Steps[bool]:
        first = yield from self._lexer.white_space()
        if self._name is None or first != "{":
            return (yield from self._read_whole_arguments())
        self._begin()
        self._has_arguments = True
        if (yield from json_value(self._lexer, self._parts.arguments)):
            return True
        yield from read_rest(self._lexer, self._parts, self._form)
        return False

    def _read_whole_arguments(self) -> Steps[bool]:
        """Those that can't be passed on yet, or are written as text within JSON."""
        pieces: list[str] = []
        is_whole = yield from json_value(self._lexer, pieces.append)
        source = "".join(pieces)
        text = text_of(source) if source.startswith('"') else None
        self._early = "{}" if source == "null" else source if text is None else text
        if self.is_begun:
            self._begin()
            if not is_whole:
                yield from read_rest(self._lexer, self._parts, self._form)
        return is_whole


def read_rest(lexer: Lexer, parts: Parts, form: ToolFormat) -> Steps[None]:
    """Passes arguments that are no JSON on as they are, up to what ends the call."""
    begins = form.begins if form.is_marked else ()
    stop = yield from lexer.text_until(stops(*form.ends, *begins), parts.arguments)
    lexer.back(stop)


def _nothing(_: str) -> None:
    pass
