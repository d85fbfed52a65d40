"""``FILE.beton.json``: class names, checksums, and what the file was made from."""

from __future__ import annotations

import codecs
import json
import os
import re
from pathlib import Path
from typing import Any

from fastssl.errors import BetonError, FastSSLError
from fastssl.utils.plain_file import read_plain

#: Bytes by which a side file may be longer than its file. It has 6 for a sample, which takes 60 and its photo there,
#: and the names of the classes.
_SIDE_ROOM = 16 << 20
#: Bytes in which everything before the checksums, which come last, should stand.
_NOTE_SIZES = 1 << 16, 1 << 20
_KEY, _DECODER = re.compile(r'\s*[{,]\s*"(\w+)"\s*:\s*'), json.JSONDecoder()


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
    return _checked(side, content)


def read_side_note(path: str | os.PathLike) -> dict[str, Any] | None:
    """As `read_side_file`, without the checksums: of the side file of a million samples they are 5 MB, the rest often a
    kB, and no more is read than is needed.
    """
    side = side_path(path)
    for size in _NOTE_SIZES:
        try:
            begin = codecs.getincrementaldecoder("utf-8")().decode(read_plain(side, size, begin=True))
            if (found := _before_checksums(begin)) is not None:
                return _checked(side, found)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError, FastSSLError):
            continue  # cut off too early, or broken: who reads it whole says that
    if (whole := read_side_file(path)) is not None:
        whole.pop("crc32", None)
    return whole


def _before_checksums(text: str) -> dict[str, Any] | None:
    """What stands before the checksums in the beginning of a side file; None: they do not begin there."""
    found, at = {}, 0
    while (key := _KEY.match(text, at)) and key[1] != "crc32":
        found[key[1]], at = _DECODER.raw_decode(text, key.end())
    return found if key else None


def _checked(side: Path, content: object) -> dict[str, Any]:
    found: dict[str, Any] = content if isinstance(content, dict) else {}
    classes = found.get("classes")
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not (named or classes is None) or not isinstance(found.get("bytes"), int):
        raise BetonError(f"{side}: not a side file of ours (needs 'classes' and 'bytes'); delete it, or convert again")
    return found
