"""What a conversion is told, and what it tells."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, SkipValidation

from fastssl.errors import FastSSLError, counted
from fastssl.utils.deadline import STALL_MINUTES
from fastssl.utils.settings import Count, Natural, Real, Whole, settings


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
        range: (low, high), black and white of all photos of more than 8 bits; None: each one's own (see deep.py).
        icc: 'ignore' colour profiles, or take the pictures to 'srgb' by them.
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
    range: tuple[Real, Real] | None = None
    icc: Literal["ignore", "srgb"] = "ignore"
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
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ConvertError(f"range is (low, high), got {self.range[0]:g}, {self.range[1]:g}")

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
        found = {name: value for name, value in asdict(self).items() if name not in free}
        # As JSON has it; and files that were made before there was this choice are as if it had not been made.
        if found.pop("range"):
            found["range"] = list(self.range or ())
        return {name: value for name, value in found.items() if (name, value) != ("icc", "ignore")}


@dataclass(frozen=True)
class ConvertSummary:
    """What :func:`convert` did.

    Attributes:
        path: the file. written: photos in it = copied (byte for byte) + reencoded. scaled: those that were scaled down.
        rejected: bad photos, listed in DST.rejects.jsonl. passed_over: files that are no photos, by kind (see
            `formats.kind_of`).
        repaired: JPEGs whose headers alone decoders complain of. animated: those of which the first picture was taken.
        profile_ignored, profile_applied, profile_broken: those with a colour profile other than sRGB. deep: how many of
            more than 8 bits were mapped from which range.
        resumed: photos, good or bad, that an earlier, stopped run had done already.
        classes: names, or None for photos without labels. bytes: size of the file. seconds: what this run took.
        files: those that were made: ``path``, or those of its pattern. split, notes: as of `Listing`.
    """

    path: Path
    written: int
    copied: int
    reencoded: int
    scaled: int
    repaired: int
    animated: int
    profile_ignored: int
    profile_applied: int
    profile_broken: int
    deep: dict[str, int]
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

    def remarks(self) -> list[str]:
        """What a user should know about the photos that are in it, a line each."""
        said = []
        if self.repaired:
            what = "decoders complain, of headers or stray bytes alone, so that no pixel is missing: repaired"
            said.append(f"{counted(self.repaired, 'photo')} of which {what}")
        if self.animated:
            said.append(f"{counted(self.animated, 'file')} with several pictures: the first one was taken")
        if self.deep:
            ranges = ", ".join(f"{count:,} from {range}" for range, count in self.deep.items())
            how = f"mapped to 8, {ranges} (--range LOW,HIGH sets one for all)"
            said.append(f"{counted(sum(self.deep.values()), 'photo')} of more than 8 bits: {how}")
        profiles = {
            "with a colour profile other than sRGB: ignored; --icc srgb converts": self.profile_ignored,
            "with a colour profile other than sRGB: converted to it": self.profile_applied,
            "with a colour profile that is broken, or not of its kind of colours: ignored": self.profile_broken,
        }
        said += [f"{counted(count, 'photo')} {what}" for what, count in profiles.items() if count]
        return said


def chosen_photos(count: int, limit: int | None) -> np.ndarray:
    """Which of a listing's ``count`` photos are converted: all, or ``limit`` of them, evenly spaced. Ascending int64
    positions.
    """
    total = count if limit is None else min(limit, count)
    return np.arange(total) * count // max(1, total)
