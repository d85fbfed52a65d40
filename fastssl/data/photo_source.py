"""A folder or tar of photos in the place of a ``.beton`` file: ``photos/`` becomes ``photos.beton`` beside it, or a
file in the user's cache folder where that place cannot be written or the name is taken.

The side file says what it was made from (``fingerprint``: names, sizes and times of change) and that nobody asked for
it (``automatic``): such a file is made again when the photos have changed, and no other file is ever written over.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastssl._version import __version__
from fastssl.errors import FastSSLError, counted, printable
from fastssl.pipelines.beton.dataset import open_beton
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import side_path
from fastssl.pipelines.convert.conversion import convert, rejects_path, whole_side_file
from fastssl.pipelines.convert.formats import pillow_formats, remedies
from fastssl.pipelines.convert.options import ConvertOptions, chosen_photos
from fastssl.pipelines.convert.sources import SOURCE_ENDINGS, Listing, ListingRules, is_source, list_source
from fastssl.pipelines.convert.splits import split_path
from fastssl.utils.addresses import is_remote, shown
from fastssl.utils.deadline import Deadline
from fastssl.utils.patterns import has_pattern
from fastssl.utils.remote_cache import default_cache_dir

if TYPE_CHECKING:
    from fastssl.config.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """What is known of photos before they are converted.

    Attributes:
        photos: how many, damaged ones included.
        short_side: in pixels, the median (of a folder or tar: of some); None: none of them could be read.
        fingerprint: of the list of photos; None: the path is a ``.beton`` file, which stays what it is.
        shortened: half of a ``.beton`` file's photos or more are known to have been scaled down when it was made.
        splits: of a folder or tar that holds several; ``rules`` name the one that is meant. notes: what is to be said
            of the way in which the photos were taken.
    """

    path: Path
    photos: int
    short_side: float | None
    fingerprint: str | None = None
    shortened: bool = False
    rules: ListingRules | None = None
    splits: Sequence[str] = ()
    notes: Sequence[str] = ()


def look_at(path: str | os.PathLike, split: str = "train") -> Source:
    """Number and size of the photos at ``path``; a folder, an archive, ... is listed, and the headers of some photos
    are read. Of several splits ``split`` is looked at; what is learned from (train) takes all photos, also those that
    have no class. Raises FastSSLError where it is neither that nor what `open_beton` takes, or has no photos.
    """
    path = Path(path)
    if not is_source(path):
        with open_beton(path) as reader:
            short = float(np.median(np.minimum(*reader.shapes(reader.some()))))
            return Source(path, len(reader), short, shortened=_shortened(reader))
    deadline = Deadline(path)
    rules = ListingRules(keep_all=split == "train")
    with list_source(path, deadline, rules, prefer=split) as listing:
        sides = listed_sides(listing, deadline, 64)
        rules = replace(rules, split=split if listing.splits else "auto")
        about = (median(sides) if sides else None, listing.fingerprint, False, rules, listing.splits, listing.notes)
        return Source(path, len(listing), *about)


def listed_sides(listing: Listing, deadline: Deadline, most: int) -> list[int]:
    """The short sides, in pixels, of at most so many photos that are evenly spread over a listing, by their headers;
    without those whose header cannot be read, which the conversion will say.
    """

    def side(i: int) -> int:
        with warnings.catch_warnings(), suppress(Exception):  # decoders raise anything at all for damaged input
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(listing.read(i)), formats=pillow_formats()) as image:
                found: int = min(image.size)
                return found
        return 0

    some, names = chosen_photos(len(listing), most).tolist(), listing.names
    return list(filter(None, deadline.map(side, some, 1, lambda i: f"at {printable(names[i])}")))


def _shortened(reader: BetonReader) -> bool:
    """Whether half of the photos or more were scaled down when the files were made, as far as side files tell."""
    sides, notes, total = np.minimum(*reader.shapes(reader.some())), list[dict[str, Any]](), 0
    with suppress(FastSSLError):
        notes = reader.side_notes()
    # Older side files do not count them: half of the photos or more have the very same, largest side.
    older = "reencoded" if np.median(sides) == sides.max() else ""
    for note in notes:
        scaled = note.get("scaled", note.get(older))
        total += scaled if isinstance(scaled, int) else 0
    return 2 * total >= len(reader)


def side_for(recipe: Recipe) -> int:
    """The short side, in pixels, to which larger photos are scaled down for a recipe: no more than its views can show.

    Twice the largest view: the smallest crops, a fifth of the photo, are then hardly enlarged. For 224 px that would be
    three times the work of decoding the usual 256 px: with 384, twice that work, five of six crops are not enlarged.
    Never less than the probe's crop needs.
    """
    largest = max(spec.size for spec in recipe.views)
    return max(min(2 * largest, 384), largest, round(recipe.probe.size / recipe.probe.crop))


def as_beton(
    source: Source,
    short_side: int,
    *,
    workers: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The ``.beton`` file of ``source``: itself, or the one that was made of it before, or one that is made now. Any
    number of processes may call this at once: one converts, the others wait and find the file. Raises FastSSLError
    where there is nothing to convert, all photos are damaged, or no place can be written.

    Args:
        short_side: in pixels; photos whose shorter side is longer are scaled down to it.
        workers, progress: as of ``convert``.
        say: is told in one line what was made or found.
    """
    if source.fingerprint is None:
        return source.path
    remote = is_remote(source.path)
    path = Path(shown(source.path) if remote else os.path.abspath(source.path))
    options = ConvertOptions(short_side=short_side, workers=workers, automatic=True)
    wanted = {
        "source": path.name,
        "fingerprint": source.fingerprint,
        "options": options.deciding(),
        "tool": f"fastssl {__version__}",
    }

    def holds(place: Path) -> bool:
        """Whether the file is there, whole as far as its tables tell, and what a conversion now would make."""
        side = (whole_side_file(place) if place.is_file() else None) or {}
        if any(side.get(key) != value for key, value in wanted.items() if key != "source"):
            return False
        say(f"{shown(source.path)}: converted before, into {place}{_rejected(side.get('rejected') or 0, place)}")
        return True

    places = _places(path, options, source.rules.split if source.rules and source.splits else "")[remote:]
    for place in places:
        if holds(place):
            return place
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
        with _alone(place, say) as alone:
            if alone and holds(place):
                return place
            if not alone or not _may_write(place, wanted):
                continue
            done = convert(source.path if remote else path, place, options, progress, rules=source.rules)
        classes = "no labels" if done.classes is None else counted(len(done.classes), "class")
        ignored = f"; {counted(done.ignored, 'other file')} passed over" if done.ignored else ""
        ignored += "".join(f"; {line}" for line in remedies(done.passed_over))
        say(
            f"{shown(source.path)}: {counted(done.written, 'photo')}, {classes}, now also in {done.path} "
            f"({done.bytes / 1e6:,.1f} MB, short side at most {short_side} px), which is used as long as they stay as "
            f"they are{_rejected(done.rejected, done.path)}{ignored}"
        )
        return place
    nowhere = f"{places[0]} cannot" if remote else f"neither {places[0]} nor {places[1]} can"
    raise FastSSLError(
        f"{shown(source.path)}: {nowhere} be written; convert it with `fastssl convert-imagenet` to where there is room"
    )


def _places(path: Path, options: ConvertOptions, split: str) -> tuple[Path, Path]:
    """``photos/`` or ``photos.tar`` -> ``photos.beton`` in the same folder, of a split ``photos-train.beton``; and in
    the user's cache folder, one name for each place and way of converting. What stands for several files in a pattern
    becomes ``_``.
    """
    endings = [len(ending) for ending in SOURCE_ENDINGS if path.name.lower().endswith(ending)]
    name = path.name[: -max(endings)] if endings else path.name
    name = re.sub(r"\{[^{}]*\}|\[[^][]*\]|[][{}*?]", "_", name) if has_pattern(path) else name
    key = hashlib.sha256(f"{path} {options.deciding()}".encode("utf-8", "surrogateescape")).hexdigest()[:12]
    beside = path.parent / f"{name or 'photos'}.beton"
    beside = split_path(beside, split) if split else beside
    return beside, default_cache_dir() / "photos" / f"{beside.stem}-{key}.beton"


def _may_write(place: Path, wanted: dict[str, Any]) -> bool:
    """Whether nothing is there, or a file that nobody asked for, made the same way from these photos as they were."""
    if not os.access(place.parent, os.W_OK):
        return False
    if not os.path.lexists(place) and not os.path.lexists(side_path(place)):
        return True
    side = whole_side_file(place) or {}  # `photos/` and `photos.tar` would both have photos.beton
    return side.get("automatic") is True and all(side.get(key) == wanted[key] for key in ("options", "source"))


@contextmanager
def _alone(place: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold ``place`` against other processes, waiting for theirs; not on disks without locks. False: not writable."""
    path, waits = place.with_name(f".{place.name}.lock"), False
    while True:
        try:
            file = open(path, "a")  # noqa: SIM115 (held open)
        except OSError:
            yield False
            return
        with suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waits:
                    say(f"waiting for another process that makes {place}")
                waits = True
                fcntl.flock(file, fcntl.LOCK_EX)
        # Who held it takes the file away: a lock on what is no longer there keeps nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    with file:
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def _rejected(count: int, place: Path) -> str:
    return f"; {count:,} rejected (see {rejects_path(place)})" if count else ""
