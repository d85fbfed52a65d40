"""Compressed tars: uncompressed while they are listed, into a temporary file that has no name and is gone with us."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastssl.pipelines.convert.sources.base import SourceError

logger = logging.getLogger(__name__)
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
#: What has to stay free, in bytes; and how many times its own size a compressed file may have at most, beyond that.
_LEFT_FREE, _LARGEST_GROWTH = 1 << 30, 200


def compression(begin: bytes) -> str | None:
    """By which program a file that begins like this was compressed; None: it is not."""
    return next((how for magic, how in _MAGIC.items() if begin.startswith(magic)), None)


class UnpackedFile(io.RawIOBase):
    """The contents of a compressed file, uncompressed as far as they were read: for one thread, until all of it is
    there and `os.pread` on ``fileno()`` reads anywhere. ``scratch``: see `list_source`.

    ``SourceError``: damaged, no room, or far larger than photos become by uncompressing.
    """

    def __init__(self, path: Path, how: str, scratch: str | os.PathLike | None):
        self._path, self._packed_size, self._done, self._position = path, path.stat().st_size, 0, 0
        self._folder = tempfile.gettempdir() if scratch is None or "TMPDIR" in os.environ else os.path.abspath(scratch)
        logger.warning("%s: compressed; uncompressed first, into a temporary file in %s", path, self._folder)
        self._packed: Any = {"gzip": gzip.GzipFile, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}[how](path)
        self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives on, see close()

    def fileno(self) -> int:
        return self._file.fileno()

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        """Not from the end, which is not known yet."""
        self._position = position + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def read(self, count: int = -1) -> bytes:
        """``count`` bytes, or what there is."""
        while self._done < self._position + count and (data := self._unpacked()):
            self._done += self._file.write(data)
            self._file.flush()
        data = os.pread(self.fileno(), count, self._position)
        self._position += len(data)
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            self._packed.close()
        super().close()

    def _unpacked(self) -> bytes:
        """The next piece; nothing behind the last one."""
        try:
            data: bytes = self._packed.read(1 << 22)
        except Exception as error:  # each library has its own for damage
            if isinstance(error, OSError) and error.errno is not None:  # the disk's
                raise
            raise SourceError(f"{self._path}: damaged or cut off behind {self._done:,} bytes ({error})") from None
        if self._done > _LARGEST_GROWTH * self._packed_size + _LEFT_FREE:
            raise SourceError(f"{self._path}: more than {_LARGEST_GROWTH} times as large uncompressed: no photos are")
        if shutil.disk_usage(self._folder).free < _LEFT_FREE + len(data):
            raise SourceError(
                f"{self._path}: no room in {self._folder} to uncompress it: less than {_LEFT_FREE >> 30} GB would stay "
                f"free behind {self._done:,} bytes; free some, or name another folder with TMPDIR"
            )
        return data
