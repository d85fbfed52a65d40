"""What stands beside the result while a conversion runs, and lets one that was stopped go on: the growing file,
``DST.partial``, and ``DST.partial.journal``, one line for every photo that is safely on the disk.

The journal's first line is the key: what has to be equal for a stopped conversion to be continued with the very same
bytes. Every line has a checksum of its own: a wrong digit would become a wrong label in the result, and nobody would
know.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastssl.pipelines.convert.options import ConvertError
from fastssl.utils.deadline import threads_given_up


@contextmanager
def reserve(dst: Path) -> Iterator[Path]:
    """Yield the path of the unfinished file, held against a second conversion to the same place."""
    partial = Path(f"{dst}.partial")
    existed = partial.exists()
    try:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConvertError(f"{partial}: cannot write: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConvertError(f"{partial}: another conversion is writing it") from None
        except OSError:
            pass  # a file system without locks
        yield partial
    finally:
        # Closing waits for what is on its way to the disk, also to one that will never take it.
        if not threads_given_up():
            os.close(handle)
            if not existed and partial.exists() and partial.stat().st_size == 0:
                partial.unlink()


class Journal:
    """The journal file at ``path`` of the conversion with this ``key``."""

    def __init__(self, path: Path, key: dict[str, Any]):
        self.path, self.key = path, key
        self._file: BinaryIO | None = None
        self._unsaved: list[str] = []

    @property
    def has_unsaved(self) -> bool:
        """Whether lines were added since the last ``sync``."""
        return bool(self._unsaved)

    def replay(self) -> Iterator[tuple[list, int]]:
        """(row, bytes of the file up to the row's end) of each whole line. ``ValueError``: it is of another
        conversion.
        """
        # What follows the last newline was being written when the run was stopped.
        *lines, _ = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        if lines and _read(lines[0]) != self.key:
            raise ValueError("the journal of another conversion")
        end = 0
        for number, line in enumerate(lines):
            end += len(line) + 1
            if (row := _read(line)) is None:  # what it and those behind it vouched for is done again
                return
            if number:
                yield row, end

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
        if self._file is not None:
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
    """What stands in a line; None: it is not as it was written."""
    checksum, _, text = line.partition(b" ")
    return json.loads(text) if checksum == b"%08x" % zlib.crc32(text) else None
