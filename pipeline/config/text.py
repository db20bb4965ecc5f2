"""YAML and JSON that somebody else may have written: bounded before anything is made of it, and nothing runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from artifacts.places import regular

MOST_NODES = 10_000
"""Values of a YAML text, those that aliases repeat counted each time, and a hundred letters as one more."""
DEEPEST = 50
LONGEST = 2**20
"""Letters of a YAML text."""
INTEGER, LONGEST_NUMBER = "tag:yaml.org,2002:int", 400


def text_of(path: Path) -> str:
    """A file's text, as far as `yaml_of` reads one. Raises OSError, also if it is none, and UnicodeDecodeError."""
    with open(regular(path), "rb") as file:
        return file.read(4 * LONGEST + 1).decode()


def yaml_of(text: str) -> Any:
    """What a YAML text says. Raises yaml.YAMLError for any other text, for a key that a section has twice, and for what
    is nested or repeated out of measure."""
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"it has {len(text):,} letters, {LONGEST:,} at most are read")
    return yaml.load(text, _Bounded)  # a SafeLoader


def json_of(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError for any other text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Bounded(yaml.SafeLoader):
    """A safe loader that counts while it composes: ten aliases of ten aliases of ... are never unfolded."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._composed = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self._depth += 1
        self._composed += 1
        if self._depth > DEEPEST:
            raise _wrong(f"more than {DEEPEST} levels deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._sizes[id(node)] = self._size(node)
        elif id(node) not in self._sizes:
            raise _wrong(f"*{event.anchor} is a part of itself", event)
        if self._sizes[id(node)] > MOST_NODES or self._composed > MOST_NODES:
            raise _wrong(f"more than {MOST_NODES:,} values, those of aliases counted", event)
        return node

    def _size(self, node: Any) -> int:
        """Of a node with all below, whose sizes are known, aliases unfolded."""
        if isinstance(node, yaml.ScalarNode):
            return 1 + len(node.value) // 100
        inner = (one for pair in node.value for one in (pair if isinstance(pair, tuple) else (pair,)))
        return 1 + sum(self._sizes[id(one)] for one in inner)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    raise _wrong(f"{key.value[:100]} is there twice; keep one", key)
                seen.add(key.value)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """A value that its type cannot hold (a number of 5,000 digits, the 45th of May) is wrong YAML."""
        if node.tag == INTEGER and len(node.value) > LONGEST_NUMBER:
            raise _wrong(f"a number of more than {LONGEST_NUMBER} digits", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, KeyError, AttributeError) as error:
            raise _wrong(f"no value: {str(error)[:100]}", node) from None


def _wrong(problem: str, at: Any) -> yaml.MarkedYAMLError:
    """The error at a node or an event."""
    return yaml.MarkedYAMLError(None, None, problem, at.start_mark)
