"""What is in a set of photos: how many of which class and size, what was rejected, and which photos are there twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.data.photo_source import is_source, listed_sides
from fastssl.errors import FastSSLError, JpegError
from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import read_side_file
from fastssl.pipelines.beton.verify import sample_checksums
from fastssl.pipelines.convert.conversion import rejects_path
from fastssl.pipelines.convert.encode import encode_photo
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.convert.sources import Listing, list_source
from fastssl.utils.cores import available_cores
from fastssl.utils.deadline import Deadline

#: Photos of a folder or tar whose headers are read for their sizes; photos that a thread reads at a time.
_MEASURED, _PART = 256, 64


class ListedPhotos:
    """The photos of a folder or tar with those parts of `BetonReader` that are asked for here."""

    def __init__(self, listing: Listing):
        self.listing, self.path, self.sizes, self.classes = listing, listing.source, listing.sizes, listing.classes
        self.labels = None if listing.classes is None else listing.labels

    def __len__(self) -> int:
        return len(self.listing)

    def encoded(self, i: int) -> np.ndarray:
        """The bytes of photo ``i``'s file, 1-D uint8."""
        return np.frombuffer(self.listing.read(i), np.uint8)

    def decode(self, i: int, short_side: int = 512) -> np.ndarray:
        """Photo ``i`` as a conversion would store it, (H, W, 3) uint8. ``JpegError``: it would be rejected."""
        try:
            photo = encode_photo(self.listing.read(i), ConvertOptions(short_side=short_side, store="raw"))
        except Exception as error:  # decoders raise anything at all for damaged input
            raise JpegError(f"{self.path}: {self.listing.names[i]}: {error}") from None
        return np.frombuffer(photo.data, np.uint8).reshape(photo.height, photo.width, 3)


Photos = BetonReader | ListedPhotos


@contextmanager
def open_photos(path: str | os.PathLike) -> Iterator[Photos]:
    """The photos of a ``.beton`` file, folder or tar, open. Raises FastSSLError where there are none."""
    path = Path(path)
    deadline = Deadline(path)
    if is_source(path):
        with list_source(path, deadline) as listing:
            yield ListedPhotos(listing)
    else:
        with deadline.call(lambda: BetonReader(path), "at its tables") as reader:
            yield reader


@dataclass(frozen=True)
class Contents:
    """What is in one file, folder or tar.

    Attributes:
        photos: how many. classes: photos of each class, in the order of the labels; None: no labels.
        short_side: in pixels: 'p5', 'median', 'p95'; 'below_224': how many photos, of those that were 'measured'. Of a
            folder or tar some are. None: none could be read.
        bytes: of all photos as they are stored; None: a source that does not know before they are read.
        raw: photos stored as pixels; None: not stored yet.
        rejects: how many photos of a folder, tar or its conversion were rejected for which kind of reason.
        passed_over: files of a folder or tar that are no photos, by kind (see `formats.kind_of`).
        made: what the side file says of the conversion: source, tool, options, copied, reencoded, scaled.
    """

    path: Path
    photos: int
    classes: dict[str, int] | None
    short_side: dict[str, int] | None
    bytes: int | None
    raw: int | None
    rejects: dict[str, int]
    passed_over: dict[str, int] = field(default_factory=dict)
    made: dict[str, Any] | None = None


def look_into(photos: Photos) -> Contents:
    """Count what is there; no picture is decoded."""
    classes = None if photos.labels is None else _count(photos.labels, photos.classes)
    known = (photos.path, len(photos), classes)
    if isinstance(photos, ListedPhotos):
        listing = photos.listing
        sides = np.array(listed_sides(listing, Deadline(photos.path), _MEASURED))
        reasons = Counter(kind_of_reason(reason) for _, reason in listing.rejected)
        size = None if (photos.sizes < 0).any() else int(photos.sizes.sum())
        return Contents(*known, _spread(sides), size, None, _sorted(reasons), _sorted(Counter(listing.passed_over)))
    raw, sides = int((photos.modes == MODE_RAW).sum()), np.minimum(photos.heights, photos.widths)
    stored = (int(photos.sizes.sum()), raw, _rejects(photos.path))
    return Contents(*known, _spread(sides), *stored, made=_made(photos))


def _count(labels: np.ndarray, names: list[str] | None) -> dict[str, int]:
    found, counts = np.unique(labels, return_counts=True)
    of_label = dict(zip(found.tolist(), counts.tolist()))
    named: Counter[str] = Counter(dict.fromkeys(names or (), 0))  # classes whose photos are all gone, too
    for label, count in of_label.items():
        named[names[label] if names and 0 <= label < len(names) else f"class {label}"] += count
    return dict(named)


def _spread(sides: np.ndarray) -> dict[str, int] | None:
    if not len(sides):
        return None
    low, middle, high = (int(side) for side in np.percentile(sides, (5, 50, 95), method="nearest"))
    below = int((sides < 224).sum())
    return {"p5": low, "median": middle, "p95": high, "below_224": below, "measured": len(sides)}


def kind_of_reason(reason: str) -> str:
    """A reason of a reject without what differs from photo to photo: names in quotes, and numbers."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "...", " ".join(reason.split())[:1000])
    return re.sub(r"\b0x[0-9a-f]+|(?<![A-Za-wyz\d])\d+(?:[.,]\d+)*", "N", text)[:120]


def _sorted(kinds: Counter[str]) -> dict[str, int]:
    return dict(kinds.most_common())


def _rejects(path: Path) -> dict[str, int]:
    """Of the list that the conversion left beside the file; lines that are not its own are not counted."""
    kinds: Counter[str] = Counter()
    with suppress(FileNotFoundError):
        if (listed := rejects_path(path)).is_file():  # a pipe of that name would wait for its writer
            with listed.open(encoding="utf-8", errors="replace") as file:
                for line in iter(lambda: file.readline(1 << 16), ""):
                    with suppress(ValueError, KeyError, TypeError, RecursionError):
                        kinds[kind_of_reason(str(json.loads(line)["reason"]))] += 1
    return _sorted(kinds)


def _made(reader: BetonReader) -> dict[str, Any] | None:
    with suppress(FastSSLError):
        side = read_side_file(reader.path)
        if side is not None and side["bytes"] == reader.num_bytes:
            return {key: side.get(key) for key in ("source", "tool", "options", "copied", "reencoded", "scaled")}
    return None


# ---- photos that are there twice


@dataclass(frozen=True)
class Copies:
    """Photos whose bytes are the same.

    Attributes:
        within: by set, how many of its photos are copies of an earlier one of the same set.
        across: [a][b]: how many photos of set a are in set b, too.
        groups: of each photo that is there more than once, all (set, number in the set).
    """

    within: list[int]
    across: list[list[int]]
    groups: list[list[tuple[int, int]]]


def find_copies(sets: Sequence[Photos], progress: Callable[[int, int], None] | None = None) -> Copies:
    """Find photos that are stored more than once, in one set or in several. Those are read, and compared by a digest of
    their bytes, whose checksum and size are those of another one; where checksums are not known, in a folder, a tar or
    a file without a side file: whose size alone is. 16 bytes of memory a photo.
    """
    starts = np.cumsum([0, *map(len, sets)])
    sizes = np.concatenate([photos.sizes for photos in sets]).astype(np.uint64)
    keys, known = sizes << np.uint64(32), np.zeros(len(sizes), bool)
    for start, photos in zip(starts, sets):
        if isinstance(photos, BetonReader) and (sums := sample_checksums(photos)) is not None:
            keys[start : start + len(photos)] |= sums
            known[start : start + len(photos)] = True
    there = np.flatnonzero(known)
    wanted = _shared(sizes) & ~known
    wanted[there[_shared(keys[there]) | np.isin(sizes[there], sizes[wanted])]] = True
    chosen = np.flatnonzero(wanted)
    digests = _digests(sets, starts, chosen, progress)
    order = np.argsort(digests, kind="stable")
    chosen, digests = chosen[order], digests[order]
    groups = [group for group in np.split(chosen, np.flatnonzero(digests[1:] != digests[:-1]) + 1) if len(group) > 1]
    within, across = [0] * len(sets), [[0] * len(sets) for _ in sets]
    told = []
    for group in groups:
        places = np.searchsorted(starts, group, side="right") - 1
        for place, count in (counts := Counter(places.tolist())).items():
            within[place] += count - 1
            for other in counts:
                across[place][other] += count * (other != place)
        told.append(list(zip(places.tolist(), (group - starts[places]).tolist())))
    return Copies(within, across, told)


def _shared(values: np.ndarray) -> np.ndarray:
    """Which of the values are there more than once, (N,) bool."""
    ordered = np.sort(values)
    return np.isin(values, np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))


def _digests(
    sets: Sequence[Photos], starts: np.ndarray, chosen: np.ndarray, progress: Callable[[int, int], None] | None
) -> np.ndarray:
    """A number for the content of each of the ``chosen`` photos, (C,) uint64; one that cannot be read is like no
    other.
    """

    def digest(number: int) -> int:
        place = int(np.searchsorted(starts, number, side="right")) - 1
        photos, i = sets[place], number - int(starts[place])
        shape, data = b"", b"unreadable %d" % number
        with suppress(FastSSLError, OSError):
            data = photos.encoded(i).tobytes()
            if isinstance(photos, BetonReader) and photos.modes[i] == MODE_RAW:  # which does not say how wide it is
                shape = b"%dx%d" % (photos.heights[i], photos.widths[i])
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=shape).digest(), "little")

    found: list[int] = []
    parts = np.split(chosen, range(_PART, len(chosen), _PART))
    tasks = Deadline(sets[0].path).map(
        lambda part: [digest(number) for number in part.tolist()], parts, available_cores(), lambda _: "at its photos"
    )
    with closing(tasks):
        for some in tasks:
            found += some
            if progress is not None and len(chosen):
                progress(len(found), len(chosen))
    return np.array(found, np.uint64)
