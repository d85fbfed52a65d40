"""Where photos come from: a folder of class folders, a flat folder, a tar, or the ILSVRC2012 tar of class tars.

A listing is made first, without reading any picture; by its fingerprint a resumed conversion knows that it looks at the
same photos. Tars are never extracted: a listing remembers where each member's bytes lie, so that any thread can read
them with one ``pread``. Member names are only ever data.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import tarfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from fastssl.errors import FastSSLError, counted, printable
from fastssl.pipelines.convert.formats import is_photo_name
from fastssl.utils.deadline import Deadline

#: Folders that programs of cameras and network disks put beside photos: thumbnails, what was deleted.
_NOT_PHOTOS = frozenset({"@eaDir", "#recycle", "lost+found", "__MACOSX"})
#: No photo has this many bytes; a larger file is a mistake or an attack on our memory.
MAX_FILE_BYTES = 1 << 30


class SourceError(FastSSLError):
    """A source of photos is missing, empty, or not of a kind that we read."""


@dataclass
class Listing:
    """The photos of a source in the order in which they are converted.

    Attributes:
        source: the folder or tar. names: N paths inside it.
        classes: sorted class names, or None for photos without labels. labels: (N,) int64, index into them, or 0.
        offsets: (N,) int64, where in the tar each photo's bytes start; None for a folder. sizes: (N,) int64, in bytes.
        rejected: (path inside the source, reason) of what looks like a photo but cannot be one.
        ignored: number of other files: no image extension, hidden, or not a regular file.
        fingerprint: hex digest over names, sizes, places, times of change and labels.
    """

    source: Path
    names: list[str]
    labels: np.ndarray
    classes: list[str] | None
    offsets: np.ndarray | None
    sizes: np.ndarray
    rejected: list[tuple[str, str]]
    ignored: int
    fingerprint: str
    _tar: BinaryIO | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the tar, if it is one."""
        if self._tar is not None:
            self._tar.close()

    def read(self, i: int) -> bytes:
        """The encoded bytes of photo ``i``; from any thread. ``SourceError`` when it changed since the listing,
        ``OSError`` as usual.
        """
        size = int(self.sizes[i])
        if size > MAX_FILE_BYTES:
            raise SourceError(f"{size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")
        if self._tar is not None and self.offsets is not None:
            data = os.pread(self._tar.fileno(), size, int(self.offsets[i]))
            if len(data) != size:
                raise SourceError(f"cut off: the tar ends after {len(data)} of {size} bytes")
            return data
        with open(self.source / self.names[i], "rb") as file:
            # One byte more than expected shows a file that has grown.
            data = file.read(size + 1)
        if len(data) != size:
            raise SourceError("changed while it was being converted")
        return data


def list_source(source: str | os.PathLike, deadline: Deadline | None = None) -> Listing:
    """List the photos of a folder or a tar.

    Folder: with photos in sub-folders, the first folder level is the class; with photos only directly inside, there are
    no labels. Tar: a tar of tars takes each inner tar's name as the class; a plain tar is read as a folder would be,
    below the folders that all its photos share, and without labels when all of them lie in one folder. Symbolic links
    are followed in folders, never in tars. Hidden files (``.x``, macOS' ``._x``) are ignored. ``deadline``: with which
    a hundred files are waited for.

    Raises:
        SourceError: missing, neither folder nor tar, compressed, damaged, or without a single photo.
        Stalled: the disk or network file system did not answer.
    """
    source = Path(source)
    deadline = deadline or Deadline(source)
    try:
        mode = os.stat(source).st_mode
        if stat.S_ISDIR(mode):
            listing = _list_folder(source, deadline)
        elif stat.S_ISREG(mode):
            listing = _list_tar(source, deadline)
        else:
            raise SourceError(f"{source}: neither a folder nor a tar file")
    except OSError as error:
        raise SourceError(f"{error.filename or source}: cannot read: {error.strerror or error}") from None
    if not listing.names:
        listing.close()
        others = counted(listing.ignored, "other file")
        if listing.rejected:
            others += f"; {len(listing.rejected)} rejected, first {listing.rejected[0][0]}: {listing.rejected[0][1]}"
        expected = f"{source}/CLASS/photo.jpg, {source}/photo.jpg, or a tar"
        raise SourceError(f"{source}: no photos found ({others}); expected {expected}")
    return listing


def _list_folder(root: Path, deadline: Deadline) -> Listing:
    found: list[tuple[str, int, int]] = []
    rejected: list[tuple[str, str]] = []
    ignored = 0
    for name, info in deadline.each(_walk(root), _listed_behind):
        folder = name.endswith("/")
        if folder:
            warnings.warn(f"{root / printable(name)}: {info}: its photos are missing", stacklevel=2)
        if isinstance(info, str) and (folder or is_photo_name(name)):
            rejected.append((name, info))
        # A named pipe called x.jpg would block the reader forever.
        elif isinstance(info, str) or not is_photo_name(name) or not stat.S_ISREG(info.st_mode):
            ignored += 1
        else:
            found.append((name, info.st_size, info.st_mtime_ns))
    # By parts, so that a class's photos stay together: "cat-2/x" sorts before "cat/x" as a string.
    found.sort(key=lambda row: row[0].split("/"))
    return _listing(root, found, _classes({name: name.split("/") for name, _, _ in found}), rejected, ignored)


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result | str]]:
    """Yield (path below root, stat or the reason why there is none) of every file, and (path with a slash at its end,
    reason) of a folder that cannot be read. Links are followed, loops are not; folders of runs are left out.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        folder = root / prefix
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            continue
        seen.add((here.st_dev, here.st_ino))
        try:
            with os.scandir(folder) as entries:
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
            if stat.S_ISDIR(info.st_mode):
                if not entry.name.startswith(".") and entry.name not in _NOT_PHOTOS:
                    waiting.append(f"{name}/")
            else:
                yield name, info


def _classes(parts: dict[str, list[str]]) -> dict[str, str] | None:
    """The class, its first folder, of every photo that lies in one, by the parts of its path; None: they have no
    classes. A folder of photos may have some folders in it (thumbnails, a few edited ones), but at least half of its
    photos lie in none; or there is only one.
    """
    class_of = {name: path[0] for name, path in parts.items() if len(path) > 1}
    loose = len(parts) - len(class_of)
    return None if 2 * loose >= len(parts) or (loose and len(set(class_of.values())) == 1) else class_of


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own: how a tar inside a tar is read without copying it."""

    def __init__(self, file: BinaryIO, start: int, size: int):
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


def _list_tar(path: Path, deadline: Deadline) -> Listing:
    found: list[tuple[str, int, int]] = []
    offsets: dict[str, int] = {}
    rejected: list[tuple[str, str]] = []
    inner_class: dict[str, str] = {}
    ignored = 0
    with ExitStack() as opened:
        handle = opened.enter_context(open(path, "rb"))
        about = os.fstat(handle.fileno())
        members = _all_members(path, handle, about.st_size)
        for name, (member, start, end, label) in deadline.each(members, _listed_behind):
            if isinstance(member, SourceError):
                # What could be listed before the damage is used; the damage itself is on record.
                rejected.append((name, str(member)))
            elif not is_photo_name(name) or member.isdir() or not _NOT_PHOTOS.isdisjoint(name.split("/")):
                ignored += not member.isdir()
            elif why := _unusable(member, name, end - start, offsets):
                rejected.append((name, why))
            else:
                found.append((name, member.size, about.st_mtime_ns))
                offsets[name] = start
                if label is not None:
                    inner_class[name] = label

        # The folders that all photos share name no class.
        folders = {name.rpartition("/")[0] for name, _, _ in found}
        shared = len(os.path.commonpath(folders)) if folders else 0
        class_of = inner_class or _classes({name: name[shared:].lstrip("/").split("/") for name, _, _ in found})
        listing = _listing(path, found, class_of, rejected, ignored)
        listing.offsets = np.array([offsets[name] for name in listing.names], np.int64)
        listing._tar = handle
        opened.pop_all()
    return listing


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
    path: Path, handle: BinaryIO, size: int
) -> Iterator[tuple[str, tuple[tarfile.TarInfo | SourceError, int, int, str | None]]]:
    """Yield (name, (member, where its data begin and where they must end, class)) of the tar and of the tars in it, and
    the name of a damaged one of these with its error in the member's place.
    """
    if handle.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")):
        how = "uncompress it first (gunzip, bunzip2, unxz, unzstd)"
        raise SourceError(f"{path}: a compressed tar cannot be read at random places; {how}")
    for member in _members(handle, size, str(path)):
        name, start = _clean(member.name), member.offset_data
        if not (member.isreg() and name.lower().endswith(".tar") and not name.rsplit("/", 1)[-1].startswith(".")):
            yield name, (member, start, size, None)
            continue
        window, label = _Window(handle, start, min(member.size, size - start)), PurePosixPath(name).name[: -len(".tar")]
        try:
            for inner in _members(window, window.size, name):
                place = (inner, start + inner.offset_data, start + window.size, label)
                yield f"{name}/{_clean(inner.name)}", place
        except SourceError as error:
            yield name, (error, 0, 0, None)


def _members(file: BinaryIO | _Window, size: int, what: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar in its order; ``SourceError`` when it is no tar or damaged."""
    last, count = -1, 0
    try:
        file.seek(0)
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
        kind = f"damaged or cut off tar, behind member {count} at byte {last}" if count else "not a tar file"
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


def _clean(name: str) -> str:
    """Drop what carries no meaning from a member name: leading '/', './', doubled '/'."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _listed_behind(found: tuple[str, Any] | None) -> str:
    return "while photos were listed, " + (f"behind {printable(found[0])}" if found else "at the first of them")


def _listing(
    source: Path,
    found: list[tuple[str, int, int]],
    class_of: dict[str, str] | None,
    rejected: list[tuple[str, str]],
    ignored: int,
) -> Listing:
    classes, labels = None, np.zeros(len(found), np.int64)
    if class_of is not None:
        outside = "not inside a class folder, unlike other photos here"
        rejected += [(name, outside) for name, _, _ in found if name not in class_of]
        found = [row for row in found if row[0] in class_of]
        classes = sorted(set(class_of.values()))
        index = {name: k for k, name in enumerate(classes)}
        labels = np.array([index[class_of[name]] for name, _, _ in found], np.int64)
    digest = hashlib.sha256(repr(classes).encode())
    for name, size, mtime in found:
        digest.update(f"{name!r} {size} {mtime}\n".encode())
    digest.update(repr(rejected).encode())
    sizes = np.array([size for _, size, _ in found], np.int64)
    names, fingerprint = [name for name, _, _ in found], digest.hexdigest()
    return Listing(source, names, labels, classes, None, sizes, rejected, ignored, fingerprint)
