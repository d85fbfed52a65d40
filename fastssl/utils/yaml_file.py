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


class _PlainLoader(yaml.SafeLoader):
    """The safe loader, made to refuse more values and levels than anyone writes, and two equal keys, of which the
    second would win in silence.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}  # values and levels, aliases written out
        self._depth, self._values, self._levels = 0, 0, 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        beside, levels = self._values, self._levels
        self._depth, self._values, self._levels = self._depth + 1, 1, 1
        self._refuse_too_much()
        node = super().compose_node(parent, index)
        assert node is not None
        if alias:
            if node not in self._sizes:
                raise yaml.YAMLError("a value that holds itself (an alias inside its own anchor)")
            self._values, self._levels = self._sizes[node]
        self._refuse_too_much()
        self._sizes[node] = self._values, self._levels
        self._depth, self._values, self._levels = self._depth - 1, self._values + beside, max(self._levels + 1, levels)
        return node

    def _refuse_too_much(self) -> None:
        if self._values > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values, with aliases written out")
        if self._depth + self._levels - 1 > MAX_DEPTH:
            raise yaml.YAMLError(f"lists or mappings lie more than {MAX_DEPTH} deep in one another")

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
    """``text`` as plain values, or a ``FastSSLError`` whose message begins with ``complaint``."""
    if len(text) > MAX_BYTES:
        raise FastSSLError(f"{complaint}: longer than {MAX_BYTES >> 10} KiB")
    try:
        return _PlainLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise FastSSLError(f"{complaint}: {' '.join(str(error).split())[:500]}") from error
    except _ODD_SCALARS as error:
        why = " ".join(str(error).split())[:200]
        raise FastSSLError(f"{complaint}: a value that cannot be read ({why})") from error


def shown(value: object) -> str:
    """``repr(value)`` for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
