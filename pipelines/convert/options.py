"""What a conversion is told, and what it tells."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, SkipValidation

from fastssl.errors import FastSSLError
from fastssl.utils.deadline import STALL_MINUTES
from fastssl.utils.settings import Count, Natural, Whole, settings


class ConvertError(FastSSLError):
    """A conversion cannot start, or was stopped by a bad photo or by the disk."""


@settings(error=ConvertError)
class ConvertOptions:
    """What becomes of each photo. ``ConvertError``: a value out of range.

    Attributes:
        short_side: photos whose shorter side is longer are scaled down to it; None: no scaling. Nothing is ever scaled
            up.
        max_side: the same for the longer side, instead of ``short_side``. keep_size: no scaling at all.
        quality: JPEG quality, 1 to 100, of what has to be re-encoded (4:2:0; 4:4:4 from 95).
        store: 'jpeg', or 'raw' for decoded pixels (10 to 20 times larger, nothing to decode in training).
        workers: threads; None: one a CPU. limit: convert only this many photos, evenly spaced over the source.
        resume: go on where a stopped conversion of the same photos with the same options stood, and keep what is needed
            for that.
        on_bad: 'skip' lists bad photos in DST.rejects.jsonl, 'fail' stops at the first.
        stall_minutes: how long one photo, or the disk under DST, is waited for; a warning comes after the first minute,
            ``Stalled`` at the end. ``math.inf``: forever.
        part: (i, N): of those photos only every N-th, from the i-th on (counted from 0), see `shards`.
        automatic: no person asked for this file: who made it may make it again. Noted in the side file, no more.
    """

    short_side: Count | None = 256
    max_side: Count | None = None
    keep_size: bool = False
    quality: Annotated[Whole, Field(ge=1, le=100)] = 90
    store: Literal["jpeg", "raw"] = "jpeg"
    workers: Count | None = None
    limit: Count | None = None
    resume: bool = True
    on_bad: Literal["skip", "fail"] = "skip"
    stall_minutes: SkipValidation[float] = STALL_MINUTES
    part: tuple[Natural, Count] | None = None
    automatic: bool = False

    def __post_init__(self) -> None:
        if self.keep_size and self.max_side is not None:
            raise ConvertError("give max_side or keep_size, not both")
        if self.part is not None and self.part[0] >= self.part[1]:
            raise ConvertError(f"part is (i, N) with i of 0 .. N - 1, got {self.part}")

    @property
    def dealt(self) -> slice:
        """The ``part`` of a list."""
        return slice(None) if self.part is None else slice(self.part[0], None, self.part[1])

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that a photo of this size gets; the aspect ratio is kept to the nearest pixel."""
        limit = self.max_side or self.short_side
        side = max(height, width) if self.max_side else min(height, width)
        if self.keep_size or limit is None or side <= limit:
            return height, width
        return max(1, round(height * limit / side)), max(1, round(width * limit / side))

    def deciding(self) -> dict:
        """The options that decide about the bytes of each photo, and with ``part`` about those of the result."""
        free = ("workers", "resume", "on_bad", "stall_minutes", "automatic", "part")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass(frozen=True)
class ConvertSummary:
    """What :func:`convert` did.

    Attributes:
        path: the file. written: photos in it = copied (byte for byte) + reencoded. scaled: those that were scaled down.
        rejected: bad photos, listed in DST.rejects.jsonl. passed_over: files that are no photos, by kind (see
            `formats.kind_of`).
        resumed: photos, good or bad, that an earlier, stopped run had done already.
        classes: names, or None for photos without labels. bytes: size of the file. seconds: what this run took.
        files: those that were made: ``path``, or those of its pattern. split, notes: as of `Listing`.
    """

    path: Path
    written: int
    copied: int
    reencoded: int
    scaled: int
    rejected: int
    passed_over: dict[str, int]
    resumed: int
    classes: list[str] | None
    bytes: int
    seconds: float
    files: list[Path]
    split: str
    notes: list[str]

    @property
    def ignored(self) -> int:
        """Files that are no photos."""
        return sum(self.passed_over.values())


def chosen_photos(count: int, limit: int | None) -> np.ndarray:
    """Which of a listing's ``count`` photos are converted: all, or ``limit`` of them, evenly spaced. Ascending int64
    positions.
    """
    total = count if limit is None else min(limit, count)
    return np.arange(total) * count // max(1, total)
