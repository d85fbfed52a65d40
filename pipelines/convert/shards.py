"""A set in many files: DST-00000-of-00064.beton, ..., one after the other here, or each on another host.

Photo k goes into file k % N, so that each is a fair sample of the whole, and any number of hosts may share the work.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastssl._version import __version__
from fastssl.errors import counted
from fastssl.pipelines.convert.conversion import summary_of, whole_side_file
from fastssl.pipelines.convert.encode import COUNTS
from fastssl.pipelines.convert.options import ConvertOptions, ConvertSummary
from fastssl.pipelines.convert.sources import Listing

_SUMMED = (*COUNTS, "written", "rejected", "resumed", "bytes")


def shard_path(dst: str | os.PathLike, number: int | None, count: int) -> Path:
    """File ``number`` (from 0) of ``count``; None: the pattern of all."""
    place = "*" if number is None else f"{number:05d}"
    return Path(dst).with_name(f"{Path(dst).name.removesuffix('.beton')}-{place}-of-{count:05d}.beton")


def finished(path: Path, listing: Listing, options: ConvertOptions) -> ConvertSummary | None:
    """Of a file that is there, whole, and what this conversion would make; else None."""
    side = whole_side_file(path) if path.is_file() else None
    if side is None or not _made_so(side, listing, options) or side.get("part") != (options.part and [*options.part]):
        return None
    if side["rejected"] and options.on_bad == "fail":
        return None
    with suppress(KeyError):
        return summary_of(path, listing, side, side["samples"] + side["rejected"])
    return None


def warn_of_strangers(path: Path, beside: Sequence[Path], listing: Listing, options: ConvertOptions) -> None:
    """Of files ``beside`` one that was made here, which another host may have made of other photos."""
    there = [other for other in beside if other.is_file()]
    if strange := [other for other in there if not _made_so(whole_side_file(other), listing, options)]:
        many = f"{counted(len(strange), 'file')} made of other photos, or in another way, than {path.name}"
        warnings.warn(f"{strange[0]}: {many}; convert again what is out of date", stacklevel=3)


def summed(path: Path, done: Sequence[ConvertSummary]) -> ConvertSummary:
    """What is told of several files, ``path`` being their pattern."""
    sums: dict[str, Any] = {name: sum(getattr(one, name) for one in done) for name in _SUMMED}
    sums["deep"] = dict(sum((Counter(one.deep) for one in done), Counter()))
    return replace(done[0], path=path, files=[one.path for one in done], **sums)


def _made_so(side: dict[str, Any] | None, listing: Listing, options: ConvertOptions) -> bool:
    mine = {"fingerprint": listing.fingerprint, "options": options.deciding(), "tool": f"fastssl {__version__}"}
    return side is not None and all(side.get(key) == value for key, value in mine.items())
