"""``FILE.beton.json``: class names, checksums, and what the file was made from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastssl.errors import BetonError, FastSSLError
from fastssl.utils.plain_file import read_plain

#: Bytes by which a side file may be longer than its file. It has 6 for a sample, which takes 60 and its photo there,
#: and the names of the classes.
_SIDE_ROOM = 16 << 20


def side_path(path: str | os.PathLike) -> Path:
    """Where the side file of ``path`` stands: ``photos.beton`` -> ``photos.beton.json``."""
    return Path(f"{os.fspath(path)}.json")


def read_side_file(path: str | os.PathLike) -> dict[str, Any] | None:
    """Load the side file of the ``.beton`` file ``path``; None when there is none. ``BetonError`` when it is not what
    we write.
    """
    side = side_path(path)
    try:
        content = json.loads(read_plain(side, os.stat(path).st_size + _SIDE_ROOM).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, FastSSLError) as error:
        why = str(error).removeprefix(f"{side}: ")
        raise BetonError(f"{side}: unreadable side file ({why}); delete it, or convert again") from None
    found: dict[str, Any] = content if isinstance(content, dict) else {}
    classes = found.get("classes")
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not (named or classes is None) or not isinstance(found.get("bytes"), int):
        raise BetonError(f"{side}: not a side file of ours (needs 'classes' and 'bytes'); delete it, or convert again")
    return found
