"""Is a long run steady? Verdicts on what was seen of it from outside, each with its numbers and its limit.

What the limits stand on was measured on runs of MobileNet-sized networks on a CPU (``benchmarks/results/soak``): behind
the first third of a run its memory is a flat line to 0.1 MB, but for steps of 0.5 to 2.5 MB, some minutes apart, when
the heap finds no gap for a block. So a leak of 1 MB a minute shows within two minutes, but only to a measure that steps
do not fool: see ``creep``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastssl.benchmarks.studies.vitals import Sample

MB = 2**20
#: An hour's growth that a run of 100 hours can bear: 1 GB. That is what half an hour or more can tell; within minutes
#: some steps of the heap look like a slope of 10 to 20 MB an hour, and what passes 30 is none of them. A leak of 1 MB a
#: minute is 60.
MEMORY_MB_PER_HOUR, MEMORY_MB_PER_HOUR_SHORT = 10.0, 30.0
_LONG = 1800.0
#: Growth of the last third over the first, whatever its form: what leaks in a few large pieces has no slope to see.
MEMORY_SHARE = 0.03
#: Rate of the last third over that of the first; what remains of sharing the processor's caches and clock is below
#: that.
RATE_LAST_OF_FIRST = 0.85
#: Slowest window over the median.
RATE_WORST = 0.5
#: Probes that belong to the warm-up; a run without so many was too short to judge.
PROBES = 2
#: Memory is read off block by block: the median of a block passes over what a checkpoint or a probe takes for a moment.
_BLOCKS = 24


@dataclass(frozen=True)
class Verdict:
    """One line of the judgement.

    Attributes:
        name: what was judged.
        passed: whether it is within its limit.
        words: the numbers and the limit, for a reader.
        figures: the same numbers by name.
    """

    name: str
    passed: bool
    words: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """Some seconds of training.

    Attributes:
        seconds: when it ended, since the watch began.
        pair_per_s: source pictures a second of training; probes between epochs are not part of it.
        denied: share of the time in which the first thread stood ready and the cores worked for others.
    """

    seconds: float
    pair_per_s: float
    denied: float

    @property
    def granted_pair_per_s(self) -> float:
        """The rate in the time that the process was given."""
        return self.pair_per_s / max(1e-9, 1 - self.denied)


def after_warmup(samples: Sequence[Sample]) -> list[Sample]:
    """The last two thirds of the watched time, or what follows the second probe if that came later: imports, the first
    steps and the first of everything that comes again and again are over by then.
    """
    return [
        sample
        for sample in samples
        if sample.seconds >= samples[-1].seconds / 3 and (sample.probes >= PROBES or samples[-1].probes < PROBES)
    ]


def thirds(values: Sequence) -> tuple[Sequence, Sequence, Sequence]:
    """Three consecutive parts, each at least one long if there are three values."""
    cut = len(values) // 3
    return values[:cut], values[cut : len(values) - cut], values[len(values) - cut :]


def slopes(seconds: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """All slopes between two points, ascending; float64 (N (N - 1) / 2,). Their median is Theil's and Sen's line (Sen,
    JASA 63, 1968).
    """
    x, y = np.asarray(seconds, float), np.asarray(values, float)
    first, second = np.triu_indices(len(x), 1)
    return np.sort((y[second] - y[first]) / (x[second] - x[first]))


def blocks(seconds: Sequence[float], values: Sequence[float], count: int = _BLOCKS) -> tuple[list[float], list[float]]:
    """(mean time, median value) of ``count`` consecutive parts, or of as many as there are values."""
    parts = [part for part in np.array_split(np.arange(len(seconds)), min(count, len(seconds))) if len(part)]
    x, y = np.asarray(seconds, float), np.asarray(values, float)
    return [float(x[part].mean()) for part in parts], [float(np.median(y[part])) for part in parts]


def creep(seconds: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(lower quartile, median) of the slopes between blocks, in units a second.

    What leaks at every step or epoch gives all slopes the same sign, and the quartile is the leak. One to three steps
    of the heap leave a quarter or more of the pairs without a step between them, and the quartile is 0; the median,
    which the Theil-Sen line takes, would already see two steps.
    """
    found = slopes(*blocks(seconds, values))
    return float(np.quantile(found, 0.25)), float(np.median(found))


def memory_limit(seconds: float) -> float:
    """MB an hour that pass when ``seconds`` were judged: 30 up to ten minutes, 10 from half an hour on."""
    return min(MEMORY_MB_PER_HOUR_SHORT, max(MEMORY_MB_PER_HOUR, MEMORY_MB_PER_HOUR * _LONG / max(seconds, 1.0)))


def memory(samples: Sequence[Sample], name: str = "memory", attribute: str = "own_bytes") -> Verdict:
    """Flat: neither creeping nor grown by much."""
    seen = [sample for sample in after_warmup(samples) if getattr(sample, attribute) is not None]
    if len(seen) < 6:
        return Verdict(name, False, f"{len(seen)} samples after warm-up tell nothing; let it run longer")
    seconds, values = [sample.seconds for sample in seen], [getattr(sample, attribute) / MB for sample in seen]
    lower, middle = (3600 * slope for slope in creep(seconds, values))
    first, _, last = thirds(values)
    size, grown = float(np.median(first)), float(np.median(last)) - float(np.median(first))
    share = grown / max(size, 1e-9)
    limit = memory_limit(seconds[-1] - seconds[0])
    passed = lower <= limit and share <= MEMORY_SHARE
    words = (
        f"{size:.1f} MB after warm-up, creeps by {lower:+.1f} MB an hour (limit {limit:.0f}; Theil-Sen {middle:+.1f}), "
        f"{100 * lower / max(size, 1e-9):+.2f} % of its size; last third {grown:+.2f} MB = {100 * share:+.2f} "
        f"% over the first (limit {100 * MEMORY_SHARE:g} %)"
    )
    figures = {
        "mb": size,
        "mb_per_hour": lower,
        "limit_mb_per_hour": limit,
        "theil_sen_mb_per_hour": middle,
        "grown_mb": grown,
        "grown_share": share,
    }
    return Verdict(name, passed, words, figures)


def count(samples: Sequence[Sample], name: str, attribute: str) -> Verdict:
    """The number of something is constant: what there is at least, in the last third, is no more than in the first.

    At least, because a probe has threads and files of its own while it lasts; what stays behind it raises the floor.
    """
    seen = [getattr(sample, attribute) for sample in after_warmup(samples)]
    if len(seen) < 6:
        return Verdict(name, False, f"{len(seen)} samples after warm-up tell nothing; let it run longer")
    first, _, last = thirds(seen)
    words = (
        f"{min(first)} at least in the first third, {min(last)} in the last (limit: no more); at most {max(first)} "
        f"and {max(last)}"
    )
    return Verdict(name, min(last) <= min(first), words, {"first": min(first), "last": min(last), "most": max(seen)})


def windows(
    samples: Sequence[Sample], rows: Sequence[dict[str, Any]], batch_size: int, number: int = 30, least: float = 5.0
) -> list[Window]:
    """Cut the time after warm-up into at most ``number`` windows of at least ``least`` seconds, ends at lines of
    metrics.jsonl.

    Args:
        rows: the lines of kind ``step``, whose ``seconds`` are those of training.
        batch_size: source pictures a step.
    """
    trained = {row["step"]: row["seconds"] for row in rows}
    seen = [sample for sample in after_warmup(samples) if sample.step in trained]
    if not seen:
        return []
    length = max(least, (seen[-1].seconds - seen[0].seconds) / number)
    edges = [seen[0]]
    for sample in seen:
        if sample.seconds - edges[-1].seconds >= length and sample.step > edges[-1].step:
            edges.append(sample)
    found = []
    for one, other in itertools.pairwise(edges):
        seconds = max(1e-9, trained[other.step] - trained[one.step])
        denied = (
            0.0
            if None in (one.waiting_s, other.waiting_s)
            else (other.waiting_s - one.waiting_s) / (other.seconds - one.seconds)
        )
        found.append(Window(other.seconds, batch_size * (other.step - one.step) / seconds, min(max(denied, 0.0), 0.99)))
    return found


def rate(found: Sequence[Window]) -> list[Verdict]:
    """Pictures a second: the last third against the first, and the slowest window against the median."""
    if len(found) < 6:
        words = f"{len(found)} windows with progress after warm-up tell nothing; let it run longer"
        return [Verdict("rate", False, words), Verdict("worst window", False, words)]
    granted = [window.granted_pair_per_s for window in found]
    first, _, last = thirds(granted)
    before, after, middle = float(np.median(first)), float(np.median(last)), float(np.median(granted))
    wall = [window.pair_per_s for window in found]
    wall_first, _, wall_last = thirds(wall)
    denied = float(np.mean([window.denied for window in found]))
    kept, worst = after / max(before, 1e-9), min(granted) / max(middle, 1e-9)
    steady = Verdict(
        "rate",
        kept >= RATE_LAST_OF_FIRST,
        f"{before:,.1f} pair/s in the first third, {after:,.1f} in the last: {kept:.3f} of it (limit "
        f"{RATE_LAST_OF_FIRST:g}); by the clock, "
        f"waiting for cores that worked for others included ({100 * denied:.1f} % of the time): "
        f"{np.median(wall_first):,.1f} and {np.median(wall_last):,.1f}",
        {
            "first": before,
            "last": after,
            "last_of_first": kept,
            "denied_share": denied,
            "clock_first": float(np.median(wall_first)),
            "clock_last": float(np.median(wall_last)),
            "windows": len(found),
        },
    )
    slowest = Verdict(
        "worst window",
        worst >= RATE_WORST,
        f"{min(granted):,.1f} pair/s, {worst:.3f} of the median {middle:,.1f} (limit {RATE_WORST:g}); by the "
        f"clock {min(wall):,.1f}",
        {"worst": min(granted), "median": middle, "worst_of_median": worst, "clock_worst": min(wall)},
    )
    return [steady, slowest]
