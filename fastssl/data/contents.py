"""What is in a set of photos: how many of which class and size, what was rejected, and which photos are there twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastssl.data.photo_source import listed_sides
from fastssl.errors import BetonError, FastSSLError, JpegError
from fastssl.pipelines.beton.dataset import open_beton
from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.verify import sample_checksums
from fastssl.pipelines.convert.conversion import rejects_path
from fastssl.pipelines.convert.encode import encode_photo
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.convert.sources import Listing, is_source, list_splits
from fastssl.utils.addresses import is_remote, shown
from fastssl.utils.cores import available_cores
from fastssl.utils.deadline import Deadline

#: Photos of a folder or tar whose headers are read for their sizes; photos that a thread reads at a time.
_MEASURED, _PART = 256, 64


class ListedPhotos:
    """The photos of a folder or tar, with those parts of `BetonReader` that are asked for here. ``path``: with the
    split's name at its end, where there is one.
    """

    def __init__(self, listing: Listing):
        self.listing, self.sizes, self.classes = listing, listing.sizes, listing.classes
        self.path = Path(shown(listing.source), listing.split)
        self.labels = None if listing.classes is None else listing.labels

    def __len__(self) -> int:
        return len(self.listing)

    def encoded(self, i: int) -> np.ndarray:
        """The bytes of photo ``i``'s file, 1-D uint8."""
        return np.frombuffer(self.listing.read(i), np.uint8)

    def decode(self, i: int) -> np.ndarray:
        """Photo ``i`` as a conversion would store it, (H, W, 3) uint8. ``JpegError``: it would be rejected."""
        try:
            photo = encode_photo(self.listing.read(i), ConvertOptions(store="raw"))
        except Exception as error:  # decoders raise anything at all for damaged input
            raise JpegError(f"{self.path}: {self.listing.names[i]}: {error}") from None
        return np.frombuffer(photo.data, np.uint8).reshape(photo.height, photo.width, 3)


Photos = BetonReader | ListedPhotos


@contextmanager
def open_photos(path: str | os.PathLike) -> Iterator[list[Photos]]:
    """The photos of a ``.beton`` file or a set of them; of a folder or tar, a list each where it holds train, val and
    test. Raises FastSSLError where there are none.
    """
    deadline = Deadline(shown(path))
    if not is_source(path):
        # A download has a patience of its own, and ends at once with the thread that asked for it.
        found = open_beton(path) if is_remote(path) else deadline.call(lambda: open_beton(path), "at its tables")
        with found as reader:
            if reader.streamed:
                raise BetonError(f"{shown(path)}: larger than the cache ($FASTSSL_CACHE_GB); name some files at a time")
            yield [reader]
        return
    splits = list_splits(path, deadline)
    with ExitStack() as opened:
        yield [ListedPhotos(opened.enter_context(listing)) for listing in splits.values()]


@dataclass(frozen=True)
class Contents:
    """What is in photos that `open_photos` opened.

    Attributes:
        photos: how many. classes: photos of each class, in the order of the labels; None: no labels.
        short_side: in pixels: 'p5', 'median', 'p95'; 'below_224': how many photos, of those that were 'measured': all,
            or some of a folder or tar. None: none could be read.
        bytes: of all photos as they are stored; None: not known before they are read. raw: photos stored as pixels;
            None: not stored yet.
        rejects: photos of a folder, tar or its conversion that were rejected, by kind of reason. passed_over: files
            that are no photos, by kind (see `formats.kind_of`).
    """

    path: Path
    photos: int
    classes: dict[str, int] | None
    short_side: dict[str, int] | None
    bytes: int | None
    raw: int | None
    rejects: dict[str, int]
    passed_over: dict[str, int] = field(default_factory=dict)


def look_into(photos: Photos) -> Contents:
    """Count what is there; no picture is decoded."""
    classes = None if photos.labels is None else _by_name(photos.labels, photos.classes or [])
    if isinstance(photos, ListedPhotos):
        reasons: Iterable[str]
        listing, sides = photos.listing, np.array(listed_sides(photos.listing, Deadline(photos.path), _MEASURED))
        size, raw = None if (photos.sizes < 0).any() else int(photos.sizes.sum()), None
        reasons, passed = [reason for _, reason in listing.rejected], listing.passed_over
    else:
        sides = np.minimum(photos.heights, photos.widths)
        size, raw = int(photos.sizes.sum()), int((photos.modes == MODE_RAW).sum())
        reasons, passed = _rejected(photos.files), {}
    rejects = dict(Counter(map(kind_of_reason, reasons)).most_common())
    return Contents(photos.path, len(photos), classes, _spread(sides), size, raw, rejects, passed)


def _by_name(labels: np.ndarray, names: list[str]) -> dict[str, int]:
    named = Counter(dict.fromkeys(names, 0))  # classes whose photos are all gone, too
    for label, count in zip(*(found.tolist() for found in np.unique(labels, return_counts=True))):
        named[names[label] if 0 <= label < len(names) else f"class {label}"] += count
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


def _rejected(files: Sequence[Path]) -> Iterable[str]:
    """The reasons in the lists that conversions left beside the files; lines that are not theirs are left out."""
    for listed in map(rejects_path, files):
        if listed.is_file():  # a pipe of that name would wait for its writer
            with listed.open(encoding="utf-8", errors="replace") as file:
                for line in iter(lambda: file.readline(1 << 16), ""):
                    with suppress(ValueError, KeyError, TypeError, RecursionError):
                        yield str(json.loads(line)["reason"])


# ---- photos that are there twice

#: Photos whose bytes are the same: (set, number in it) of each.
Group = list[tuple[int, int]]


def find_copies(sets: Sequence[Photos], progress: Callable[[int, int], None] | None = None) -> list[Group]:
    """Photos that are stored more than once, in one set or in several. Those are read, and compared by a digest of
    their bytes, whose size and checksum are those of another one; where checksums are not known (of folders, tars,
    files without a side file) whose size is. Some 50 bytes of memory a photo.
    """
    starts = np.cumsum([0, *map(len, sets)])
    sizes = np.concatenate([photos.sizes for photos in sets]).astype(np.uint64)
    keys, known = sizes << np.uint64(32), np.zeros(len(sizes), bool)
    for start, photos in zip(starts, sets):
        for first, file in zip(photos.starts, photos.files) if isinstance(photos, BetonReader) else ():
            with BetonReader(file) as reader:
                sums = sample_checksums(reader)
            if sums is not None:
                part = slice(start + first, start + first + len(sums))
                keys[part], known[part] = keys[part] | sums, True
    there = np.flatnonzero(known)
    wanted = _shared(sizes) & ~known
    wanted[there[_shared(keys[there]) | np.isin(sizes[there], sizes[wanted])]] = True
    chosen, found = np.flatnonzero(wanted), list[int]()

    def digest(number: int) -> int:
        """One that cannot be read is like no other."""
        place = int(np.searchsorted(starts, number, "right")) - 1
        photos, i = sets[place], number - int(starts[place])
        shape, data = b"", b"unreadable %d" % number
        with suppress(FastSSLError, OSError):
            data = photos.encoded(i).tobytes()
            if isinstance(photos, BetonReader) and photos.modes[i] == MODE_RAW:  # pixels do not say how wide they are
                shape = b"%dx%d" % (photos.heights[i], photos.widths[i])
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=shape).digest(), "little")

    parts = np.split(chosen, range(_PART, len(chosen), _PART))
    work = Deadline(sets[0].path).map(lambda part: list(map(digest, part.tolist())), parts, available_cores(), str)
    with closing(work):
        for some in work:
            found += some
            if progress is not None and len(chosen):
                progress(len(found), len(chosen))
    digests = np.array(found, np.uint64)
    order = np.argsort(digests, kind="stable")
    groups = np.split(chosen[order], np.flatnonzero(np.diff(digests[order])) + 1)
    groups = [group for group in groups if len(group) > 1]
    places = [np.searchsorted(starts, group, "right") - 1 for group in groups]
    return [list(zip(place.tolist(), (group - starts[place]).tolist())) for place, group in zip(places, groups)]


def _shared(values: np.ndarray) -> np.ndarray:
    """Which of the values are there more than once, (N,) bool."""
    ordered = np.sort(values)
    return np.isin(values, np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))


def count_copies(groups: Sequence[Group], sets: int) -> tuple[list[int], list[list[int]]]:
    """(within, across): how many photos of each set are copies of an earlier one of it; and [a][b]: how many photos of
    set a are in set b, too.
    """
    within, across = [0] * sets, [[0] * sets for _ in range(sets)]
    for group in groups:
        for place, count in (counts := Counter(place for place, _ in group)).items():
            within[place] += count - 1
            for other in counts:
                across[place][other] += count * (other != place)
    return within, across
