"""What a chat template takes as a message's content: a string, a list of parts, or either.

Read off the template's syntax tree. What the conversation flows into (loop variables, names and attributes
of namespaces that it is assigned to, parameters of macros) is followed until nothing new is found; a content
that is looped over, or whose items are asked for fields, is a list of parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from jinja2 import nodes

_SELECTING = frozenset(
    {"list", "select", "selectattr", "reject", "rejectattr", "sort", "reverse", "default", "d"}
)
_OF_FIELDS = frozenset({"selectattr", "rejectattr", "map", "groupby"})
_ONE_OF = frozenset({"first", "last", "random"})
_FIELDS_OF_PARTS = frozenset({"type", "text"})


@dataclass(frozen=True, slots=True)
class ContentFormat:
    """What a template makes something of."""

    takes_strings: bool
    takes_parts: bool
    takes_null: bool  # it asks whether a content is none


class _Kind(Enum):
    MESSAGES = auto()
    MESSAGE = auto()
    CONTENT = auto()
    PART = auto()


_ITEM = {_Kind.MESSAGES: _Kind.MESSAGE, _Kind.CONTENT: _Kind.PART}
_Name = tuple[str, str]  # the macro that it belongs to or nothing, and the name, or namespace.attribute


def content_format(template: nodes.Template) -> ContentFormat:
    """The format of the contents that a template takes."""
    flow = _Flow(template)
    takes_parts, tests = flow.has_parts(), flow.tests_of_content()
    return ContentFormat(
        takes_strings=not takes_parts or "string" in tests,
        takes_parts=takes_parts,
        takes_null="none" in tests,
    )


class _Flow:
    """Where messages, their contents and parts go in a template."""

    def __init__(self, template: nodes.Template) -> None:
        self._macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
        self._nodes = list(_with_macros(template, ""))
        self._own: dict[str, set[str]] = {  # names that a macro has to itself
            name: {param.name for param in macro.args}
            | {found.name for found in macro.find_all(nodes.Name) if found.ctx == "store"}
            for name, macro in self._macros.items()
        }
        self._kinds: dict[_Name, set[_Kind]] = {("", "messages"): {_Kind.MESSAGES}}
        while self._spread():
            pass

    def has_parts(self) -> bool:
        """Whether contents are looped over, or their items asked for fields."""
        return any(self._is_use_of_parts(node, macro) for node, macro in self._nodes)

    def tests_of_content(self) -> set[str]:
        """Names of the tests that contents are put to."""
        return {
            node.name
            for node, macro in self._nodes
            if isinstance(node, nodes.Test) and _Kind.CONTENT in self._of(node.node, macro)
        }

    def _is_use_of_parts(self, node: nodes.Node, macro: str) -> bool:
        match node:
            case nodes.For(iter=iterated):
                return _Kind.CONTENT in self._of(iterated, macro)
            case nodes.Filter(node=nodes.Expr() as filtered, name=name):
                return name in _OF_FIELDS and _Kind.CONTENT in self._of(filtered, macro)
            case (
                nodes.Getattr(node=owner, attr=str() as key)
                | nodes.Getitem(node=owner, arg=nodes.Const(value=str() as key))
            ):
                return key in _FIELDS_OF_PARTS and _Kind.PART in self._of(owner, macro)
        return False

    def _spread(self) -> bool:
        """Follow every assignment once; whether a name has got a new kind."""
        num_before = sum(map(len, self._kinds.values()))
        for node, macro in self._nodes:
            match node:
                case nodes.For(target=nodes.Name(name=name), iter=iterated):
                    self._add(
                        macro, name, {_ITEM[kind] for kind in self._of(iterated, macro) if kind in _ITEM}
                    )
                case nodes.Assign(target=target, node=value):
                    self._assign(macro, target, value)
                case nodes.With(targets=targets, values=values):
                    for target, value in zip(targets, values, strict=True):
                        self._assign(macro, target, value)
                case nodes.Call(node=nodes.Name(name=name)) if name in self._macros:
                    self._pass(node, name, macro)
        return sum(map(len, self._kinds.values())) > num_before

    def _assign(self, macro: str, target: nodes.Node, value: nodes.Node) -> None:
        match target:
            case nodes.Name(name=name):
                self._add(macro, name, self._of(value, macro))
                if isinstance(value, nodes.Call):  # namespace(name=...)
                    for keyword in value.kwargs:
                        self._add(macro, f"{name}.{keyword.key}", self._of(keyword.value, macro))
            case nodes.NSRef(name=name, attr=attribute):
                self._add(macro, f"{name}.{attribute}", self._of(value, macro))

    def _pass(self, call: nodes.Call, called: str, macro: str) -> None:
        """Give a macro's parameters what it is called with."""
        parameters = [parameter.name for parameter in self._macros[called].args]
        given = [*zip(parameters, call.args, strict=False), *((kw.key, kw.value) for kw in call.kwargs)]
        for name, value in given:
            self._add(called, name, self._of(value, macro))

    def _add(self, macro: str, name: str, kinds: set[_Kind]) -> None:
        if kinds:
            self._kinds.setdefault(self._place(macro, name), set()).update(kinds)

    def _place(self, macro: str, name: str) -> _Name:
        is_own = macro and name.partition(".")[0] in self._own[macro]
        return (macro if is_own else "", name)

    def _of(self, expression: nodes.Node | None, macro: str) -> set[_Kind]:
        """What an expression may be."""
        match expression:
            case nodes.Name(name=name):
                return self._kinds.get(self._place(macro, name), set())
            case (
                nodes.Getattr(node=owner, attr=str() as key)
                | nodes.Getitem(node=owner, arg=nodes.Const(value=str() as key))
            ):
                return self._of_field(owner, key, macro)
            case nodes.Call(
                node=nodes.Getattr(node=owner, attr="get"), args=[nodes.Const(value=str() as key), *_]
            ):
                return self._of_field(owner, key, macro)
            case nodes.Getitem(node=owner, arg=nodes.Slice()):
                return self._of(owner, macro)
            case nodes.Getitem(node=owner):
                return _items(self._of(owner, macro))
            case nodes.Filter(node=filtered, name=name) if name in _SELECTING:
                return self._of(filtered, macro)
            case nodes.Filter(node=filtered, name=name) if name in _ONE_OF:
                return _items(self._of(filtered, macro))
            case nodes.CondExpr(expr1=one, expr2=other) | nodes.BinExpr(left=one, right=other):
                if isinstance(expression, nodes.CondExpr | nodes.Or | nodes.And):
                    return self._of(one, macro) | self._of(other, macro)
                kinds = self._of(one, macro) | self._of(other, macro)
                return kinds & {_Kind.MESSAGES} if isinstance(expression, nodes.Add) else set()
        return set()

    def _of_field(self, owner: nodes.Node, key: str, macro: str) -> set[_Kind]:
        if key == "content" and _Kind.MESSAGE in self._of(owner, macro):
            return {_Kind.CONTENT}
        if isinstance(owner, nodes.Name):
            return self._kinds.get(self._place(macro, f"{owner.name}.{key}"), set())
        return set()


def _items(kinds: set[_Kind]) -> set[_Kind]:
    return {_ITEM[kind] for kind in kinds if kind in _ITEM}


def _with_macros(node: nodes.Node, macro: str) -> Iterator[tuple[nodes.Node, str]]:
    """Every node below, with the name of the macro that it is part of."""
    for child in node.iter_child_nodes():
        inner = child.name if isinstance(child, nodes.Macro) else macro
        yield child, inner
        yield from _with_macros(child, inner)
