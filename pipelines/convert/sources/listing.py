"""The photos of one source or several as one list, or one a split, each with its class. By its fingerprint a resumed
conversion knows that it looks at the same photos.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.errors import counted
from fastssl.pipelines.convert.formats import remedies
from fastssl.pipelines.convert.sources.base import MAX_FILE_BYTES, Found, Source, SourceError, listed_behind
from fastssl.pipelines.convert.sources.classes import ListingRules
from fastssl.pipelines.convert.sources.collect import Collected
from fastssl.pipelines.convert.sources.kinds import expected, files_of, open_source
from fastssl.utils.addresses import shown
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
        split: 'train', 'val' or 'test', where these are a part of the source; else ''. splits: the names of all, where
            one of several was preferred. notes: lines that tell what was taken for a class or split, where somebody may
            have meant it otherwise. rules: what the classes were found by.
    """

    source: Path
    names: list[str]
    labels: np.ndarray
    classes: list[str] | None
    sizes: np.ndarray
    rejected: list[tuple[str, str]]
    passed_over: dict[str, int]
    fingerprint: str
    split: str
    notes: list[str]
    rules: ListingRules
    _sources: list[Source] = field(repr=False)
    _places: list[tuple[int, Any]] = field(repr=False)
    splits: list[str] = field(default_factory=list)

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


def list_source(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    deadline: Deadline | None = None,
    rules: ListingRules | None = None,
    scratch: str | os.PathLike | None = None,
    prefer: str = "",
) -> Listing:
    """`list_splits` of photos that have no splits, or of the one that ``rules`` name, or, of several, of ``prefer``,
    which its notes then say. ``SourceError``: there are several.
    """
    listings = list_splits(sources, deadline, rules, scratch)
    first, *others = listings.values()
    if not others:
        return first
    there = " and ".join(f"{name} ({counted(len(listing), 'photo')})" for name, listing in listings.items())
    if (chosen := listings.get(prefer)) is None:
        first.close()
        raise SourceError(
            f"{first.source}: holds {there}; `fastssl convert-imagenet` makes a file of each, or with --split "
            f"{first.split} of one, with --split none takes them as classes"
        )
    chosen.splits = list(listings)
    chosen.notes.insert(0, f"{first.source}: holds {there}: {prefer} is taken")
    return chosen


def list_splits(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    deadline: Deadline | None = None,
    rules: ListingRules | None = None,
    scratch: str | os.PathLike | None = None,
) -> dict[str, Listing]:
    """List the photos of a folder, a tar, ... (see `kinds.open_source`), of several of them or of all that a pattern
    stands for (``train-{000..146}.tar``, ``data/*.parquet``) as one, by split (see `classes.find_splits`):
    {"train": ..., "val": ...}; {"": ...} where there are none. They share their sources: closing one closes all. Those
    with labels have one class list.

    Folder: with photos in sub-folders, the first folder level that tells them apart is the class; with photos only
    directly inside, there are no labels. Tar: a tar of tars takes each inner tar's name as the class; a plain tar is
    read as a folder would be, and without labels when all photos lie in one folder. Symbolic links are followed in
    folders, never in tars. Hidden files and folders (``.x``, macOS' ``._x``) are passed over. ``deadline``: with which
    a hundred files are waited for. ``scratch``: where a compressed tar is uncompressed, unless TMPDIR says it.

    Raises:
        SourceError: missing, of no kind that we read, damaged, without a single photo, or without the wanted split.
        LabelError: a file of labels or classes that cannot be read, or does not belong to the photos.
        Stalled: the disk or network file system did not answer.
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    deadline, rules, parts = deadline or Deadline(given[0]), rules or ListingRules(), files_of(given)
    collected = Collected(rules)
    with ExitStack() as opened:
        for files, prefix in zip(parts, _prefixes(parts)):
            try:
                source = open_source(files, deadline, rules.label_from, scratch)
                opened.callback(source.close)
                collected.take(source, deadline.each(source.photos(), listed_behind), prefix)
            except OSError as error:
                raise SourceError(f"{error.filename or files[0]}: cannot read: {error.strerror or error}") from None
        wanted = collected.choose(shown(given[0]))
        classes = collected.class_list()
        listings = {
            split: _listing(Path(shown(given[0])), collected, split, classes, split == wanted[0]) for split in wanted
        }
        for listing in listings.values():
            if listing.names:
                continue
            others = "; ".join([counted(listing.ignored, "other file"), *remedies(listing.passed_over)])
            if listing.rejected:
                others += (
                    f"; {len(listing.rejected)} rejected, first {listing.rejected[0][0]}: {listing.rejected[0][1]}"
                )
            raise SourceError(f"{given[0]}: no photos found ({others}); {expected(given[0], listing.passed_over)}")
        opened.pop_all()
    return listings


def _prefixes(parts: Sequence[Sequence[str]]) -> list[str]:
    """What stands before the names of each source of several, so that no two photos have one name."""
    if len(parts) == 1:
        return [""]
    # Tables that are one source have the names of their files in their photos' names.
    names = [os.path.basename(os.path.normpath(files[0] if len(files) == 1 else "tables")) for files in parts]
    count = Counter(names)
    return [f"{name}/" if count[name] == 1 else f"{number}-{name}/" for number, name in enumerate(names)]


def _listing(source: Path, collected: Collected, split: str, classes: list[str], first: bool) -> Listing:
    """The photos of one split, or all, as one list. What lies in no split is counted with the ``first``."""
    groups, rules, known = collected.splits[split], collected.rules, collected.splits
    mine = {split, *({one for one, _, _ in collected.rejected} - known.keys() if first else ())}
    rejected = [(name, reason) for one, name, reason in collected.rejected if one in mine]
    labelled = (all if rules.keep_all else any)(group.classes is not None for group in groups)
    outside = "not inside a class folder, unlike other photos here"
    if rules.labels is not None:
        outside = f"{rules.labels.name} has no label for it"
    elif rules.by_path:
        outside = f"{rules.named} finds no class in its path"
    index: dict[str, int] = {name: k for k, name in enumerate(classes)}
    names, found, places, labels = list[str](), list[Found](), list[tuple[int, Any]](), list[int]()
    for group in groups:
        for name, one, label in zip(group.names, group.found, group.classes or [""] * len(group.names)):
            if labelled and not label:
                rejected.append(
                    (name, outside if group.by_path or rules.labels else "no label, unlike other photos here")
                )
                continue
            names.append(name)
            found.append(one)
            places.append((group.source, one.place))
            labels.append(index[label] if labelled else 0)
    named, numbers = classes if labelled else None, np.array(labels, np.int64)
    digest = hashlib.sha256(repr(named).encode())
    for name, one in zip(names, found):
        digest.update(f"{name!r} {one.size} {one.stamp}\n".encode())
    digest.update(repr(rejected).encode())
    digest.update(numbers.tobytes())
    sizes, passed_over = np.array([one.size for one in found], np.int64), dict(collected.passed_over) if first else {}
    about = (rejected, passed_over, digest.hexdigest(), split, collected.notes, rules, collected.sources, places)
    return Listing(source, names, numbers, named, sizes, *about)
