"""Yaml from anywhere, as plain values: nothing in it is run, and no text makes it take long or much memory.

PyYAML's safe loader builds no objects, but it lets an alias stand for an alias of aliases (a few lines are billions of
values to whoever walks over them), takes seconds for a megabyte, and has Python's own errors for odd scalars.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fastssl.errors import FastSSLError
from fastssl.utils.plain_file import read_plain

#: The longest recipe of ours has 2.2 KB, a resolved one 3 KB: a page or two of numbers.
MAX_BYTES = 64 << 10
#: Values and keys, each counted as often as aliases repeat it; levels of lists and mappings inside one another.
MAX_VALUES, MAX_DEPTH = 10_000, 20

#: what the constructors of scalars raise beside yaml's own: dates that do not exist, numbers of thousands of digits,
#: empty ones with a tag
_ODD_SCALARS = (ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError)


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, which would let the second of two equal keys win in silence, made to refuse it; and nesting
    without end.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _TooMuch(f"lists or mappings lie more than {MAX_DEPTH} deep in one another")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {shown(name)} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The content of a yaml file.

    Raises:
        FastSSLError: it cannot be read, is longer than ``MAX_BYTES``, or is not what ``parse_yaml`` takes; names the
            file.
    """
    try:
        text = read_plain(path, MAX_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        raise FastSSLError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FastSSLError(f"{path}: not a yaml file: not UTF-8 at byte {error.start}") from error
    return parse_yaml(text, f"{path}: not a yaml file")


def parse_yaml(text: str, complaint: str) -> Any:
    """``text`` as plain values; ``complaint`` opens the message of the ``FastSSLError`` where it is no yaml, or too
    large.
    """
    if len(text) > MAX_BYTES:
        raise FastSSLError(f"{complaint}: longer than {MAX_BYTES >> 10} KiB")
    try:
        loader = _UniqueKeyLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except _TooMuch as error:
        raise FastSSLError(f"{complaint}: {error}") from error
    except yaml.YAMLError as error:
        raise FastSSLError(f"{complaint}: {' '.join(str(error).split())[:500]}") from error
    except _ODD_SCALARS as error:
        raise FastSSLError(
            f"{complaint}: a value that cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error


class _TooMuch(Exception):
    """A document with more values or levels than anyone writes."""


def _count_values(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values ``node`` stands for and how many levels, aliases written out. ``known``: by node, (0, 0) for one
    that holds this one.
    """
    if id(node) in known:
        if known[id(node)] == (0, 0):
            raise _TooMuch("a value that holds itself (an alias inside its own anchor)")
        return known[id(node)]
    known[id(node)] = (0, 0)
    total, levels = 1, 1
    children = node.value if isinstance(node, yaml.CollectionNode) else ()
    for child in children:
        for one in child if isinstance(child, tuple) else (child,):
            values, below = _count_values(one, known)
            total, levels = total + values, max(levels, below + 1)
            if total > MAX_VALUES:
                raise _TooMuch(f"more than {MAX_VALUES:,} values, with aliases written out")
            if levels > MAX_DEPTH:
                raise _TooMuch(f"lists or mappings lie more than {MAX_DEPTH} deep in one another")
    known[id(node)] = (total, levels)
    return total, levels


def shown(value: object) -> str:
    """``repr(value)`` for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
