"""Zips of photos, with or without class folders. They are never extracted: photos are read where they lie, each bounded
by the size that the directory says, and held against its checksum.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fastssl.pipelines.convert.formats import is_photo_name
from fastssl.pipelines.convert.sources.base import MAX_FILE_BYTES, Found, Passed, Source, SourceError, is_hidden
from fastssl.pipelines.convert.sources.tar import clean_name

_HEADER = struct.Struct("<4s22xHH")  # of a file in the zip: magic, length of its name, length of what else there is


class ZipSource(Source):
    """A zip as a folder would be, in the zip's order."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._file = open(path, "rb")  # noqa: SIM115 - lives on, see close()

    def photos(self) -> Iterator[Found | Passed]:
        stamp, taken = os.fstat(self._file.fileno()).st_mtime_ns, set[str]()
        try:
            with zipfile.ZipFile(self._file) as archive:
                members = archive.filelist
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError) as error:
            raise SourceError(f"{self.name}: damaged, cut off or not a zip file ({error})") from None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise SourceError(f"{self.name}: damaged zip: its directory leads out of it") from None
        for member in members:
            name = member.filename
            # Some programs of Windows write its separator, against the format.
            name = clean_name(name.replace("\\", "/") if member.create_system == 0 and "/" not in name else name)
            if member.filename.endswith("/"):
                continue
            if not is_photo_name(name) or is_hidden(name):
                yield Passed(name)
            elif why := _unusable(member, name, taken):
                yield Passed(name, why)
            else:
                taken.add(name)
                place = (max(0, member.header_offset), member.compress_size, member.compress_type, member.CRC)
                yield Found(name, member.file_size, stamp, place)

    def read(self, place: Any, size: int) -> bytes:
        offset, packed, how, checksum = place
        begin = os.pread(self._file.fileno(), _HEADER.size, offset)
        if len(begin) < _HEADER.size or not begin.startswith(b"PK\3\4"):
            raise SourceError(f"damaged: the zip has no file at byte {offset}")
        start = offset + _HEADER.size + sum(_HEADER.unpack(begin)[1:])
        data = os.pread(self._file.fileno(), packed, start)
        if len(data) != packed:
            raise SourceError(f"cut off: the zip ends after {len(data)} of {packed} bytes")
        if how == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise SourceError(f"damaged in the zip ({error})") from None
        if len(data) != size or zlib.crc32(data) != checksum:
            raise SourceError("damaged in the zip: not the size or the checksum that its directory says")
        return data

    def close(self) -> None:
        self._file.close()


def _unusable(member: zipfile.ZipInfo, name: str, taken: Collection[str]) -> str:
    """Why a photo of the zip is rejected; empty: it is not."""
    if stat.S_ISLNK(member.external_attr >> 16):
        return "a link inside a zip, which is not followed"
    if member.flag_bits & 1:
        return "encrypted; unpack the zip with its password"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed in a way that is not read (method {member.compress_type}); unpack the zip"
    if ".." in name.split("/"):
        return "its name leads out of the zip ('..')"
    # Deflated data are hardly ever larger than what they hold.
    if member.compress_size > min(MAX_FILE_BYTES, member.file_size) * 1.01 + 1000:
        return "damaged: claims to be larger compressed than not"
    return "a second file of the same name; the first one is used" if name in taken else ""
