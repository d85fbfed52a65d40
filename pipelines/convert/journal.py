"""What a conversion that may be stopped has safely written: one line for every photo.

The first line is the key: what has to be equal for a stopped conversion to be continued with the very same bytes. Every
line has a checksum of its own: a wrong digit would become a wrong label in the result, and nobody would know.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


class Journal:
    """The journal file at ``path``.

    Args:
        key: of the conversion.
    """

    def __init__(self, path: Path, key: dict[str, Any]):
        self.path, self.key = path, key
        self._file: BinaryIO | None = None
        self._unsaved: list[str] = []

    @property
    def has_unsaved(self) -> bool:
        """Whether lines were added since the last ``sync``."""
        return bool(self._unsaved)

    def replay(self) -> Iterator[tuple[list, int]] | None:
        """(row, bytes of the file up to the row's end) of each whole line; None: there is no journal.

        Raises:
            ValueError: it is of another conversion.
        """
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        lines.pop()  # what follows the last newline was being written when the run was stopped
        if not lines:
            return None
        if _read(lines[0]) != self.key:
            raise ValueError("the journal of another conversion")
        return self._rows(lines)

    @staticmethod
    def _rows(lines: list[bytes]) -> Iterator[tuple[list, int]]:
        end = len(lines[0]) + 1
        for line in lines[1:]:
            end += len(line) + 1
            try:
                position, *rest = _read(line)
                yield [position, *rest], end
            except ValueError:  # what it and those behind it vouched for is done again
                return

    def open(self, *, new: bool) -> None:
        """Lines are added from now on; ``new``: to an empty journal."""
        self._file = open(self.path, "wb" if new else "ab")  # noqa: SIM115 - lives on, see close()
        if new:
            self._file.write(_line(self.key).encode())

    def append(self, row: list) -> None:
        """Add a line; on the disk after the next ``sync``. Nothing happens to a journal that is not open."""
        if self._file is not None:
            self._unsaved.append(_line(row))

    def sync(self) -> None:
        """Bring the lines to the disk, if the journal is open. What they vouch for must be there already."""
        if self._file is None:
            return
        self._file.write("".join(self._unsaved).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsaved.clear()

    def close(self) -> None:
        """Close the file as it is."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)


def _line(content: list | dict) -> str:
    text = json.dumps(content)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _read(line: bytes) -> Any:
    """What stands in a line. ``ValueError``: it is not as it was written."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("a line that is not as it was written")
    return json.loads(text)
