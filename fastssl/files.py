"""Files that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)``, flush it to disk and rename it to ``path``: a reader sees the old file or the new one.

    The file may be read by whom any other new file may: safetensors writes for its owner's eyes only.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        temporary.chmod(usual_mode())
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def usual_mode() -> int:
    """The permissions of a new file, as this process's umask has them."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
