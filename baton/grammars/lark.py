"""From a format to a grammar of llguidance: Lark's notation with its extensions.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md. A special token of the model is a token
there and not a text, so that a text in a format is cut where it holds one.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llguidance.gbnf_to_lark import gbnf_to_lark

from baton.grammars.formats import Format
from baton.grammars.schemas import without_notes

# Between the tokens of JSON: a space, or a line break with as much indentation as JSON has that people read.
# Without a bound a model may write nothing but white space until its tokens are used up.
_WHITE_SPACE = r"( |\n {0,24}|\n\t{0,12})"
_ANY_TEXT = "(?s:.*)"


def to_lark(form: Format, special_tokens: Mapping[str, int]) -> str:
    """The grammar of a format that `formats` has checked. `special_tokens`: ids by text.

    Raises ValueError where a grammar in GBNF can't be read.
    """
    if form["type"] == "grammar":
        return _lark_of(form["grammar"])
    writer = _Writer(special_tokens)
    start = writer.expression(form)
    return "\n".join((f"start: {start}", *writer.rules))


def _lark_of(grammar: str) -> str:
    """A client's grammar is Lark, or GBNF, which writes `::=`."""
    return str(gbnf_to_lark(grammar)) if "::=" in grammar else grammar


class _Writer:
    """Writes the rules of one grammar."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self.rules: list[str] = []
        self._special_tokens = special_tokens
        names = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def expression(self, form: Format) -> str:
        """What matches the format, for the right side of a rule."""
        kind = form["type"]
        match kind:
            case "json_schema":
                return self._rule(f"%json {_json_schema(form['json_schema'], form.get('is_compact'))}")
            case "regex":
                return self._terminal(_regex(form["pattern"]))
            case "grammar":
                return self._rule(f"%lark {{\n{_lark_of(form['grammar'])}\n}}")
            case "const_string":
                return self._literal(form["value"])
            case "any_text":
                return self._terminal(_text_without(form.get("excludes") or ()))
            case "sequence":
                return " ".join(map(self.expression, form["elements"]))
            case "or":
                return _either(map(self.expression, form["elements"]))
            case "tag":
                return f"{self._literal(form['begin'])} {self._content_and_end(form)}"
            case "triggered_tags":
                return self._triggered_tags(form)
            case "tags_with_separator":
                return self._tags_with_separator(form)
        raise AssertionError(kind)

    def _content_and_end(self, tag: Format) -> str:
        content, ends = tag["content"], [tag["end"]] if isinstance(tag["end"], str) else tag["end"]
        if content["type"] != "any_text" or not all(ends):
            return f"{self.expression(content)} {_either(map(self._literal, ends))}"
        return _either(self._text_up_to(end, content.get("excludes") or ()) for end in ends)

    def _text_up_to(self, end: str, excludes: Sequence[str] = ()) -> str:
        """Any text and the first `end` after it, which a special token ends by itself."""
        text = _text_without(excludes)
        if (special := self._special.match(end)) is not None:
            return f"{self._terminal(text)} {self._literal(special[0])} {self._literal(end[special.end() :])}"
        first_special = self._special.search(end)
        plain = end if first_special is None else end[: first_special.start()]
        rest = "" if first_special is None else self._literal(end[first_special.start() :])
        terminal = self._terminal(f"{text} {_string(plain)}")
        return f"{self._rule(terminal, options='[lazy]')} {rest}".rstrip()

    def _triggered_tags(self, form: Format) -> str:
        """Any text, in which each trigger begins one of its tags; at least one: it begins with a tag."""
        tags = []
        for trigger in form["triggers"]:
            begun = [tag for tag in form["tags"] if _trigger_of(tag, form["triggers"]) == trigger]
            if begun:
                rests = (
                    f"{self._literal(tag['begin'][len(trigger) :])} {self._content_and_end(tag)}"
                    for tag in begun
                )
                tags.append(f"{self._text_up_to(trigger, form.get('excludes') or ())} {_either(rests)}")
        tag = self._rule(_either(tags))
        text = self.expression({"type": "any_text", "excludes": form.get("excludes")})
        if not form.get("at_least_one"):
            return f"({text} | {tag})" if form.get("stop_after_first") else f"{tag}* {text}"
        first = _either(map(self.expression, form["tags"]))
        return first if form.get("stop_after_first") else f"{first} {tag}* {text}"

    def _tags_with_separator(self, form: Format) -> str:
        tag = self._rule(_either(map(self.expression, form["tags"])))
        more = "" if form.get("stop_after_first") else f" ({self._literal(form['separator'])} {tag})*"
        several = tag + more
        return several if form.get("at_least_one") else f"({several})?"

    def _literal(self, text: str) -> str:
        """A text as it stands, special tokens as tokens."""
        parts, at = [], 0
        for special in self._special.finditer(text):
            parts += [_string(text[at : special.start()]), f"<[{self._special_tokens[special[0]]}]>"]
            at = special.end()
        parts.append(_string(text[at:]))
        return " ".join(part for part in parts if part != '""') or '""'

    def _rule(self, body: str, *, options: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name

    def _terminal(self, body: str) -> str:
        name = f"T{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name


def _json_schema(schema: Any, is_compact: bool | None) -> str:
    kept = without_notes(schema)
    if not isinstance(kept, dict):
        kept = {} if kept else {"not": {}}
    options = {"whitespace_flexible": False} if is_compact else {"whitespace_pattern": _WHITE_SPACE}
    return json.dumps({**kept, "x-guidance": options}, ensure_ascii=False)


def _trigger_of(tag: Format, triggers: Sequence[str]) -> str:
    """The longest trigger that the tag begins with."""
    return max((trigger for trigger in triggers if tag["begin"].startswith(trigger)), key=len)


def _text_without(excludes: Iterable[str]) -> str:
    excluded = [f"~/{_ANY_TEXT}{_escaped(text)}{_ANY_TEXT}/" for text in excludes]
    parts = " & ".join((f"/{_ANY_TEXT}/", *excluded))
    return f"({parts})" if excluded else parts


def _either(alternatives: Iterable[str]) -> str:
    found = list(alternatives)
    return found[0] if len(found) == 1 else f"({' | '.join(found)})"


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _regex(pattern: str) -> str:
    """A pattern as JSON Schema and people write it, between slashes."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(pattern, 'd')}/"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")
