"""What every source of photos offers: a list of its photos, made without reading any, and their bytes."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastssl.errors import FastSSLError, printable

#: No photo has this many bytes; a larger file is a mistake or an attack on our memory.
MAX_FILE_BYTES = 1 << 30
#: Folders that programs of cameras and network disks put beside photos: thumbnails, what was deleted.
_NOT_PHOTOS = ("@eaDir", "#recycle", "lost+found", "__MACOSX")
_HIDDEN = re.compile(rf"(?:^|/)(?:\.(?!\.(?:/|$))|(?:{'|'.join(map(re.escape, _NOT_PHOTOS))})(?:/|$))").search


class SourceError(FastSSLError):
    """A source of photos is missing, empty, or not of a kind that we read."""


class Found(NamedTuple):
    """A photo, before anybody has read it.

    Attributes:
        name: its path inside the source, parts separated by '/'. size: in bytes; -1: not known before it is read.
        stamp: changes when the photo does: a time of change, a checksum, an object's version.
        place: where it lies, for `Source.read`. label: its class, where the source itself says it; a number counts
            in the source's ``classes``.
    """

    name: str
    size: int
    stamp: int | str
    place: Any
    label: str | int | None = None


class Passed(NamedTuple):
    """What is no photo; or cannot be one, ``reason``, although it looks like one."""

    name: str
    reason: str = ""


class Source(ABC):
    """Photos in a folder, an archive, a table or a list.

    Attributes:
        name: as messages and the side file call it. classes: names of all classes in an order of their own, where the
            source has them; numbered labels count in it.
        sorts: photos come in no order of their own, and are sorted by the parts of their paths.
        strips: the folders that all photos share name no class. in_folders: the others may.
    """

    classes: list[str] | None = None
    sorts = False
    strips = True
    in_folders = True

    def __init__(self, name: str | os.PathLike):
        self.name = os.fspath(name)

    @abstractmethod
    def photos(self) -> Iterator[Found | Passed]:
        """All there is, in the order in which it is converted; asked for once, from a thread of its own.
        ``SourceError``: it is damaged or not of this kind.
        """

    @abstractmethod
    def read(self, place: Any, size: int) -> bytes:
        """The encoded bytes of the photo at ``place``; from any thread. ``SourceError`` when it changed since it was
        listed, ``OSError`` as usual.
        """

    def close(self) -> None:  # noqa: B027 - most have something to close, not all
        """Let go of open files."""


def is_hidden(name: str) -> bool:
    """Whether some part of a path is hidden, or a folder that programs keep beside photos."""
    return _HIDDEN(name) is not None


def listed_behind(found: Found | Passed | None) -> str:
    """What a message calls the place at which a list came to a halt."""
    return "while photos were listed, " + (f"behind {printable(found.name)}" if found else "at the first of them")
