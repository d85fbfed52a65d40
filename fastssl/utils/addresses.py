"""Addresses of files on servers, ``s3://bucket/name``, in the place of paths."""

from __future__ import annotations

import os
import re

from fastssl.errors import printable

#: Any protocol with two slashes; and with one, which is what pathlib leaves of them, those that no folder is called.
_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+]*)://+(?=[^/])|(s3a?|gs|gcs|https?|hf|abfss?|az|memory):/(?=[^/])")


def address(path: str | os.PathLike) -> str | None:
    """The address that ``path`` is, with two slashes also where it was a Path; None: it is a path of this machine."""
    text = os.fspath(path)
    match = _ADDRESS.match(text) if isinstance(text, str) else None
    protocol = (match[1] or match[2]).lower() if match else "file"
    return f"{protocol}://{text[match.end() :]}" if match and protocol != "file" else None


def is_remote(path: str | os.PathLike) -> bool:
    """Whether this is an address of a server."""
    return address(path) is not None


def is_web(url: str) -> bool:
    """Whether it is one of a web server, which has no list of its files."""
    return url.startswith(("http://", "https://"))


def shown(text: str | os.PathLike) -> str:
    """``text`` for messages and records: without the passwords and the query strings, in which signatures stand, of the
    addresses in it.
    """
    whole = address(text)
    blank = "" if whole else r"\s"  # between an address and what else a message says
    # Up to the last @ in front of a slash; and behind a slash in a password, unless a port stands there.
    login = rf"(?:[^/{blank}]+@|[^/:\s]+:(?!\d+(?:/|$))[^@\s]+@)"
    text = re.sub(rf"(\w:/{{1,2}}){login}", r"\1", printable(whole or os.fspath(text)))
    return re.sub(r"(\w:/{1,2}[^\s?'\"]+)\?[^\s'\")\]]*", r"\1", text)
