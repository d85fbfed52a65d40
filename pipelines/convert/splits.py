"""A source with splits becomes a file for each: DST-train.beton, DST-val.beton, ..."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fastssl.pipelines.convert.conversion import as_sources, convert, require_target
from fastssl.pipelines.convert.options import ConvertOptions, ConvertSummary, chosen_photos
from fastssl.pipelines.convert.shards import convert_shards, finished
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
    name none, into a file for each, of which those that an earlier run has finished stay, with ``options.resume``.
    ``shards``: (number or None for all, count) for `convert_shards` of each. Raises what `convert` does, and
    ``LabelError``.
    """
    options, sources, mark = options or ConvertOptions(), as_sources(src), time.monotonic()
    require_target(Path(dst), sources)
    listings = list_splits(sources, Deadline(sources[0], options.stall_minutes), rules, Path(dst).parent)
    with next(iter(listings.values())):  # they share their sources
        several, part = len(listings) > 1, slice(shards and shards[0], None, shards[1] if shards else 1)
        paths = [split_path(dst, split) if several else Path(dst) for split in listings]
        for path in paths:
            require_target(path, sources)
        photos = [len(chosen_photos(len(listing), options.limit)[part]) for listing in listings.values()]
        done: list[ConvertSummary] = []
        for k, (path, listing) in enumerate(zip(paths, listings.values())):

            def told(now: int, _: int, before: int = sum(photos[:k])) -> None:
                if progress is not None:
                    progress(before + now, sum(photos))

            if shards:
                summary = convert_shards(listing, path, shards[1], options, told, only=shards[0])
            elif several and options.resume and (there := finished(path, listing, options)):
                summary = there
                told(photos[k], 0)
            else:
                summary = convert(listing, path, options, told)
            done.append(replace(summary, seconds=time.monotonic() - mark))
            mark = time.monotonic()
    return done
