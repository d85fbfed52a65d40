"""A folder of photos, with or without class folders."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastssl.errors import printable
from fastssl.pipelines.convert.formats import is_photo_name
from fastssl.pipelines.convert.sources.base import Found, Passed, Source, SourceError, is_hidden


class FolderSource(Source):
    """The files below ``root``. Links are followed, loops are not; folders of runs are left out."""

    sorts, strips = True, False

    def __init__(self, root: Path):
        super().__init__(root)
        self.root = root

    def photos(self) -> Iterator[Found | Passed]:
        for name, info in _walk(self.root):
            folder = name.endswith("/")
            if folder and isinstance(info, str) and info:
                warnings.warn(f"{self.root / printable(name)}: {info}: its photos are missing", stacklevel=2)
            if isinstance(info, str):
                yield Passed(name, info if folder or is_photo_name(name) else "")
            # A named pipe called x.jpg would block the reader forever.
            elif is_photo_name(name) and stat.S_ISREG(info.st_mode):
                yield Found(name, info.st_size, info.st_mtime_ns, name)
            else:
                yield Passed(name)

    def read(self, place: Any, size: int) -> bytes:
        return read_whole(f"{self.root}/{place}", size)


def read_whole(path: str | Path, size: int) -> bytes:
    """The bytes of a file that had ``size`` of them when it was listed; ``SourceError``: it has others now."""
    with open(path, "rb", buffering=0) as file:  # one read, of which nothing is copied
        # One byte more than expected shows a file that has grown.
        data = file.read(size + 1)
        while len(data) < size and (more := file.read(size + 1 - len(data))):
            data += more
    if len(data) != size:
        raise SourceError("changed while it was being converted")
    return data


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result | str]]:
    """Yield (path below root, stat or the reason why there is none) of every file, and (path with a slash at its end,
    reason) of a folder that cannot be read, or is passed over, without a reason.

    A folder that several links lead to is read once for each folder at the top: two classes may share one, and chains
    of links still end.
    """
    seen: set[tuple[str, int, int]] = set()
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while waiting:
        prefix, above = waiting.pop()
        here = os.stat(root / prefix)
        place, top = (here.st_dev, here.st_ino), prefix.split("/", 1)[0]
        if place in above or (top, *place) in seen:
            continue
        seen.add((top, *place))
        try:
            with os.scandir(root / prefix) as entries:
                # Sorted, so that of two links to one folder always the same one is taken.
                ordered = sorted(entries, key=lambda entry: entry.name)
        except PermissionError as error:  # any other error may pass, and would lose a whole class
            if not prefix:
                raise
            yield prefix, f"a folder that cannot be read: {error.strerror}"
            continue
        if prefix and {"config.yaml", "checkpoints"} <= {entry.name for entry in ordered}:
            continue  # of a pre-training, whose pictures are no photos
        for entry in ordered:
            name = f"{prefix}{entry.name}"
            try:
                info = entry.stat()
            except OSError as error:
                yield name, f"cannot be read: {error.strerror}"
                continue
            if not stat.S_ISDIR(info.st_mode):
                yield name, info
            elif is_hidden(entry.name):
                yield f"{name}/", ""
            else:
                waiting.append((f"{name}/", (*above, place)))
