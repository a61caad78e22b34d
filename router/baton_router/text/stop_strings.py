"""Finds stop strings in a text that comes in pieces.

An Aho-Corasick automaton (Aho and Corasick, 1975) reads every character once, whatever the number and the
length of the stop strings, and its depth is exactly how much must be held back: the longest end of the text
that could be the start of a stop string.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.core.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 4096


@dataclass(slots=True)
class _Node:
    depth: int
    children: dict[str, "_Node"] = field(default_factory=dict)
    match: str = ""  # the longest stop string that ends here
    fallback: "_Node | None" = None  # the longest proper suffix that is also a prefix of a stop string


class StopStrings:
    """The stop strings of a request, built once and shared by its choices."""

    def __init__(self, strings: Sequence[str] = ()) -> None:
        """Raises InvalidRequest for more than 16 strings, an empty one or one above 4096 characters."""
        if len(strings) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"stop holds {len(strings)} strings, but at most {MAX_STOP_STRINGS} are allowed.",
                param="stop",
            )
        if not all(strings):
            raise InvalidRequest("stop must not hold an empty string.", param="stop")
        if any(len(string) > MAX_STOP_LENGTH for string in strings):
            raise InvalidRequest(f"A stop string has at most {MAX_STOP_LENGTH} characters.", param="stop")
        self._strings = tuple(strings)
        self._named: dict[str, bool] = {}
        self.root = _Node(0)
        for string in strings:
            self._add(string)
        self._link()

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._strings)

    def names(self, text: str) -> bool:
        """Whether a stop string holds the text of this special token."""
        known = self._named.get(text)
        if known is None:
            known = self._named[text] = any(text in string for string in self._strings)
        return known

    def _add(self, string: str) -> None:
        node = self.root
        for character in string:
            node = node.children.setdefault(character, _Node(node.depth + 1))
        node.match = string

    def _link(self) -> None:
        """Set the fallbacks breadth first: a node's is found from its parent's."""
        queue = deque([self.root])
        while queue:
            node = queue.popleft()
            for character, child in node.children.items():
                child.fallback = step(node.fallback, character, self.root)
                child.match = child.match or child.fallback.match
                queue.append(child)


def step(node: _Node | None, character: str, root: _Node) -> _Node:
    """The state after one more character."""
    while node is not None:
        child = node.children.get(character)
        if child is not None:
            return child
        node = node.fallback
    return root


class StopMatcher:
    """Follows the text of one choice."""

    def __init__(self, stop_strings: StopStrings) -> None:
        self._root = stop_strings.root
        self._node = self._root
        self._held: list[str] = []  # what each character is in the text that is emitted
        self.matched: str | None = None  # the stop string that ended the text

    @property
    def is_matched(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.matched is not None

    def push(self, text: str, *, may_match: bool = True, is_hidden: bool = False) -> str:
        """The text that is certain not to be part of a stop string.

        Ends before the stop string that is complete first (of several that end together, the longest) and
        sets `matched`. What is emitted does not depend on how the text was cut into pieces. Without
        `may_match` no stop string ends in this piece, though one may begin; a hidden piece is read, and
        never emitted.
        """
        if self.is_matched or not self._root.children:
            return "" if self.is_matched or is_hidden else text
        num_held = len(self._held)
        emitted = [*self._held, *([""] * len(text) if is_hidden else text)]
        root, node = self._root, self._node
        for index, character in enumerate(text, num_held):
            node = step(node, character, root)
            if node.match and may_match:
                self.matched, self._held = node.match, []
                return "".join(emitted[: index + 1 - len(node.match)])
        self._node = node
        num_certain = len(emitted) - node.depth
        self._held = emitted[num_certain:]
        return "".join(emitted[:num_certain])

    def flush(self) -> str:
        """What is held back, when no text follows."""
        held, self._held, self._node = "".join(self._held), [], self._root
        return held
