"""Yaml from anywhere, as plain values. PyYAML's safe loader builds no objects, but it lets an alias stand for an alias
of aliases (a few lines are billions of values to whoever walks over them), takes seconds for a megabyte, and has
Python's own errors for odd scalars.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fastssl.errors import FastSSLError
from fastssl.utils.plain_file import read_plain

#: The longest recipe of ours has 2.2 KB, a resolved one 3 KB.
MAX_BYTES = 64 << 10
#: Values and keys, each counted as often as aliases repeat it; levels of lists and mappings inside one another.
MAX_VALUES, MAX_DEPTH = 10_000, 20
_TOO_DEEP = f"lists or mappings lie more than {MAX_DEPTH} deep in one another"

#: what the constructors of scalars raise beside yaml's own: dates that do not exist, numbers of thousands of digits,
#: empty ones with a tag
_ODD_SCALARS = (ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError)


class _PlainLoader(yaml.SafeLoader):
    """The safe loader, made to refuse what `_measured` does before it builds anything."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _measured(node, {})
        return node


def _measured(node: yaml.Node, known: dict[yaml.Node, tuple[int, int] | None]) -> tuple[int, int]:
    """Values and levels in ``node``, aliases written out. Raises YAMLError for more than anyone writes, and for two
    equal keys, of which the second would win in silence.
    """
    if node not in known:
        known[node] = None
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, _ in node.value:
                if (name := str(key.value)) in names:
                    why = f"key {shown(name)} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, why, key.start_mark)
                names.add(name)
            inside = [one for pair in node.value for one in pair]
        sizes = [_measured(one, known) for one in inside]
        values, levels = 1 + sum(size[0] for size in sizes), 1 + max((size[1] for size in sizes), default=0)
        if values > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values, with aliases written out")
        if levels > MAX_DEPTH:
            raise yaml.YAMLError(_TOO_DEEP)
        known[node] = values, levels
    found = known[node]
    if found is None:
        raise yaml.YAMLError("a value that holds itself (an alias inside its own anchor)")
    return found


def read_yaml(path: Path) -> Any:
    """The content of a yaml file. Raises FastSSLError, with the file's name, where it cannot be read, is longer than
    ``MAX_BYTES``, or is not what ``parse_yaml`` takes.
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
    except RecursionError:
        raise FastSSLError(f"{complaint}: {_TOO_DEEP}") from None
    except _ODD_SCALARS as error:
        why = " ".join(str(error).split())[:200]
        raise FastSSLError(f"{complaint}: a value that cannot be read ({why})") from error


def shown(value: object) -> str:
    """``repr(value)`` for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
