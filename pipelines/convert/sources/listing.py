"""The photos of one source or several as one list, each with its class. By its fingerprint a resumed conversion knows
that it looks at the same photos.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.errors import counted
from fastssl.pipelines.convert.formats import kind_of
from fastssl.pipelines.convert.sources.base import MAX_FILE_BYTES, Found, Source, SourceError, listed_behind
from fastssl.pipelines.convert.sources.folder import FolderSource
from fastssl.pipelines.convert.sources.tar import TarSource
from fastssl.utils.deadline import Deadline


@dataclass
class Listing:
    """Photos in the order in which they are converted.

    Attributes:
        source: the folder, tar, ..., the first of several. names: N paths inside it; of several sources with the
            source's own name in front.
        classes: class names, or None for photos without labels. labels: (N,) int64, index into them, or 0.
        sizes: (N,) int64, in bytes; -1: not known.
        rejected: (path inside the source, reason) of what looks like a photo but cannot be one.
        passed_over: how many other files there are, by kind (see `formats.kind_of`).
        fingerprint: hex digest over names, sizes, times of change and labels.
    """

    source: Path
    names: list[str]
    labels: np.ndarray
    classes: list[str] | None
    sizes: np.ndarray
    rejected: list[tuple[str, str]]
    passed_over: dict[str, int]
    fingerprint: str
    _sources: list[Source] = field(repr=False)
    _places: list[tuple[int, Any]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sources."""
        for source in self._sources:
            source.close()

    @property
    def ignored(self) -> int:
        """Files that are no photos."""
        return sum(self.passed_over.values())

    def read(self, i: int) -> bytes:
        """The encoded bytes of photo ``i``; from any thread. ``SourceError`` when it changed since the listing,
        ``OSError`` as usual.
        """
        size = int(self.sizes[i])
        if size > MAX_FILE_BYTES:
            raise SourceError(f"{size:,} bytes, more than the limit of {MAX_FILE_BYTES:,}")
        number, place = self._places[i]
        return self._sources[number].read(place, size)


def open_source(path: str | os.PathLike) -> Source:
    """The source at ``path``, by what it is. ``SourceError``: of no kind that we read; ``OSError`` as usual."""
    path = Path(path)
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        return FolderSource(path)
    if stat.S_ISREG(mode):
        return TarSource(path)
    raise SourceError(f"{path}: neither a folder nor a tar file")


def list_source(sources: str | os.PathLike | Sequence[str | os.PathLike], deadline: Deadline | None = None) -> Listing:
    """List the photos of a folder, a tar, ..., or of several of them as one.

    Folder: with photos in sub-folders, the first folder level is the class; with photos only directly inside, there are
    no labels. Tar: a tar of tars takes each inner tar's name as the class; a plain tar is read as a folder would be,
    below the folders that all its photos share, and without labels when all of them lie in one folder. Symbolic links
    are followed in folders, never in tars. Hidden files and folders (``.x``, macOS' ``._x``) are passed over.
    ``deadline``: with which a hundred files are waited for.

    Raises:
        SourceError: missing, of no kind that we read, damaged, or without a single photo.
        Stalled: the disk or network file system did not answer.
    """
    paths = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    deadline = deadline or Deadline(paths[0])
    collected = _Collected()
    with ExitStack() as opened:
        for number, path in enumerate(paths):
            try:
                source = open_source(path)
                opened.callback(source.close)
                collected.take(source, deadline, prefix=_prefix(paths, number))
            except OSError as error:
                raise SourceError(f"{error.filename or path}: cannot read: {error.strerror or error}") from None
        listing = collected.listing(Path(paths[0]))
        if not listing.names:
            others = counted(listing.ignored, "other file")
            if listing.rejected:
                others += (
                    f"; {len(listing.rejected)} rejected, first {listing.rejected[0][0]}: {listing.rejected[0][1]}"
                )
            expected = f"{paths[0]}/CLASS/photo.jpg, {paths[0]}/photo.jpg, or a tar"
            raise SourceError(f"{paths[0]}: no photos found ({others}); expected {expected}")
        opened.pop_all()
    return listing


def _prefix(paths: Sequence[str | os.PathLike], number: int) -> str:
    """What stands before the names of one source of several, so that no two photos have one name."""
    if len(paths) == 1:
        return ""
    names = [os.path.basename(os.path.normpath(path)) for path in paths]
    name = names[number]
    return f"{name}/" if names.count(name) == 1 else f"{number}-{name}/"


class _Collected:
    """What was found so far."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.photos: list[tuple[str, Found, str | None]] = []  # name in the list, photo, class
        self.places: list[tuple[int, Any]] = []
        self.rejected: list[tuple[str, str]] = []
        self.passed_over: Counter[str] = Counter()

    def take(self, source: Source, deadline: Deadline, prefix: str) -> None:
        """List ``source``."""
        found: list[Found] = []
        for one in deadline.each(source.photos(), listed_behind):
            if isinstance(one, Found):
                found.append(one)
            elif one.reason:
                self.rejected.append((f"{prefix}{one.name}", one.reason))
            else:
                self.passed_over[kind_of(one.name)] += 1
        if source.sorts:
            # By parts, so that a class's photos stay together: "cat-2/x" sorts before "cat/x" as a string.
            found.sort(key=lambda one: one.name.split("/"))
        number = len(self.sources)
        self.sources.append(source)
        self.places += [(number, one.place) for one in found]
        classes = _classes(source, found)
        self.photos += [
            (f"{prefix}{one.name}", one, None if classes is None else classes.get(one.name, "")) for one in found
        ]

    def listing(self, source: Path) -> Listing:
        """All of it as one list."""
        labelled = any(label is not None for _, _, label in self.photos)
        classes, labels = None, np.zeros(len(self.photos), np.int64)
        if labelled:
            outside = "not inside a class folder, unlike other photos here"
            self.rejected += [(name, outside) for name, _, label in self.photos if not label]
            kept = [k for k, (_, _, label) in enumerate(self.photos) if label]
            self.photos, self.places = [self.photos[k] for k in kept], [self.places[k] for k in kept]
            classes = sorted({label for _, _, label in self.photos if label})
            index: dict[str | None, int] = {name: k for k, name in enumerate(classes)}
            labels = np.array([index[label] for _, _, label in self.photos], np.int64)
        digest = hashlib.sha256(repr(classes).encode())
        for name, one, _ in self.photos:
            digest.update(f"{name!r} {one.size} {one.stamp}\n".encode())
        digest.update(repr(self.rejected).encode())
        names, sizes = [name for name, _, _ in self.photos], np.array([one.size for _, one, _ in self.photos], np.int64)
        found = (self.rejected, dict(self.passed_over), digest.hexdigest())
        return Listing(source, names, labels, classes, sizes, *found, self.sources, self.places)


def _classes(source: Source, found: list[Found]) -> dict[str, str] | None:
    """The class of every photo that has one, by its name; None: they have no classes.

    What the source itself says counts, otherwise the first folder. A folder of photos may have some folders in it
    (thumbnails, a few edited ones), but at least half of its photos lie in none; or there is only one.
    """
    said = {one.name: _class_name(source, one.label) for one in found if one.label is not None}
    if said:
        return said
    folders = {one.name.rpartition("/")[0] for one in found}
    shared = len(os.path.commonpath(folders)) if folders and source.strips else 0
    parts = {one.name: one.name[shared:].lstrip("/").split("/") for one in found}
    class_of = {name: path[0] for name, path in parts.items() if len(path) > 1}
    loose = len(found) - len(class_of)
    return None if 2 * loose >= len(found) or (loose and len(set(class_of.values())) == 1) else class_of


def _class_name(source: Source, label: str | int) -> str:
    if isinstance(label, str):
        return label
    known = source.classes
    return known[label] if known is not None and 0 <= label < len(known) else f"{label}"
