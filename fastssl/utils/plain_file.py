"""Small files that come from strangers: read whole, never forever, and never more than they can need."""

from __future__ import annotations

import os
from pathlib import Path

from fastssl.errors import FastSSLError


def read_plain(path: str | os.PathLike, at_most: int, *, begin: bool = False) -> bytes:
    """The content of a plain file; a pipe of that name would wait for its writer forever, and a device has no end.
    Raises FileNotFoundError, or FastSSLError where it is no plain file, longer than ``at_most`` bytes (``begin``: of
    which no more are wanted), or unreadable.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise FastSSLError(f"{path}: is not a plain file")
        with path.open("rb") as file:
            content = file.read(at_most + (not begin))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise FastSSLError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > at_most:
        size = f"{at_most >> 20} MiB" if at_most >= 1 << 20 else f"{at_most >> 10} KiB"
        raise FastSSLError(f"{path}: is longer than {size}")
    return content
