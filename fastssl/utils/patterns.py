"""Names that stand for several files, also of servers: ``train-{000000..000146}.tar``, ``s3://bucket/train-*.beton``."""

from __future__ import annotations

import glob
import os
import re

from fastssl.errors import FastSSLError
from fastssl.utils.addresses import address, is_web, shown
from fastssl.utils.remote import file_system, fsspec_errors

#: The innermost braces of a pattern: a range, or a list.
_BRACES = re.compile(r"\{(?:([0-9]{1,18})\.\.([0-9]{1,18})|([^{}]*,[^{}]*))\}")
_MOST_NAMES = 1_000_000


def has_pattern(name: str | os.PathLike) -> bool:
    """Whether this is a pattern, and no file's own name, nor an address of a web server, which has no lists."""
    text = os.fspath(name)
    magic = glob.has_magic(text) and not is_web(address(text) or "")
    return (magic or _BRACES.search(text) is not None) and not os.path.lexists(text)


def expand(pattern: str | os.PathLike) -> list[str]:
    """The names that a pattern stands for, as a shell would find them, in natural order (2 before 10); the name itself
    where it is none. ``FastSSLError``: no file fits, or a million.
    """
    names, left = set[str](), [os.fspath(pattern)]
    while left:
        name = left.pop()
        if not has_pattern(name):
            names.add(name)
        elif braces := _BRACES.search(name):
            first, last, options = braces.groups()
            inside = options.split(",") if options is not None else _numbers(first, last)
            left += [name[: braces.start()] + one + name[braces.end() :] for one in inside]
        elif found := _found(name):
            names.update(found)
        else:
            raise FastSSLError(f"{shown(name)}: no file is named like this")
        if len(left) + len(names) > _MOST_NAMES:
            raise FastSSLError(f"{shown(pattern)}: stands for more than {_MOST_NAMES:,} files")
    return sorted(names, key=natural_key)


def natural_key(name: str | os.PathLike) -> list[tuple[int, str]]:
    """Sorts numbers inside names as numbers."""
    parts = re.split(r"([0-9]{1,18})", os.fspath(name))
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts]


def _found(pattern: str) -> list[str]:
    if (url := address(pattern)) is None:
        return glob.glob(pattern)
    system, path = file_system(url)
    with fsspec_errors(shown(url)):
        return [system.unstrip_protocol(one) for one in system.glob(path)]


def _numbers(first: str, last: str) -> list[str]:
    low, high = sorted((int(first), int(last)))
    padded = any(len(one) > 1 and one[0] == "0" for one in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}d}" for number in range(low, min(high, low + _MOST_NAMES) + 1)]
