"""A set in many files: DST-00000-of-00064.beton, ..., one after the other here, or each on another host.

Photo k goes into file k % N, so that each is a fair sample of the whole, and any number of hosts may share the work.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastssl._version import __version__
from fastssl.errors import counted
from fastssl.pipelines.convert.conversion import as_sources, convert, require_target, whole_side_file
from fastssl.pipelines.convert.encode import COUNTS
from fastssl.pipelines.convert.options import ConvertError, ConvertOptions, ConvertSummary, chosen_photos
from fastssl.pipelines.convert.sources import Listing, list_source
from fastssl.utils.deadline import Deadline

_SUMMED = (*COUNTS, "written", "rejected", "resumed", "bytes")


def shard_path(dst: str | os.PathLike, number: int | None, count: int) -> Path:
    """File ``number`` (from 0) of ``count``; None: the pattern of all."""
    place = "*" if number is None else f"{number:05d}"
    return Path(dst).with_name(f"{Path(dst).name.removesuffix('.beton')}-{place}-of-{count:05d}.beton")


def convert_shards(
    src: str | os.PathLike | Sequence[str | os.PathLike] | Listing,
    dst: str | os.PathLike,
    count: int,
    options: ConvertOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    only: int | None = None,
) -> ConvertSummary:
    """Convert the photos of ``src`` as `convert` does, into ``count`` files named after ``dst`` (``only``: the one of
    this number); those that an earlier run has finished stay, with ``options.resume``. Returns their sum, ``path``
    being their pattern. Raises what `convert` does.
    """
    options, started = options or ConvertOptions(), time.monotonic()
    sources = as_sources(src.source if isinstance(src, Listing) else src)
    numbers = range(count) if only is None else [only]
    parts = {shard_path(dst, k, count): replace(options, part=(k, count)) for k in numbers}
    for path in parts:
        require_target(path, sources)
    done: list[ConvertSummary] = []
    before = 0  # photos of files that are done

    def told(now: int, _: int) -> None:
        if progress is not None:
            progress(before + now, total)

    deadline = Deadline(sources[0], options.stall_minutes)
    listed = nullcontext(src) if isinstance(src, Listing) else list_source(sources, deadline, scratch=Path(dst).parent)
    with listed as listing:
        photos = chosen_photos(len(listing), options.limit)
        if (few := len(photos)) < count:
            raise ConvertError(f"{listing.source}: {counted(few, 'photo')} for {count} files; make {few} at most")
        total = sum(len(photos[part.dealt]) for part in parts.values())
        for path, part in parts.items():
            there = finished(path, listing, part) if options.resume else None
            done.append(there or convert(listing, path, part, told))
            before += len(photos[part.dealt])
            told(0, total)
    if only is not None:  # others may be of another host, whose photos were not these
        others = [other for k in range(count) if (other := shard_path(dst, k, count)).is_file()]
        if strange := [other for other in others if not _made_so(whole_side_file(other), listing, options)]:
            many = f"{counted(len(strange), 'file')} made of other photos, or in another way, than {path.name}"
            warnings.warn(f"{strange[0]}: {many}; convert again what is out of date", stacklevel=2)
    sums: dict[str, Any] = {name: sum(getattr(one, name) for one in done) for name in _SUMMED}
    sums["deep"] = dict(sum((Counter(one.deep) for one in done), Counter()))
    sums |= {"files": [*parts], "passed_over": listing.passed_over, "seconds": time.monotonic() - started}
    return replace(done[0], path=path if only is not None else shard_path(dst, None, count), **sums)


def _made_so(side: dict[str, Any] | None, listing: Listing, options: ConvertOptions) -> bool:
    mine = {"fingerprint": listing.fingerprint, "options": options.deciding(), "tool": f"fastssl {__version__}"}
    return side is not None and all(side.get(key) == value for key, value in mine.items())


def finished(path: Path, listing: Listing, options: ConvertOptions) -> ConvertSummary | None:
    """Of a file that is there, whole, and what this conversion would make; else None."""
    side = whole_side_file(path) if path.is_file() else None
    if side is None or not _made_so(side, listing, options) or side.get("part") != (options.part and [*options.part]):
        return None
    if not side.keys() >= {*COUNTS, "deep"}:  # of before these were counted
        return None
    if side["rejected"] and options.on_bad == "fail":
        return None
    known: dict[str, Any] = {name: side[name] for name in (*COUNTS, "deep", "rejected", "bytes")}
    known |= {"written": side["samples"], "resumed": side["samples"] + side["rejected"], "classes": listing.classes}
    known |= {"split": listing.split, "notes": listing.notes}
    return ConvertSummary(path=path, passed_over={}, seconds=0.0, files=[path], **known)
