"""Small files that lie beside what a user named, or come with it from strangers: read whole, never for ever, and never
more than they can need.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fastssl.errors import FastSSLError


def read_plain(path: str | os.PathLike, at_most: int) -> bytes:
    """The content of a plain file.

    A pipe of that name would wait for its writer for ever; a device has no end.

    Raises:
        FileNotFoundError: there is none.
        FastSSLError: it is no plain file, has more than ``at_most`` bytes, or cannot be read.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            plain = stat.S_ISREG(os.fstat(descriptor).st_mode)
            content = _read(descriptor, at_most + 1) if plain else b""
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise FastSSLError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not plain:
        raise FastSSLError(f"{path}: is not a plain file")
    if len(content) > at_most:
        raise FastSSLError(f"{path}: is longer than {_size(at_most)}")
    return content


def _read(descriptor: int, count: int) -> bytes:
    """So many bytes, or all that there are."""
    with open(descriptor, "rb", closefd=False) as file:
        return file.read(count)


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"
