"""One command, several files: a source with splits becomes a file for each, DST-train.beton, DST-val.beton, ...; and
each of them several, where that is asked for (shards.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fastssl.errors import counted
from fastssl.pipelines.convert.conversion import as_sources, convert, require_target
from fastssl.pipelines.convert.options import ConvertError, ConvertOptions, ConvertSummary, chosen_photos
from fastssl.pipelines.convert.shards import finished, shard_path, summed, warn_of_strangers
from fastssl.pipelines.convert.sources import ListingRules, list_splits
from fastssl.utils.deadline import Deadline


def split_path(dst: str | os.PathLike, split: str) -> Path:
    """``photos.beton`` -> ``photos-train.beton``."""
    return Path(dst).with_name(f"{Path(dst).name.removesuffix('.beton')}-{split}.beton")


def convert_splits(
    src: str | os.PathLike | Sequence[str | os.PathLike],
    dst: str | os.PathLike,
    options: ConvertOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    rules: ListingRules | None = None,
    shards: tuple[int | None, int] | None = None,
) -> list[ConvertSummary]:
    """Convert the photos of ``src`` as `convert` does: into ``dst``, or, where there are several splits and ``rules``
    name none, into a file for each. ``shards``: (k, N) into the k-th (from 0) of N files of each split, (None, N) into
    all of them, which are summed up as one, ``path`` being their pattern. Of several files those that an earlier run
    has finished stay, with ``options.resume``. Raises what `convert` does, and ``LabelError``.
    """
    options, sources, mark = options or ConvertOptions(), as_sources(src), time.monotonic()
    require_target(Path(dst), sources)
    listings = list_splits(sources, Deadline(sources[0], options.stall_minutes), rules, Path(dst).parent)
    only, count = shards or (None, 1)
    summaries: list[ConvertSummary] = []
    with next(iter(listings.values())):  # they share their sources
        paths = [split_path(dst, split) if len(listings) > 1 else Path(dst) for split in listings]
        photos = [chosen_photos(len(listing), options.limit) for listing in listings.values()]
        jobs: list[dict[Path, ConvertOptions]] = [{path: options} for path in paths]
        if shards is not None:
            parts = {k: replace(options, part=(k, count)) for k in (range(count) if only is None else [only])}
            jobs = [{shard_path(path, k, count): part for k, part in parts.items()} for path in paths]
        for listing, some, job in zip(listings.values(), photos, jobs):
            if (few := len(some)) < count:
                whose = f" of {listing.split}" if listing.split else ""
                raise ConvertError(
                    f"{listing.source}: {counted(few, 'photo')}{whose} for {count} files; make {few} at most"
                )
            for path in job:
                require_target(path, sources)
        total = sum(len(some[part.dealt]) for some, job in zip(photos, jobs) for part in job.values())
        before = 0  # photos of files that are done

        def told(now: int, _: int) -> None:
            if progress is not None:
                progress(before + now, total)

        for listing, whole, some, job in zip(listings.values(), paths, photos, jobs):
            done: list[ConvertSummary] = []
            for path, part in job.items():
                there = finished(path, listing, part) if options.resume and (shards or len(jobs) > 1) else None
                done.append(there or convert(listing, path, part, told))
                before += len(some[part.dealt])
                told(0, total)
            if only is not None:
                warn_of_strangers(path, [shard_path(whole, k, count) for k in range(count)], listing, options)
            one = done[0] if shards is None or only is not None else summed(shard_path(whole, None, count), done)
            summaries.append(replace(one, seconds=time.monotonic() - mark))
            mark = time.monotonic()
    return summaries
