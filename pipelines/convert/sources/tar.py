"""Tars: of photos, with or without class folders, WebDataset's, and the ILSVRC2012 tar of class tars.

They are never extracted: a listing remembers where each member's bytes lie, so that any thread can read them with one
``pread``; of a compressed one, in a temporary file. Member names are only ever data.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import tarfile
from collections.abc import Collection, Generator, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeAlias

from fastssl.pipelines.convert.formats import is_photo_name
from fastssl.pipelines.convert.sources.base import Found, Passed, Source, SourceError, is_hidden
from fastssl.pipelines.convert.sources.unpacked import UnpackedFile, compression
from fastssl.pipelines.convert.sources.webdataset import Side, with_labels


class TarSource(Source):
    """A tar of photos in folders, of WebDataset's samples, or of tars, each a class. ``label_from``: see
    `webdataset.with_labels`. ``scratch``: see `list_source`.
    """

    def __init__(self, path: Path, scratch: str | os.PathLike | None = None, label_from: str | None = None):
        super().__init__(path)
        self._file: BinaryIO | UnpackedFile = open(path, "rb")  # noqa: SIM115 - lives on, see close()
        about = os.fstat(self._file.fileno())
        self._stamp, self._size, self._label_from = about.st_mtime_ns, about.st_size, label_from
        if how := compression(self._file.read(6)):
            self._file.close()
            if how == "zstd":
                raise SourceError(f"{path}: compressed with zstd, which is not read: uncompress it first (unzstd)")
            # Where it ends is known when it was read.
            self._file, self._size = UnpackedFile(path, how, scratch), sys.maxsize

    def photos(self) -> Iterator[Found | Passed]:
        return with_labels(self._contents(), self.read, self._label_from)

    def _contents(self) -> Iterator[Found | Passed | Side]:
        taken: dict[str, Found] = {}
        for name, (member, start, end, label) in _all_members(self.name, self._file, self._size):
            if isinstance(member, SourceError):
                # What could be listed before the damage is used; the damage itself is on record.
                yield Passed(name, str(member))
            elif member.isdir():
                continue
            elif is_hidden(name):
                yield Passed(name)
            elif not is_photo_name(name):
                plain = member.isreg() and member.size <= end - start
                yield Side(name, member.size, start) if plain else Passed(name)
            elif (first := _linked(member, name, taken)) and name not in taken:
                yield first._replace(name=name, label=label)
            elif why := _unusable(member, name, end - start, taken):
                yield Passed(name, why)
            else:
                taken[name] = Found(name, member.size, self._stamp, start, label)
                yield taken[name]

    def read(self, place: Any, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, place)
        if len(data) != size:
            raise SourceError(f"cut off: the tar ends after {len(data)} of {size} bytes")
        return data

    def close(self) -> None:
        self._file.close()


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own: how a tar inside a tar is read without copying it."""

    def __init__(self, file: _File, start: int, size: int):
        self._file, self._start, self.size, self._position = file, start, size, 0

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, base + position)
        return self._position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if count < 0 else min(count, left))
        self._position += len(data)
        return data


_File: TypeAlias = BinaryIO | UnpackedFile | _Window


def _linked(member: tarfile.TarInfo, name: str, taken: Mapping[str, Found]) -> Found | None:
    """What a hard link stands for: a photo of this tar that came before it."""
    above = name.removesuffix(clean_name(member.name))
    return taken.get(above + clean_name(member.linkname)) if member.islnk() else None


def _unusable(member: tarfile.TarInfo, name: str, room: int, taken: Collection[str]) -> str:
    """Why a photo of the tar, with ``room`` bytes up to the tar's end, is rejected; empty: it is not."""
    if member.issym() or member.islnk():
        return "a link inside a tar, which is not followed"
    if not member.isreg() or member.issparse():
        return "not a plain file inside the tar"
    if member.size > room:
        return "cut off: the tar ends before the file does"
    if ".." in name.split("/"):
        return "its name leads out of the tar ('..')"
    return "a second member of the same name; the first one is used" if name in taken else ""


def _all_members(
    what: str, handle: _File, size: int
) -> Iterator[tuple[str, tuple[tarfile.TarInfo | SourceError, int, int, str | None]]]:
    """Yield (name, (member, where its data begin and where they must end, class)) of the tar and of the tars in it, and
    the name of a damaged one of these with its error in the member's place.
    """
    for member in _members(handle, size, what):
        name, start = clean_name(member.name), member.offset_data
        if not (member.isreg() and name.lower().endswith(".tar") and not is_hidden(name)):
            yield name, (member, start, size, None)
            continue
        window, label = _Window(handle, start, min(member.size, size - start)), PurePosixPath(name).name[: -len(".tar")]
        try:
            for inner in _members(window, window.size, name):
                place = (inner, start + inner.offset_data, start + window.size, label)
                yield f"{name}/{clean_name(inner.name)}", place
        except SourceError as error:
            yield name, (error, 0, 0, None)


def _members(file: _File, size: int, what: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, and of those joined to it (``cat a.tar b.tar``), in their order; ``SourceError`` when
    it is no tar or damaged.
    """
    start: int | None = 0
    while start is not None:
        start = yield from _one_tar(file, start, size, what)


def _one_tar(file: _File, start: int, size: int, what: str) -> Generator[tarfile.TarInfo, None, int | None]:
    """Yield the members of the tar that begins at byte ``start``; returns where the one behind it begins, if any."""
    last, count = -1, 0
    try:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                # A member of negative size sends older Pythons' tarfile backwards, forever (CVE-2025-8194).
                if member.offset <= last or member.size < 0:
                    raise SourceError(f"{what}: damaged tar: the member header at byte {member.offset} leads backwards")
                last, count = member.offset, count + 1
                # tarfile remembers every member: over a gigabyte for ImageNet.
                archive.members = []  # type: ignore[attr-defined]  # not in its types
                yield member
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, MemoryError) as error:
        kind = f"damaged or cut off tar, behind member {count} at byte {last}" if count or start else "not a tar file"
        raise SourceError(f"{what}: {kind} ({error})") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        kind = f"damaged tar: the member behind byte {last} claims more bytes than a file can have"
        raise SourceError(f"{what}: {kind}") from None
    # tarfile takes a damaged header for the end of the archive, without a word.
    file.seek(min(end, size))
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise SourceError(f"{what}: damaged tar: no valid member header at byte {end}")
    return _next_tar(file, end)


def _next_tar(file: _File, end: int) -> int | None:
    """Where the tar begins that was joined behind the zeros from byte ``end`` on; None: nothing follows."""
    at = end
    file.seek(at)
    while block := file.read(1 << 20):
        if rest := block.lstrip(b"\0"):
            first = at + len(block) - len(rest)
            return first - first % tarfile.BLOCKSIZE
        at += len(block)
    return None


def clean_name(name: str) -> str:
    """Drop what carries no meaning from a member name: leading '/', './', doubled '/'."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))
